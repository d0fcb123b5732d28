"""The starts of a run, how each ended, and what follows for the next one. Torch-free.

`starts.jsonl` in the run folder has one line per start, written by rank 0 while it holds the lease: which job, what it was
told to resume from, which commits it saw. With the verdict of each start (verdict.py) three decisions rest on it:

* a commit that the newest start did not see and did not make is of a job that was cut off and went on writing: ignored;
* `resume=<step>` goes back once per job: a requeue of the same job continues where that job stopped;
* three starts in a row that end with 76, or without a verdict, and without a new commit are no progress: 93.

Growth: a line is 60 bytes per commit that is kept; a start reads the file once, on rank 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dsgpt.checkpoint.commit import attempt_of
from dsgpt.errors import ExitCode
from dsgpt.verdict import read_verdict

STARTS = "starts.jsonl"

Commit = tuple[int, str]  # step, attempt that made it


@dataclass(frozen=True)
class Start:
    """One start: `commits` are those it saw, oldest first; `rewound_to` is the step it went back to, if it was told to."""

    attempt: str
    job: str
    restarts: int
    commits: tuple[Commit, ...]
    rewound_to: int | None = None


def record_start(run_dir: Path, start: Start) -> None:
    """Append one line, forced to storage."""
    with (run_dir / STARTS).open("a+", encoding="utf-8") as file:
        if file.tell():
            file.seek(file.tell() - 1)
            if file.read(1) != "\n":  # the start before died within its line
                file.write("\n")
        file.write(json.dumps({"time": time.time(), **asdict(start)}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_starts(run_dir: Path) -> list[Start]:
    """All starts, oldest first; a line that was cut short is passed over."""
    starts = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / STARTS).read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                fields = json.loads(line)
                commits = tuple((int(step), str(attempt)) for step, attempt in fields["commits"])
                rewound = fields.get("rewound_to")
                starts.append(Start(fields["attempt"], fields["job"], fields["restarts"], commits, rewound))
    return starts


def cut_off(starts: Sequence[Start], commits: Sequence[Commit]) -> list[Commit]:
    """Commits that appeared after the newest start began and that it did not make.

    A commit of which it cannot be read who made it ("") is not: it is damaged, and whoever verifies it says so.
    """
    if not starts:
        return []
    known, own = set(starts[-1].commits), ("", starts[-1].attempt)
    return [one for one in commits if one[1] not in own and one not in known and (one[0], "") not in known]


def has_committed(run_dir: Path, starts: Sequence[Start]) -> bool:
    """Whether the newest start saw or made a commit, where no checkpoint is left itself.

    Commits that were set aside (`abandoned-<n>`) are still there, and somebody was told: they do not count. What older
    starts made was seen by the newest one, or was cut off.
    """
    if not starts:
        return False
    last = starts[-1]
    aside = {(path.name, attempt_of(path)) for path in (run_dir / "checkpoints").glob("abandoned-*/step-*")}
    known = [*last.commits, *((step, last.attempt) for step in _committed_by(run_dir, last.attempt))]
    return any(not {(f"step-{step:08d}", attempt), (f"step-{step:08d}", "")} & aside for step, attempt in known)


def _committed_by(run_dir: Path, attempt: str) -> list[int]:
    """Steps that a start told of as committed."""
    steps = []
    with contextlib.suppress(FileNotFoundError), (run_dir / "events.jsonl").open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if b'"committed"' in line and (event := json.loads(line))["event"] == "committed":
                    steps += [int(event["step"])] if event["attempt"] == attempt else []
    return steps


def starts_without_progress(run_dir: Path, starts: Sequence[Start], commits: Sequence[Commit], but: str = "") -> int:
    """How many starts up to the last one failed, one after the other, without a commit of their own.

    Only 76 and no verdict at all count; any other end, 75 among them, breaks the row: there was nothing to try again. A
    start that died before it came to its line in `starts.jsonl` is known by its log folder; names of starts sort by time.
    `but` is a start that is under way.
    """
    logs = run_dir / "logs"
    names = {start.attempt for start in starts} | {path.name for path in logs.glob("*") if path.is_dir()}
    progressed = {attempt for seen in (*(start.commits for start in starts), commits) for _, attempt in seen}
    failed = 0
    for name in sorted(names - {but}, reverse=True):
        verdict = read_verdict(logs / name)
        if verdict is not None and verdict.exit_code == ExitCode.LOCKED:
            continue  # of another job that found the folder taken
        if name in progressed or (verdict is not None and verdict.exit_code != ExitCode.INFRASTRUCTURE):
            break
        failed += 1
    return failed


def has_rewound(starts: Sequence[Start], job: str, restarts: int, step: int, commits: Sequence[Commit]) -> bool:
    """Whether this very job, before its last requeue, went back to that step already, and the later commits are gone.

    Outside a scheduler no job repeats: every command is one of its own.
    """
    return any(
        start.job == job
        and start.restarts < restarts
        and start.rewound_to == step
        and not any(commit in commits for commit in start.commits if commit[0] > step)
        for start in starts
        if job
    )
