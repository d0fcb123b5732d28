"""Starting a training job: the real `deepspeed` launcher as a child, watched until it ends.

The child runs in its own session, so Ctrl-C reaches only us; we pass a stop on through a file in the run folder that rank
0 reads between steps. (DeepSpeed's launcher would end its workers one after another, and kill them after 30 s.) Its
output goes to `logs/<attempt>/<node>.log`; what a person sees comes from the run's own metrics and events.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsgpt.errors import ExitCode, LockedError
from dsgpt.launch.follow import Follower
from dsgpt.process import die_with_parent, free_port, new_attempt

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """One start of a run on this node: `arguments` are the YAMLs and key=value of `dsgpt train`."""

    arguments: Sequence[str]
    output_dir: Path
    num_processes: int
    device: str
    threads_per_process: int
    debug: bool = False


@dataclass(frozen=True)
class JobEnd:
    """`exit_code` is one of the contract; `message` says why, for a person."""

    exit_code: int
    message: str
    log_file: Path


def launch_command(job: Job, environment: Mapping[str, str] | None = None) -> list[str]:
    """DeepSpeed's launcher for this node, as an argument list: nothing passes through a shell.

    It is called without the `deepspeed` command in front, which would look for a hostfile, import DeepSpeed once more and
    leave the launcher behind as an orphan when it is killed.
    """
    visible = (environment or os.environ).get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices: list[Any] = list(range(job.num_processes))
    if job.device == "cuda" and len(visible) >= job.num_processes and visible[0]:
        devices = visible[: job.num_processes]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
        "--no_local_rank",
        "--module",
        "dsgpt.train",
        *job.arguments,
        *(["--debug"] if job.debug else []),
    ]


def run_job(job: Job, follower_for: Callable[[Path, str], Follower]) -> JobEnd:
    """Start the job, show its progress, pass stops on, and say how it ended."""
    attempt = new_attempt()
    log_dir = job.output_dir / "logs" / attempt
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LockedError(
            "the run folder cannot be written", seen=str(error), do="choose another run.output_dir"
        ) from error
    log_file = log_dir / f"{socket.gethostname()}.log"
    follower = follower_for(job.output_dir, attempt)
    with log_file.open("wb") as log, _StopForwarder(log_dir) as stopper:
        process = subprocess.Popen(
            launch_command(job),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(job, attempt),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        stopper.process_group = process.pid
        with follower:
            while process.poll() is None:
                follower.poll()
                time.sleep(_POLL_SECONDS)
            follower.poll()
    return _end_of(log_dir, log_file, process.returncode)


def _environment(job: Job, attempt: str) -> dict[str, str]:
    environment = {**os.environ, "DSGPT_ATTEMPT": attempt, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(job.threads_per_process))
    if job.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


class _StopForwarder:
    """First SIGINT or SIGTERM: ask the run to commit and stop. Second: kill the whole job at once."""

    def __init__(self, log_dir: Path):
        self.request_file = log_dir / "stop-request"
        self.process_group: int | None = None
        self._count = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> _StopForwarder:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: object) -> None:
        self._count += 1
        name = signal.Signals(number).name
        if self._count == 1:
            self.request_file.write_text(name + "\n", encoding="utf-8")
            print(
                f"\n{name}: the run commits its current step and stops (again: stop at once)",
                file=sys.stderr,
                flush=True,
            )
        elif self.process_group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process_group, signal.SIGKILL)
            os._exit(128 + number)


def _end_of(log_dir: Path, log_file: Path, returncode: int) -> JobEnd:
    """The cause from the files the ranks left: the launcher's own code can be any rank's, or a signal's."""
    ends = []
    for path in sorted(log_dir.glob("end-rank-*.json")):
        try:
            ends.append(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError):
            continue
    # A rank that only saw its peer vanish says 76; the rank that knows the cause says something else.
    telling = [end for end in ends if end["exit_code"] not in (ExitCode.DONE, ExitCode.INFRASTRUCTURE)]
    chosen = telling or [end for end in ends if end["exit_code"] != ExitCode.DONE]
    if chosen:
        return JobEnd(chosen[0]["exit_code"], chosen[0]["message"], log_file)
    if returncode == 0 and ends:
        return JobEnd(0, "", log_file)
    if 0 < returncode < 128 and not ends and returncode in list(ExitCode):
        return JobEnd(returncode, "\n".join(_tail(log_file)), log_file)
    message = f"the job ended without a verdict (launcher code {returncode}); the end of {log_file}:"
    return JobEnd(ExitCode.INFRASTRUCTURE, "\n".join([message, *_tail(log_file)]), log_file)


def _tail(path: Path, lines: int = 20) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
