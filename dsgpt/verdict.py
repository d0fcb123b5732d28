"""How a job ends, said once: `logs/<attempt>/end.json`, the verdict. Torch-free.

Whoever first knows the cause (a rank, its watchdog) creates the file and one event in events.jsonl; all others read it and
leave with its code. A scheduler's own exit codes tell nothing: launchers change them, and kill the slow ones.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsgpt.errors import ExitCode
from dsgpt.process import write_once

END = "end.json"
STOPPED_AT_START = "stopped_at_start"  # a cause: asked to stop before the first step
MAX_STARTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class Verdict:
    """How a start ended. `cause` is a word; `rank` and `host` are those of the process that failed first, -1 and "" of none.

    `requeue` says whether another start is worth trying without a person: after 75 and 76, and after 77 where this start
    committed something, since it fitted then.
    """

    exit_code: int
    cause: str
    message: str = ""
    rank: int = -1
    host: str = ""
    step: int = -1
    phase: str = ""
    last_committed: int = -1
    committed_here: bool = False

    @property
    def requeue(self) -> bool:
        return self.exit_code in (ExitCode.PREEMPTED, ExitCode.INFRASTRUCTURE) or (
            self.exit_code == ExitCode.OUT_OF_MEMORY and self.committed_here
        )

    def after(self, failed_starts: int) -> Verdict:
        """This one, where so many starts in a row failed before it: the third without a new checkpoint is 93, not 76."""
        if (
            self.exit_code != ExitCode.INFRASTRUCTURE
            or self.committed_here
            or failed_starts + 1 < MAX_STARTS_WITHOUT_PROGRESS
        ):
            return self
        told = f"{failed_starts + 1} starts in a row ended without a new checkpoint: not worth another one as it is"
        return replace(self, exit_code=int(ExitCode.NO_PROGRESS), message=f"{self.message}\n{told}")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "requeue": self.requeue}

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Verdict:
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})


def record_verdict(log_dir: Path, verdict: Verdict, tell: bool = True) -> Verdict:
    """Create the verdict's file, and its event (unless `tell` is off), unless there is one; returns the one in force."""
    fields = {"time": time.time(), **verdict.as_dict()}
    with contextlib.suppress(OSError):  # a full disk must not hide why the run ended: stderr has it too
        if write_once(log_dir / END, json.dumps(fields) + "\n") and tell:
            line = {"attempt": log_dir.name, "event": "end", "text": verdict.message, **fields}
            with (log_dir.parent.parent / "events.jsonl").open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
    return read_verdict(log_dir) or verdict


def amend_verdict(log_dir: Path, verdict: Verdict) -> Verdict:
    """Put this one in the place of what is there: for whoever knows more after every rank has gone."""
    tmp = log_dir / f".tmp-{END}"
    with contextlib.suppress(OSError):
        tmp.write_text(json.dumps({"time": time.time(), **verdict.as_dict()}) + "\n", "utf-8")
        tmp.replace(log_dir / END)
    return verdict


def read_verdict(log_dir: Path) -> Verdict | None:
    try:
        return Verdict.parse(json.loads((log_dir / END).read_text("utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
