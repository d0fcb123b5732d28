"""Taking a run away from where it runs or waits; for `dsgpt cancel`. Torch-free.

    print("\n".join(cancel_run(Path("runs/mine"))))

Jobs are cancelled only where they are of this run (what was submitted for it, or its newest start's job), and of this user;
those that wait for others first, so that none of them starts in between. That an operator did it is written down beside
the script. Outside of SLURM the process that holds the run's lease gets SIGTERM: it commits its step and leaves with 75.
"""

from __future__ import annotations

import getpass
import os
import shlex
import signal
import time
from pathlib import Path

from dsgpt.errors import ConfigError
from dsgpt.launch.queue import cancel, look
from dsgpt.launch.submission import mark_cancelled, read_submissions
from dsgpt.lease import LEASE_SECONDS, read_holder
from dsgpt.train.runs import job_ids


def cancel_run(run_dir: Path) -> list[str]:
    """Lines that say what was done. Raises ConfigError where nothing of the run can be reached from here."""
    submissions = read_submissions(run_dir)
    known = look(job_ids(run_dir, submissions))
    jobs = [job for job in known or [] if job.runs or job.waits]
    user = getpass.getuser()
    foreign = [job for job in jobs if job.user != user and os.geteuid() != 0]
    mine = [job for job in jobs if job not in foreign]
    stop = f"touch {shlex.quote(str(run_dir / 'STOP'))}"
    if foreign and not mine:
        seen = ", ".join(f"job {job.id} of {job.user}" for job in foreign)
        raise ConfigError("the run's jobs are another user's", seen=seen, do=f"ask them, or: {stop}")
    if mine:
        # What was submitted goes whole, of somebody else's array only this task. Newest first: what waits for a job must
        # not start when that one goes.
        submitted = {one.job_id for one in submissions}
        found = {job.base_id if job.base_id in submitted else job.id for job in mine}
        ids = sorted(found, key=lambda job: int(job.partition("_")[0]), reverse=True)
        # Written before: a batch script that asks why it is being ended finds it.
        now = time.time()
        for one in submissions:
            if one.job_id in ids:
                mark_cancelled(one, now)
        cancel(ids)
        return [f"cancelled: {job}" for job in mine]
    holder = read_holder(run_dir)
    if holder is None:
        if known is None and submissions:
            do = f"call this on a login node, or: {stop}"
            raise ConfigError("SLURM's queue cannot be asked here", seen="no answer from squeue", do=do)
        return ["nothing of this run is running or waiting"]
    owner, age = holder
    if owner.is_here() and owner.is_gone():
        return ["nothing of this run is running: its process is gone"]
    if owner.is_here():
        try:
            os.kill(owner.pid, signal.SIGTERM)
        except ProcessLookupError:
            return ["nothing of this run is running: its process is gone"]
        except PermissionError as error:
            raise ConfigError(
                "the run is another user's", seen=f"process {owner.pid}", do=f"ask them, or: {stop}"
            ) from error
        return [f"SIGTERM to process {owner.pid}: it commits its step and leaves with 75"]
    if age > 2 * LEASE_SECONDS:
        return [f"nothing to cancel: {owner} has given no sign of life for {age:.0f} s"]
    raise ConfigError("the run is at work elsewhere", seen=str(owner), do=f"call this on {owner.host}, or: {stop}")
