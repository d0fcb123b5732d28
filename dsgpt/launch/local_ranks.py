"""The same `dsgpt` command as several ranks of this machine, for a verb that was started without a launcher. Torch-free."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from dsgpt.launch import slurm
from dsgpt.launch.hardware import detect
from dsgpt.process import complain, free_port

CPU_RANKS = 2


def expected_hosts() -> list[str]:
    """The hosts that ranks should come from, as SLURM tells; none outside its jobs."""
    listed = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST")
    return slurm.expand_hosts(listed) if listed and slurm.in_step() else []


def run_local_ranks(arguments: Sequence[str], number: int | None = None) -> int:
    """Run `dsgpt ARGUMENTS` `number` times on this machine, once per GPU or CPU_RANKS times by default.

    Returns the highest exit code.
    """
    number = number or detect().num_gpus or CPU_RANKS
    where = (
        "; for all nodes of this job: srun python -m dsgpt " + " ".join(arguments) if slurm.get("SLURM_JOB_ID") else ""
    )
    complain(f"no launcher: starting {number} ranks on this machine{where}")
    common = {"WORLD_SIZE": number, "LOCAL_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(number):
        own = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(subprocess.Popen([sys.executable, "-m", "dsgpt", *arguments], env={**os.environ, **own}))
    try:
        return max(process.wait() if process.wait() >= 0 else 128 - process.returncode for process in processes)
    finally:
        for process in processes:
            process.kill()
