"""T004: the schedule of `kill` on bare DeepSpeed, whose checkpoints have no commit. No entry of its own; see controls.

On storage as slow as there, with four fifths of the kills within a save, since this is what differs. After each kill the same
program is started again without any cleaning by hand. Ways to break that are counted: the start fails and a person must
repair the folder (the run ends there); it begins at step 0, or at an older save, though a later one had been reported; it
continues, but its losses or final weights are not those of an undisturbed run. Whatever it shows is published.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults._bare_rank import STEPS
from tests.faults._jobs import Job, Reference, lines_of
from tests.faults.kill import FSYNC_SECONDS, draw, strike

SURVIVOR_SECONDS, GIVE_UP_SECONDS, WITHIN_SAVES = 10.0, 120.0, 0.8


@dataclass
class Broken:
    """How often a start after a kill broke, and one line about each."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def add(self, kind: str, line: str) -> None:
        self.counts[kind] += 1
        self.lines.append(f"{kind}: {line}")


def start(folder: Path) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    script = str(Path(__file__).with_name("_bare_rank.py"))
    return Job(folder.with_suffix(".yaml"), fsync_seconds=FSYNC_SECONDS, command=[sys.executable, script, str(folder)])


def steps_of(lines: list[dict[str, Any]]) -> dict[int, str]:
    return {line["step"]: line["loss"] for line in lines if "step" in line}


def undisturbed(folder: Path) -> tuple[list[dict[str, Any]], Reference]:
    with start(folder) as job:
        job.wait_until_gone(GIVE_UP_SECONDS)
        ended = job.age
        lines = lines_of(folder / "metrics.jsonl")
        if any(job.codes()) or "final" not in lines[-1]:
            raise RuntimeError(f"bare DeepSpeed ended with {job.codes()}:\n{job.output()[-3000:]}")
    saves = [line["seconds"] for line in lines if "saved" in line]
    seconds = lines[-1]["time"] - lines[0]["time"]
    return lines, Reference({}, {}, ended - seconds, seconds / STEPS, max(saves))


def judge(before: list[dict[str, Any]], new: list[dict[str, Any]], good: list[dict[str, Any]], broken: Broken) -> None:
    """What a start that got as far as its `resumed` line did wrong."""
    saved = max((line["saved"] for line in before if "saved" in line), default=0)
    resumed = next(line["resumed"] for line in new if "resumed" in line)
    expected, final = steps_of(good), good[-1]["final"]
    if resumed == 0 and saved:
        broken.add("lost all", f"step {saved} was reported as saved, the start began at 0")
    elif resumed < saved:
        broken.add("lost a save", f"step {saved} was reported as saved, the start continued at {resumed}")
    wrong = [step for step, loss in steps_of(new).items() if expected[step] != loss]
    if wrong or any(line["final"] != final for line in new if "final" in line):
        broken.add("continued wrongly", f"from step {resumed}: other losses at {wrong[:3]}…, or other final weights")


def attack(folder: Path, kills: int, good: list[dict[str, Any]], reference: Reference, rng: random.Random) -> Any:
    """Kill one run so often, then let it finish; (kills that struck, of them within a save, what broke)."""
    broken, struck, in_save = Broken(), 0, 0
    names = lambda: _tags(folder / "checkpoints")  # noqa: E731
    while True:
        before = lines_of(folder / "metrics.jsonl")
        with start(folder) as job:
            running = False
            if struck < kills:
                kill = draw(rng, barren=0, within_saves=WITHIN_SAVES)
                left = reference.step_seconds * (STEPS - max(steps_of(before), default=0))
                running, _ = strike(job, kill, reference.startup_seconds + left, reference.save_seconds, names, rng)
                struck += running
                in_save += running and kill.save > 0
            job.wait_until_gone(SURVIVOR_SECONDS if running else GIVE_UP_SECONDS)
            codes, output = job.codes(), job.output()
        new = lines_of(folder / "metrics.jsonl")[len(before) :]
        if any("resumed" in line for line in new):
            judge(before, new, good, broken)
        if not running:
            if any(codes):
                broken.add("resume failed", f"{codes} {_cause(output)}")
            return struck, in_save, broken


def _cause(output: str) -> str:
    """The first error that is not about the other rank being gone."""
    return next((line for line in output.splitlines() if "Error:" in line and "gloo" not in line), output[-300:])


def _tags(checkpoints: Path) -> set[str]:
    try:
        return {name for name in os.listdir(checkpoints) if name.startswith("step")}
    except FileNotFoundError:
        return set()


def run(root: Path, trials: int, rng: random.Random) -> tuple[int, int, int, Broken]:
    """(kills, of them within a save, runs, what broke)."""
    good, reference = undisturbed(root / "straight")
    total, struck, in_save, runs = Broken(), 0, 0, 0
    while struck < trials and runs < 3 * trials:
        found = attack(root / f"run-{runs}", min(trials - struck, rng.randint(1, 5)), good, reference, rng)
        struck, in_save, runs = struck + found[0], in_save + found[1], runs + 1
        total.counts += found[2].counts
        total.lines += found[2].lines
    return struck, in_save, runs, total
