"""How long before its time limit a job has to be told: one step, one save and a margin, from what the run itself did before.

    lead = signal_lead(run_dir, run, None, 7200.0, problems)      # lead.seconds goes into #SBATCH --signal=USR1@…

A signal comes at any moment of a step, all ranks finish that step, then save. Measured are the slowest of the last logged
steps and the longest save; a run that never ran gets DEFAULT_SECONDS. Only the ends of the files are read. Torch-free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from dsgpt.errors import Problem
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.tail import last_lines
from dsgpt.units import format_seconds

DEFAULT_SECONDS = 300
MARGIN_SECONDS = 90
_LOOK_BACK = 1 << 20  # bytes of either file: thousands of lines


@dataclass(frozen=True)
class Lead:
    """`step` and `save` are seconds as measured, None where nothing was."""

    seconds: int
    step: float | None = None
    save: float | None = None
    notes: list[str] = field(default_factory=list)


def signal_lead(
    run_dir: Path, run: ResolvedRun | None, asked: int | None, limit: float | None, problems: list[Problem]
) -> Lead:
    """The lead for a job of `limit` seconds (None: unknown); `asked` is the site's own word for it."""
    if asked is not None:
        seconds, measured = asked, Lead(asked)
    else:
        measured = _measure(run_dir, run)
        seconds = measured.seconds
        if measured.save is None and limit is not None and seconds > limit / 4:
            seconds = max(1, int(limit / 4))
            note = f"a short job: it is told {seconds} s before its limit, instead of {DEFAULT_SECONDS} s"
            measured = Lead(seconds, notes=[note])
    if limit is not None and seconds >= limit:
        seen = f"told {seconds} s before the limit of {limit:.0f} s"
        problems.append(Problem("the time limit leaves nothing to train in", seen, "a longer --time"))
    return measured


def _measure(run_dir: Path, run: ResolvedRun | None) -> Lead:
    saves = [
        float(event["seconds"]) + float(event.get("stall_seconds") or 0)
        for event in last_lines(run_dir / "events.jsonl", _LOOK_BACK)
        if event.get("event") == "committed" and isinstance(event.get("seconds"), int | float)
    ]
    rates = [
        float(line["tokens_per_second"])
        for line in last_lines(run_dir / "metrics.jsonl", _LOOK_BACK)
        if isinstance(line.get("tokens_per_second"), int | float) and line["tokens_per_second"] > 0
    ]
    if not saves or not rates or run is None:
        note = f"the run has not been here before: it is told {DEFAULT_SECONDS} s before the time limit"
        return Lead(DEFAULT_SECONDS, notes=[note])
    worlds = [
        event["world_size"]
        for event in last_lines(run_dir / "events.jsonl", _LOOK_BACK)
        if event.get("event") == "start" and isinstance(event.get("world_size"), int)
    ]
    slower = max(1.0, worlds[-1] / run.world_size) if worlds else 1.0
    step, save = slower * run.config.training.tokens_per_step / min(rates), slower * max(saves)
    seconds = math.ceil(step + save + MARGIN_SECONDS)
    note = f"measured before: a step {step:.2g} s, a save {save:.2g} s; it is told {format_seconds(seconds)} before the limit"
    return Lead(min(seconds, 65535), step, save, [note])
