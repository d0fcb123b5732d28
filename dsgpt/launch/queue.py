"""What SLURM's queue says of some jobs, and taking them out of it. Torch-free; bounded in time; works without SLURM.

    jobs = look(["1234", "1240"])      # None where nobody can be asked: no squeue, or no answer within seconds
    cancel([job.id for job in jobs])

squeue knows a job until some minutes after its end (the site's MinJobAge); of older ones it knows nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from dsgpt.errors import ConfigError, DsgptError

QUEUE_SECONDS = 10.0
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "RESV_DEL_HOLD", "REQUEUE_FED")
ACTIVE = ("RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue. `id` is that of an array's task where it is one (12_3, 12_[4-9])."""

    id: str
    state: str
    user: str
    left: str
    nodes: str
    reason: str

    @property
    def base_id(self) -> str:
        return self.id.partition("_")[0]

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def runs(self) -> bool:
        return self.state in ACTIVE

    def __str__(self) -> str:
        if self.runs:
            return f"job {self.id} {self.state} on {self.nodes}, {self.left} left"
        return f"job {self.id} {self.state}" + (f" ({self.reason})" if self.reason not in ("", "None") else "")


def look(job_ids: Sequence[str]) -> list[QueuedJob] | None:
    """What the queue knows of these jobs, ended ones of the last minutes included. None: it could not be asked.

    The id of an array means all of its tasks, that of a task (12_3) only that one.
    """
    base = sorted({one.partition("_")[0] for one in job_ids if one.partition("_")[0].isdecimal()}, key=int)
    if not base:
        return []
    found = []
    for start in range(0, len(base), 200):
        ids = ",".join(base[start : start + 200])
        done = _call(["squeue", "--noheader", "--states=all", f"--jobs={ids}", "--format=%i|%T|%u|%L|%N|%r"])
        # One id alone that is not known any more is an error to squeue; among others it is not.
        if done is None or (done.returncode and "Invalid job id" not in done.stderr):
            return None
        for line in done.stdout.splitlines() if not done.returncode else []:
            fields = line.strip().split("|", 5)
            if len(fields) == 6:
                found.append(QueuedJob(*fields))
    return [job for job in found if job.id in job_ids or job.base_id in job_ids]


def cancel(job_ids: Sequence[str]) -> None:
    """scancel. Raises DsgptError where it fails; a job that has ended meanwhile is no failure."""
    done = _call(["scancel", *job_ids], 6 * QUEUE_SECONDS)
    if done is None:
        raise ConfigError(
            "scancel cannot be called here, or did not answer", do="call it on a login node of the cluster"
        )
    if done.returncode and "Invalid job id" not in done.stderr:
        raise DsgptError("scancel failed", seen=done.stderr.strip(), do="try again")


def _call(command: Sequence[str], seconds: float = QUEUE_SECONDS) -> subprocess.CompletedProcess[str] | None:
    # A person's own defaults (SQUEUE_FORMAT and its like) must not change what is read here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SCANCEL_"))}
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
