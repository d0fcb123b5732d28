"""Finding runs and what belongs to them: their starts, jobs and logs. Torch-free; read by status, logs and cancel."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from dsgpt.checkpoint import starts
from dsgpt.checkpoint.commit import MANIFEST
from dsgpt.errors import ConfigError
from dsgpt.launch.submission import Submission
from dsgpt.lease import read_holder
from dsgpt.train.tail import last_lines

LOOK_BACK = 1 << 18  # bytes of the ends of metrics.jsonl and events.jsonl


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, begun or only submitted."""
    return any(
        (folder / name).exists() for name in (starts.STARTS, "config.yaml", "checkpoints", "submissions", "logs")
    )


def require_run(folder: Path) -> Path:
    """`folder` itself. Raises ConfigError where it is none of a run, with the runs below it."""
    if not is_run(folder):
        below = ", ".join(str(path) for path in find_runs(folder)[:5])
        raise ConfigError("not a run's folder", seen=str(folder), do=f"one of {below}")
    return folder


def find_runs(folder: Path) -> list[Path]:
    """The run itself, or all runs at most three levels below. Raises ConfigError where there is none."""
    if not folder.is_dir():
        raise ConfigError("no such folder", seen=str(folder), do="name a run's output_dir, or a folder with several")
    below = [folder] if is_run(folder) and not _only_shares(folder) else []
    level = [folder]
    for _ in range(3 if not below else 0):
        inner = [path for one in level for path in _folders(one)]
        below += [path for path in inner if is_run(path)]
        level = [path for path in inner if not is_run(path)]
    if not below and is_run(folder):
        return [folder]  # an array that has not started
    if not below:
        raise ConfigError("no run here", seen=str(folder), do="name a run's output_dir, or a folder with several")
    return sorted(below)


def _only_shares(folder: Path) -> bool:
    """Whether it holds only what the tasks of an array share: their submission and SLURM's logs."""
    return not any((folder / name).exists() for name in (starts.STARTS, "config.yaml", "checkpoints"))


def _folders(folder: Path) -> list[Path]:
    try:
        found = [path for path in folder.iterdir() if path.is_dir() and path.name not in ("submissions", "logs")]
    except OSError:
        return []
    return [path for path in found if not (path / MANIFEST).exists() and not path.name.startswith(".")]


def attempts_of(run_dir: Path) -> list[str]:
    """The names of all starts, oldest first: they sort by time."""
    logs = run_dir / "logs"
    names = {start.attempt for start in starts.read_starts(run_dir)}
    return sorted(names | ({path.name for path in logs.iterdir() if path.is_dir()} if logs.is_dir() else set()))


def job_ids(run_dir: Path, submissions: Sequence[Submission]) -> list[str]:
    """Jobs of this run: those that were submitted, the newest start's and its successor, the lease holder's."""
    recorded, attempts, holder = starts.read_starts(run_dir), attempts_of(run_dir), read_holder(run_dir)
    own = [recorded[-1].job] if recorded else []
    own += [holder[0].job] if holder else []
    own += jobs_of(run_dir / "logs" / attempts[-1]) if attempts else []
    return [job for job in dict.fromkeys([*(one.job_id for one in submissions), *own]) if job]


def jobs_of(log_dir: Path) -> list[str]:
    """The job of a start as its batch script knew it, before any rank began; and the one it submitted for what is left."""
    jobs = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        jobs.append(str(json.loads((log_dir / "job.json").read_text("utf-8"))["job"]))
    with contextlib.suppress(OSError):
        jobs += (log_dir / "successor").read_text("utf-8").split()[:1]
    return jobs


def last_host(run_dir: Path) -> str:
    hosts = [
        line.get("host") for line in last_lines(run_dir / "events.jsonl", LOOK_BACK) if line.get("event") == "start"
    ]
    return str(hosts[-1]) if hosts else ""


def newest_log(run_dir: Path, attempt: str) -> Path | None:
    own = sorted((run_dir / "logs" / attempt).glob("*.log"))
    slurm = sorted((run_dir / "logs").glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
    found = own or slurm[-1:]
    return found[0] if found else None


def slurm_log(submission: Submission, job: str) -> Path | None:
    logs = submission.folder.parent.parent / "logs"
    return next(iter(sorted(logs.glob(f"slurm-{job}*.log"))), None)
