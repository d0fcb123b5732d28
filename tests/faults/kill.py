"""Kill real training jobs at random instants, start them again, and compare with an undisturbed run bit by bit.

python -m tests.faults kill [--trials N --seed S]      N kills, 40 unless given; about 20 s each on two cores

Rows T101 (a random rank), T104 (all processes of the job at once, as when a node loses power), P1-P3, P6, P8, P14.
A third of the kills wait for a save and strike within it, on storage whose fsync takes its time; the others strike at a
uniformly random instant of the start's life, imports included. The same command is then started again, without any
cleaning by hand, until the run is done; then comes a new run. After each kill:

* no process of the job survives (a scan of /proc for its mark, not for names), and the verdict names the killed rank;
* every visible checkpoint verifies by hash; the newest acknowledged commit, or a newer one, is there;
* the next start continues after the newest commit, never at step 0; what was done since is at most one save interval.

At the end every logged step, those done twice included, and the last partition files have the bits of the undisturbed run.
Trade-off: a real start costs 10 s, so these are tens of kills; thousands strike the commit protocol alone (`protocol`).
Three starts in a row without a commit end with 93 on purpose, so after two barren kills the third waits for a commit.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsgpt.train.worker import MEET_SECONDS
from dsgpt.verdict import read_verdict
from tests.faults._jobs import (
    HANG_SECONDS,
    MAX_STEPS,
    NO_PROGRESS,
    SAVE_INTERVAL,
    SETTINGS,
    Job,
    Reference,
    acknowledged,
    differences,
    events,
    lines_of,
    newest_commit,
    undisturbed,
)
from tests.faults.protocol import broken_promises
from tests.frame import Outcome, Row
from tests.run_fixtures import make_dataset

KILLS_PER_RUN, FSYNC_SECONDS = (1, 5), 0.03
DEATH_SECONDS, GIVE_UP_SECONDS = 15.0, 120.0
# Before the ranks have met nobody but torch's rendezvous can miss one, and it tries twice for so long.
MEETING_SECONDS = 2 * max(HANG_SECONDS, MEET_SECONDS) + DEATH_SECONDS


@dataclass(frozen=True)
class Kill:
    """`everything` or one random rank; in the `save`-th save of the start, or (0) after a share of its life."""

    everything: bool
    save: int = 0
    share: float = 0.5
    launcher: bool = False


@dataclass
class Tally:
    """What was struck, what was measured, and which promises were broken."""

    kinds: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    runs: int = 0
    lost_steps: int = 0
    deaths: dict[str, tuple[float, str]] = field(default_factory=dict)  # the longest, and which kill it was

    def death(self, phase: str, seconds: float, where: str) -> None:
        self.deaths[phase] = max(self.deaths.get(phase, (0.0, "")), (seconds, where))


def draw(rng: random.Random, barren: int, within_saves: float = 1 / 3) -> Kill:
    """The next kill; that share of them within saves. After two that left no new commit it must wait for one."""
    everything = rng.random() < 0.35
    save = rng.randint(1, 3) if rng.random() < within_saves else 0
    save = max(2, save) if barren >= 2 else save
    # The launcher's ranks have the storage as it is, where a save is too short to be hit.
    return Kill(everything, save, rng.random(), launcher=not save and rng.random() < 0.35)


def strike(
    job: Job, kill: Kill, life_seconds: float, save_seconds: float, saves: Callable[[], set[str]], rng: random.Random
) -> tuple[bool, int | None]:
    """Wait for the instant and kill; (whether the job was still running, the rank killed or None of another process).

    `saves` lists the folders of saves; those that an earlier start left do not count.
    """
    if kill.save:
        before, seen = saves(), set[str]()
        while job.is_running() and len(seen) < kill.save:
            seen |= saves() - before
            time.sleep(0.001)
        time.sleep(rng.uniform(0, save_seconds))
    else:
        while job.is_running() and job.age < kill.share * life_seconds:
            time.sleep(0.005)
    if not job.is_running():
        return False, None
    if kill.everything:
        job.kill_all()
        return True, None
    ranks = job.ranks()
    rank = rng.choice(sorted(ranks)) if ranks else None
    job.kill(rng.choice(job.pids() or [job.processes[0].pid]) if rank is None else ranks[rank])
    return True, rank


def _unfinished(checkpoints: Path) -> set[str]:
    try:
        return {name for name in os.listdir(checkpoints) if name.startswith(".tmp-step-")}
    except FileNotFoundError:
        return set()


def trial(
    yaml: Path,
    folder: Path,
    kill: Kill,
    reference: Reference,
    rng: random.Random,
    tally: Tally,
    topology: tuple[int, str] | None = None,
) -> list[int]:
    """One start and its kill; the exit codes where the job ended by itself before. Broken promises go to the tally."""
    before, steps_before = newest_commit(folder), len(lines_of(folder / "metrics.jsonl"))
    first_steps = len(events(folder, "first_step"))
    with Job(yaml, kill.launcher, FSYNC_SECONDS, topology=topology) as job:
        life = reference.startup_seconds + reference.step_seconds * (MAX_STEPS - before)
        saves = lambda: _unfinished(folder / "checkpoints")  # noqa: E731
        running, rank = strike(job, kill, life, reference.save_seconds, saves, rng)
        began = time.monotonic()
        left = job.wait_until_gone(GIVE_UP_SECONDS)
        seconds, codes = time.monotonic() - began, [code or 0 for code in job.codes()]
        if not running:
            return codes
        output = job.output()
    metrics = [line for line in lines_of(folder / "metrics.jsonl")[steps_before:] if "step" in line]
    where = f"{folder.name}, {kill}, rank {rank} after step {metrics[-1]['step'] if metrics else None}"
    found = [f"process {pid} survives" for pid in left]
    found += broken_promises(folder / "checkpoints", acknowledged(folder))
    for event in events(folder, "first_step")[first_steps:]:
        if event["step"] != before + 1:
            found.append(f"the start continued at step {event['step']}, and step {before} was committed")
    if metrics:
        lost = metrics[-1]["step"] - newest_commit(folder)
        tally.lost_steps = max(tally.lost_steps, lost)
        if rank is not None and newest_commit(folder) < MAX_STEPS:
            found += _told_wrong(folder, metrics[-1]["attempt"], rank, codes, kill.launcher)
    tally.death("training" if metrics else "starting", seconds, where)
    tally.broken += [f"{where}: {one}\n{output[-1500:]}" for one in found]
    tally.kinds["all at once" if kill.everything else "one process"] += 1
    tally.kinds["unfinished save left"] += bool(_unfinished(folder / "checkpoints"))
    tally.kinds["before the first step" if not metrics else "in training"] += 1
    tally.kinds["under dsgpt train"] += kill.launcher
    return []


def _told_wrong(folder: Path, attempt: str, rank: int, codes: list[int], launcher: bool) -> list[str]:
    """Where one rank was killed in training: the verdict names it, and the others leave with 76."""
    verdict = read_verdict(folder / "logs" / attempt)
    told = (verdict.exit_code, verdict.cause, verdict.rank) if verdict else None
    found = [] if told == (76, "rank_died", rank) else [f"the verdict of rank {rank}'s death is {verdict}"]
    survivors = codes if launcher else [code for number, code in enumerate(codes) if number != rank]
    return found + [f"a survivor ended with {code}" for code in survivors if code not in (76, -9)]


def attack(
    yaml: Path,
    folder: Path,
    kills: Sequence[Kill] | int,
    reference: Reference,
    rng: random.Random,
    tally: Tally,
    topology: Callable[[], tuple[int, str] | None] = lambda: None,
    compare: Callable[[Path, Reference], list[str]] = differences,
) -> int:
    """Kill one run as given, or so many times at random, and let it finish; how many kills struck.

    Every start has the `topology` that is drawn for it; at the end `compare` says what is wrong with the run.
    """
    barren = struck = 0
    planned = len(kills) if isinstance(kills, Sequence) else kills
    while struck < planned:
        before = newest_commit(folder)
        kill = kills[struck] if isinstance(kills, Sequence) else draw(rng, barren)
        codes = trial(yaml, folder, kill, reference, rng, tally, topology())
        if not codes:
            struck += 1
            barren = 0 if newest_commit(folder) > before else barren + 1
        elif not _goes_on(codes, tally, folder):
            tally.kinds["too late"] += 1
            break
    for _ in range(3):  # the last start is left alone
        with Job(yaml, fsync_seconds=FSYNC_SECONDS, topology=topology()) as job:
            job.wait_until_gone(GIVE_UP_SECONDS * 5)
            codes, output = [code or 0 for code in job.codes()], job.output()
        if not _goes_on(codes, tally, folder, output):
            break
    tally.runs += 1
    tally.broken += [f"{folder.name} at its end: {one}" for one in compare(folder, reference)]
    hidden = [entry.name for entry in (folder / "checkpoints").iterdir() if entry.name.startswith(".")]
    tally.broken += [f"{folder.name}: {name} is left behind" for name in hidden]
    return struck


def _goes_on(codes: list[int], tally: Tally, folder: Path, output: str = "") -> bool:
    """Whether a job that ended by itself is to be started again: the breaker says try again, 0 is the end."""
    if NO_PROGRESS in codes:
        tally.kinds["breaker (93)"] += 1
        return True
    if any(codes):
        tally.broken.append(f"{folder.name}: a start nobody killed ended with {codes}\n{output[-3000:]}")
    return False


def run(trials: int | None, seed: int) -> Outcome:
    """`trials` kills, spread over as many runs as they take."""
    from tests.run_fixtures import write_config

    trials, rng, tally = trials or 40, random.Random(seed), Tally()
    with tempfile.TemporaryDirectory(prefix="dsgpt-kill-") as name:
        root = Path(name)
        dataset = make_dataset(root / "dataset")
        reference = undisturbed(write_config(dataset, root, "straight", **SETTINGS), root / "straight", FSYNC_SECONDS)
        left = trials
        while left > 0 and tally.runs < 3 * trials:
            name = f"run-{tally.runs}"
            yaml = write_config(dataset, root, name, **SETTINGS)
            left -= attack(yaml, root / name, min(left, rng.randint(*KILLS_PER_RUN)), reference, rng, tally)
    for line in tally.broken[:20]:
        print(line)
    struck, kinds = trials - left, tally.kinds
    rows = [
        Row("kills", struck, at_least=trials, note=", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))),
        Row("runs finished and compared", tally.runs, note="every step and the last partitions, bit by bit"),
        Row("promises broken", len(tally.broken), at_most=0),
        Row("most steps lost by a kill", tally.lost_steps, at_most=SAVE_INTERVAL, note="one save interval"),
        *(
            Row(f"longest death while {phase}", tally.deaths.get(phase, (0.0, ""))[0], "s", at_most=bound, note=note)
            for phase, bound, note in (
                ("training", DEATH_SECONDS, tally.deaths.get("training", (0.0, ""))[1]),
                ("starting", MEETING_SECONDS, tally.deaths.get("starting", (0.0, ""))[1]),
            )
        ),
    ]
    return Outcome(rows, struck)
