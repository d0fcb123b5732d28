"""Showing a run's progress from its metrics.jsonl and events.jsonl: a bar on a terminal, lines elsewhere.

Reading the files that are written anyway keeps the workers' output out of the way, and works the same for a job on
another node. A half-written last line is left for the next look.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from dsgpt.units import format_count

_PHASES = {
    "start": "starting",
    "building_model": "building the model",
    "rehearsing": "trying the largest step",
    "rehearsed": "ready",
    "resumed": "resumed",
    "committed": "training",
    "first_step": "training",
    "evaluating": "evaluating",
    "evaluation": "training",
    "finished": "finished",
}


class JsonTail:
    """New complete lines of a JSON Lines file since the last look, of one attempt only."""

    def __init__(self, path: Path, attempt: str):
        self.path, self.attempt = path, attempt
        self._position = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except OSError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        entries = []
        for line in complete.splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a full disk or a crash
                entries.append(json.loads(line))
        return [entry for entry in entries if isinstance(entry, dict) and entry.get("attempt") == self.attempt]


class Follower:
    """Call `poll` often; use as a context manager. `quiet` shows nothing (for `--json`)."""

    def __init__(self, output_dir: Path, attempt: str, quiet: bool = False):
        self._metrics = JsonTail(output_dir / "metrics.jsonl", attempt)
        self._events = JsonTail(output_dir / "events.jsonl", attempt)
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Follower:
        if sys.stdout.isatty() and not self._quiet:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self._bar.start()
            self._task = self._bar.add_task("starting DeepSpeed", total=None, numbers="")
        elif not self._quiet:
            print("starting DeepSpeed", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def poll(self) -> None:
        try:
            self._show_new()
        except OSError:
            self._quiet = True  # the terminal or pipe is gone; the job is not

    def _show_new(self) -> None:
        for entry in sorted(self._events.read() + self._metrics.read(), key=lambda entry: float(entry["time"])):
            if "event" in entry:
                self._show_event(entry)
            elif "step" in entry:
                self._show_metrics(entry)

    def _show_event(self, entry: dict[str, Any]) -> None:
        if self._quiet or entry["event"] == "end":  # how it ended is said at the end
            return
        text = entry.get("text", "")
        if self._bar is None:
            if text:
                print(text, flush=True)
            return
        if entry["event"] in _PHASES:
            self._bar.update(self._task, description=_PHASES[entry["event"]])
        if entry["event"] == "start":
            self._bar.update(self._task, total=entry["max_steps"])
        if entry["event"] == "resumed":
            self._bar.update(self._task, completed=entry["step"])
        if text:
            self._bar.console.print(text, highlight=False, markup=False)

    def _show_metrics(self, entry: dict[str, Any]) -> None:
        if self._quiet:
            return
        rate, loss = format_count(entry["tokens_per_second"] or 0), entry["loss"]
        if self._bar is None:
            print(entry["text"], flush=True)
        else:
            numbers = f"loss {'not finite' if loss is None else f'{loss:.3f}'}  {rate} tokens/s"
            self._bar.update(self._task, completed=entry["step"], numbers=numbers)
