"""Signals at random instants of jobs on a real SLURM: one agreed step, one commit, one requeue, and nothing done twice.

python -m tests.faults slurm_signals [--trials N --seed S]      N jobs, 50 unless given; about a minute each

Rows T601, T602, T604, T605 and T606: USR1 and USR2 to the batch shell, to the step, to both, to one rank alone, TERM to one
rank, and storms of ten. The instant is uniform over the job's life, from its first second on: preparation, imports, model,
rehearsal, steps, saves, evaluations, the end. Without SLURMLAB_DIR it brings up a cluster of its own, as slurm_timelimit.

A stop before the first step has nothing to commit, and a job that is told when it has finished is not requeued; both are
counted. A signal to the step before there is one reaches nobody.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults._jobs import Reference
from tests.frame import Outcome, Row
from tests.run_fixtures import make_dataset, write_config
from tests.slurm import lab, loops

LEAVE_SECONDS = 5.0  # beside one step and one save


def run(trials: int | None, seed: int) -> Outcome:
    trials, rng, broken = trials or 50, random.Random(seed), []
    kinds: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="dsgpt-signals-") as name, lab.own_cluster():
        root = Path(name)
        dataset = make_dataset(root / "dataset")
        reference = loops.straight(write_config(dataset, root, "straight", **loops.SETTINGS))
        for number in range(trials):
            kind = rng.choice(list(loops.SIGNALS))
            kinds[kind] += 1
            yaml = write_config(dataset, root, f"run-{number}", **loops.SETTINGS)
            found, ending, seconds = _trial(yaml, kind, rng, reference)
            broken += [f"{kind}: {one}" for one in found]
            endings[ending] += 1
            slowest = max(slowest, seconds)
    for line in broken[:20]:
        print(line)
    rows = [
        Row("jobs that got signals", trials, note=", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))),
        Row("stopped and requeued once", endings["requeued"], note=f"else told too early or late: {endings['undisturbed']}"),
        Row("promises broken", len(broken), at_most=0, note="no step lost, no second requeue, the bits of every step"),
        Row(
            "slowest from signal to leaving", slowest, "s",
            at_most=reference.step_seconds + reference.save_seconds + LEAVE_SECONDS,
            note="one step, one save and 5 s; of those that were told between the first step and the last",
        ),
    ]  # fmt: skip
    return Outcome(rows, trials)


def _trial(yaml: Path, kind: str, rng: random.Random, reference: Reference) -> tuple[list[str], str, float]:
    """(promises broken, how it went, seconds from the signal to leaving where it was told in the middle)."""
    life = reference.startup_seconds + len(reference.steps) * reference.step_seconds
    with loops.Loop(yaml) as loop:
        loop.wait_running()
        time.sleep(1.0 + rng.random() * life)
        training, sent = bool(loop.steps()), time.time()
        try:
            loops.SIGNALS[kind](loop, rng)
        except (AssertionError, KeyError, ProcessLookupError):
            if lab.state(loop.job) not in (*lab.ENDED, "COMPLETING"):
                raise  # only a job that is gone cannot be told
        found = loop.broken(reference, lossless=True, requeues=(0, 1))
        codes = [one.exit_code if one else None for one in loop.verdicts()]
        if len(codes) != 1 + loop.finish().restarts:
            found.append(f"{loop.finish().restarts} requeues, attempts ended with {codes}")
        seconds = loops.seconds_to_leave(loop, sent) if training and kind != "a storm" else 0.0
        return found, "requeued" if len(codes) > 1 else "undisturbed", seconds
