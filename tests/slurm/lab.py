"""Jobs on whichever SLURM answers `sinfo`: submit, watch, disturb. What pytest and `python -m tests.faults` both use.

    job = submit("slurm/train.sbatch", yaml, options=["--nodes=2"], folder=tmp_path)
    ended = wait(job, 120)                          # Ended("COMPLETED", 0, 0, restarts=1)
    control("fail", "node2")                        # only where the cluster is our own, made by cluster.sh

Trade-off: what a job did is read from `scontrol show job`, squeue's own record, not from accounting, which small
clusters do not have; so jobs must not have ended longer ago than the site's MinJobAge (300 s where nothing is set).
A cluster that is somebody else's is only asked for tiny jobs; sbatch reads SBATCH_PARTITION and SBATCH_ACCOUNT itself.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.faults._jobs import MARK, _environment, _is_helper

ROOT = Path(__file__).parents[2]
CLUSTER, SCRIPTS = ROOT / "tests" / "slurm" / "cluster.sh", ROOT / "slurm"
ANSWER_SECONDS = 10  # a SLURM that takes longer to list its nodes is not one to run tests on
THERE = ("idle", "mixed", "allocated", "completing", "planned")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY")
ENDED += ("BOOT_FAIL", "SPECIAL_EXIT")


@cache
def why_no_slurm() -> str:
    """Why no job can run from here; empty where one can. Asked once, and never for longer than some seconds."""
    if shutil.which("sinfo") is None:
        return "no sinfo on PATH"
    command = ["sinfo", "--noheader", "--Node", "--format=%N %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return f"sinfo does not answer within {ANSWER_SECONDS} s"
    if done.returncode:
        return f"sinfo: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}"
    nodes = done.stdout.split("\n")
    return (
        "" if _there(nodes) else f"no node of this SLURM is there: {', '.join(sorted(filter(None, nodes))) or 'none'}"
    )


def _there(lines: Iterable[str]) -> list[str]:
    """Names of the nodes that take jobs; a state that ends in * is of one that does not answer."""
    return sorted({line.split()[0] for line in lines if line and line.split()[1].lower() in THERE})


def nodes() -> list[str]:
    return _there(call("sinfo", "--noheader", "--Node", "--format=%N %T").split("\n"))


def call(*command: str, seconds: float = 60, **options: Any) -> str:
    """What a SLURM command prints; its stderr becomes the error where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def job_environment(**more: str) -> dict[str, str]:
    """Of every process of a job: this interpreter first on PATH, one thread, CPU, and this very source tree."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM_JOB", "PYTEST_"))}
    path = [str(Path(sys.executable).parent), environment.get("PATH", "")]
    sources = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return {
        **environment, "PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(sources), "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DSGPT_SITE": os.devnull, MARK: secrets.token_hex(8), **more,
    }  # fmt: skip


def submit(
    script: Path | str, *arguments: object, options: Iterable[str] = (), folder: Path, **environment: str
) -> str:
    """Queue a script from `folder`, where its log goes; the job's id."""
    command = ["sbatch", "--parsable", *options, str(script), *map(str, arguments)]
    return call(*command, cwd=folder, env=job_environment(**environment)).strip().split(";")[0]


# ---- what a job is doing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a job ended, and how often it had been requeued."""

    state: str
    exit_code: int
    signal: int
    restarts: int


def record(job: str) -> dict[str, str]:
    """The fields of `scontrol show job`; those whose value has spaces are cut at the first."""
    return dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", call("scontrol", "-o", "show", "job", job).splitlines()[0]))


def state(job: str) -> str:
    return record(job)["JobState"]


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`; a test that waits in vain fails with `what`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.2)
    return found


def wait(job: str, seconds: float) -> Ended:
    """How it ended. One that is late is cancelled, and its record and log are the error."""
    try:
        until(lambda: state(job) in ENDED, seconds, f"the end of job {job}")
    except AssertionError as error:
        found = record(job)
        cancel(job)
        raise AssertionError(f"{error}: {found}\n{log_of(found)}") from None
    found = record(job)
    code, number = found["ExitCode"].split(":")
    return Ended(found["JobState"], int(code), int(number), int(found["Restarts"]))


def log_of(found: dict[str, str] | str, tail: int = 6000) -> str:
    """The end of a job's log."""
    fields = record(found) if isinstance(found, str) else found
    try:
        return Path(fields.get("StdOut", "")).read_text("utf-8", errors="replace")[-tail:]
    except OSError as error:
        return f"no log: {error}"


def cancel(job: str) -> None:
    subprocess.run(["scancel", job], capture_output=True, timeout=60)


def send(job: str, name: str, *options: str) -> None:
    """A signal as `scancel` sends it: to the steps; with `--batch` to the shell alone, with `--full` to both."""
    call("scancel", f"--signal={name}", *options, job)


# ---- a cluster of our own --------------------------------------------------------------------------------------------


def is_ours() -> bool:
    """Whether nodes may be switched off: cluster.sh says so."""
    return Path(os.environ.get("SLURMLAB_DIR", os.devnull), "cluster.vars").is_file()


def control(*arguments: str, seconds: float = 60) -> str:
    return call("bash", str(CLUSTER), *arguments, seconds=seconds)


def ranks(job: str) -> dict[int, int]:
    """rank -> process id, of the trainers that live. Nodes of our own cluster have their processes below this machine's."""
    home = f"SLURM_CONF={os.environ.get('SLURM_CONF', '')}".encode()
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        variables = _environment(int(entry.name))
        if f"SLURM_JOB_ID={job}".encode() not in variables or home not in variables or _is_helper(int(entry.name)):
            continue
        rank = next((v[13:] for v in variables if v.startswith(b"SLURM_PROCID=")), None)
        command = Path(f"/proc/{entry.name}/cmdline")
        if rank is not None and b"dsgpt.train\0" in _read(command) and b"python" in _read(command).split(b"\0")[0]:
            found[int(rank)] = int(entry.name)
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def signal_rank(job: str, rank: int, number: signal.Signals) -> None:
    os.kill(ranks(job)[rank], number)
