"""What a run is in the middle of: counters, and the files that tell of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from dsgpt.process import complain


@dataclass
class TrainState:
    """Counters carried by a checkpoint. `step` optimizer steps are behind us, also those left out for bad gradients."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    optimizer_steps: int = 0
    skipped_steps: int = 0

    def counters(self) -> dict[str, int]:
        return asdict(self)


class JsonLines:
    """An append-only file of JSON objects, one a line, flushed at once so that `tail -f` and other processes see it.

    A line that cannot be written (a full disk) is counted and reported, and training goes on. Numbers that JSON does not
    have (infinity, not a number) become null.
    """

    def __init__(self, path: Path | None):
        self._path, self.lost_lines = path, 0
        self._file: TextIO | None = path.open("a", encoding="utf-8") if path else None
        if self._file and _ends_within_a_line(path):
            self._file.write("\n")  # the last start died there; keep the next line whole

    def write(self, **fields: Any) -> None:
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        except OSError as error:
            self.lost_lines += 1
            complain(f"warning: {self.lost_lines} lines of {self._path} are lost: {error}")


def _ends_within_a_line(path: Path | None) -> bool:
    if path is None or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that count, in the order of their steps: without those that were superseded.

    A line of a start that another one has followed does not count: that job was cut off and went on for a while.
    """
    kept: list[dict[str, Any]] = []
    attempts: list[str] = []
    for text in path.read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a crash
        attempt = line.get("attempt", "")
        if attempt not in attempts:
            attempts.append(attempt)
        if attempt != attempts[-1]:
            continue
        if "superseded_after" in line:
            kept = [earlier for earlier in kept if earlier["step"] <= line["superseded_after"]]
        else:
            kept.append(line)
    return kept


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole: a crash or a full disk in between leaves the old one."""
    tmp = path.with_name(f".tmp-{path.name}")
    with tmp.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)


def say(text: str) -> None:
    """Print a line; a closed pipe or a full disk behind stdout is no reason to stop training."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


class RunLog:
    """metrics.jsonl and events.jsonl of a run, and the lines a person sees. Silent on all ranks but 0."""

    def __init__(self, output_dir: Path, attempt: str, enabled: bool):
        self.enabled, self.attempt = enabled, attempt
        self._metrics = JsonLines(output_dir / "metrics.jsonl" if enabled else None)
        self._events = JsonLines(output_dir / "events.jsonl" if enabled else None)

    def metrics(self, text: str, **fields: Any) -> None:
        if self.enabled:
            self._metrics.write(time=time.time(), attempt=self.attempt, text=text, **fields)
            say(text)

    def supersede(self, step: int) -> None:
        """Say in metrics.jsonl that lines of later steps before this one do not count: training goes on from `step`."""
        if self.enabled:
            self._metrics.write(time=time.time(), attempt=self.attempt, superseded_after=step)

    def event(self, event: str, text: str = "", **fields: Any) -> None:
        if self.enabled:
            self._events.write(time=time.time(), attempt=self.attempt, event=event, text=text, **fields)
            if text:
                say(text)
