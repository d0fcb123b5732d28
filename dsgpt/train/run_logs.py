"""The logs of a run's newest start, whichever way it was started; for `dsgpt logs`. Torch-free.

    for text in show(Path("runs/mine"), lines=50): ...
    for text in follow(Path("runs/mine")): ...          # goes on with the next start, until the run has ended

A start logs into `logs/<attempt>/<node>.log`, SLURM's batch script into `logs/slurm-<job>.log`, watchdogs leave stacks in
`logs/<attempt>/stacks-rank-*.txt`. Only the ends of files are read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from dsgpt.errors import ConfigError
from dsgpt.launch.submission import read_submissions
from dsgpt.train.runs import attempts_of
from dsgpt.train.status import read_status
from dsgpt.verdict import read_verdict

_TAIL_BYTES = 1 << 20
POLL_SECONDS = 0.5
_LOOK_AGAIN_SECONDS = 10.0


def log_files(run_dir: Path, attempt: str | None = None, stacks: bool = False) -> list[Path]:
    """Of the newest start, or the named one. SLURM's own logs come first; without a start they are all there is."""
    attempts = attempts_of(run_dir)
    if attempt is not None and attempt not in attempts:
        known = ", ".join(attempts[-5:]) or "none"
        raise ConfigError("no such start of this run", seen=attempt, do=f"its newest starts: {known}")
    name = attempt or (attempts[-1] if attempts else "")
    own = sorted((run_dir / "logs" / name).glob("stacks-rank-*.txt" if stacks else "*.log")) if name else []
    if stacks:
        return own
    slurm = sorted((run_dir / "logs").glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
    return [*([] if attempt else slurm[-1:]), *own]


def show(
    run_dir: Path, lines: int, attempt: str | None = None, rank: int | None = None, stacks: bool = False
) -> Iterator[str]:
    """The last `lines` of each file, under its name."""
    files = log_files(run_dir, attempt, stacks)
    if not files:
        what = "stacks: they are left by a watchdog that ends a stuck run" if stacks else "logs yet"
        raise ConfigError(f"no {what}", seen=str(run_dir / "logs"), do=f"dsgpt status {run_dir}")
    for path in files:
        yield f"==> {path} <=="
        yield from [line for line in _tail(path) if _is_of(line, rank)][-lines:]


def follow(run_dir: Path, rank: int | None = None, lines: int = 10) -> Iterator[str]:
    """The last lines, then what is appended, over requeues; ends when the run has ended and nothing of it waits."""
    seen: dict[Path, int] = {}
    shown: Path | None = None
    looked = -_LOOK_AGAIN_SECONDS
    while True:
        files = log_files(run_dir)
        if not files and not read_submissions(run_dir):
            raise ConfigError("no logs yet", seen=str(run_dir / "logs"), do=f"dsgpt status {run_dir}")
        quiet = True
        for path in files:
            if path not in seen:
                seen[path] = max(0, path.stat().st_size - _size_of_last(path, lines))
            text = _read_from(path, seen[path])
            new = [line for line in text.splitlines() if _is_of(line, rank)]
            seen[path] += len(text.encode("utf-8", "surrogateescape"))
            if new and path != shown:
                yield f"==> {path} <=="
                shown = path
            yield from new
            quiet = quiet and not text
        if quiet and _has_ended(run_dir) and time.monotonic() - looked >= _LOOK_AGAIN_SECONDS:
            looked = time.monotonic()
            if read_status(run_dir).state not in ("running", "queued"):
                return
        time.sleep(POLL_SECONDS)


def _has_ended(run_dir: Path) -> bool:
    """Whether the newest start has a verdict; a good one needs no look at the queue."""
    attempts = attempts_of(run_dir)
    return bool(attempts) and read_verdict(run_dir / "logs" / attempts[-1]) is not None


def _tail(path: Path) -> list[str]:
    size = path.stat().st_size
    return _read_from(path, max(0, size - _TAIL_BYTES), cut=False).splitlines()[1 if size > _TAIL_BYTES else 0 :]


def _size_of_last(path: Path, lines: int) -> int:
    return sum(len(line.encode("utf-8", "surrogateescape")) + 1 for line in _tail(path)[-lines:])


def _read_from(path: Path, position: int, cut: bool = True) -> str:
    """From `position` on; with `cut` up to the last whole line."""
    with path.open("rb") as file:
        file.seek(position)
        data = file.read()
    return (data[: data.rfind(b"\n") + 1] if cut else data).decode("utf-8", "surrogateescape")


def _is_of(line: str, rank: int | None) -> bool:
    """Whether a line has this rank's prefix, as srun --label writes it (`3: …`) or as `[rank3]`."""
    return rank is None or re.match(rf"\s*(?:0*{rank}:|\[?rank ?0*{rank}\]?\b)", line) is not None
