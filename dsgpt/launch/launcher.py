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
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsgpt.errors import ExitCode
from dsgpt.launch.follow import Follower
from dsgpt.lease import require_free
from dsgpt.process import (
    SECOND_REQUEST_SECONDS,
    STOP_SIGNALS,
    complain,
    die_with_parent,
    free_port,
    is_ignored_hangup,
    is_second_request,
    new_attempt,
)
from dsgpt.verdict import Verdict, read_verdict, record_verdict

_POLL_SECONDS = 0.1
_LAUNCHER_LINE = re.compile(r"\[\d{4}-[^\]]*\] \[[A-Z]+\] \[launch\.py:")


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

    def as_dict(self) -> dict[str, Any]:
        """For --json: with the run's folder and the last line of its metrics."""
        run = next((folder for folder in self.log_file.parents if (folder / "config.yaml").exists()), None)
        metrics = _tail(run / "metrics.jsonl", 1) if run else []
        last = json.loads(metrics[0]) if metrics and metrics[0].endswith("}") else {}
        shown = {key: last.get(key) for key in ("step", "max_steps", "loss", "tokens_per_second", "consumed_tokens")}
        ended = {"exit_code": self.exit_code, "message": self.message, "log_file": str(self.log_file)}
        return {**ended, "output_dir": str(run) if run else None, **shown}


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
    require_free(job.output_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
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
            # The launcher can be killed alone: the job has ended when its whole process group has.
            while process.poll() is None or _group_is_alive(process.pid):
                follower.poll()
                time.sleep(_POLL_SECONDS)
            follower.poll()
    end = _end_of(log_dir, log_file, process.returncode)
    if read_verdict(log_dir) is None:  # the ranks died before they knew where to write it
        record_verdict(log_dir, Verdict(end.exit_code, "no_verdict" if end.exit_code == 76 else "", end.message))
    return end


def _group_is_alive(process_group: int) -> bool:
    """Zombies do not count: the first process of a container often buries nobody."""
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(group) == process_group and state not in "ZX":
                return True
    return not Path("/proc/self/stat").exists()


def _environment(job: Job, attempt: str) -> dict[str, str]:
    log_dir = job.output_dir / "logs" / attempt
    told = {"DSGPT_ATTEMPT": attempt, "DSGPT_LOG_DIR": str(log_dir), "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **told}
    environment.setdefault("OMP_NUM_THREADS", str(job.threads_per_process))
    if job.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


class _StopForwarder:
    """The first signal asks the run to commit and stop; SIGINT or SIGTERM again, seconds later, kills the job at once."""

    def __init__(self, log_dir: Path):
        self.request_file = log_dir / "stop-request"
        self.process_group: int | None = None
        self._first: dict[int, float] = {}
        self._previous: dict[int, object] = {}

    def __enter__(self) -> _StopForwarder:
        for number in STOP_SIGNALS:
            if not is_ignored_hangup(number):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: object) -> None:
        if is_second_request(self._first, number) and self.process_group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process_group, signal.SIGKILL)
            message = (
                f"{signal.Signals(number).name} twice: stopped at once; the same command continues from the last commit"
            )
            record_verdict(self.request_file.parent, Verdict(128 + number, "stopped_at_once", message))
            complain(message)
            os._exit(128 + number)
        if self.request_file.exists():
            return
        name = signal.Signals(number).name
        try:
            self.request_file.write_text(name + "\n", encoding="utf-8")
        except OSError:  # a full disk: ask through the launcher instead, which passes SIGTERM on to its ranks
            if self.process_group is not None:
                os.killpg(self.process_group, signal.SIGTERM)
        with contextlib.suppress(OSError):  # the terminal may be gone
            again = f"again after {SECOND_REQUEST_SECONDS:.0f} s: stop at once"
            print(f"\n{name}: the run commits its current step and stops ({again})", file=sys.stderr, flush=True)


def _end_of(log_dir: Path, log_file: Path, returncode: int) -> JobEnd:
    """The cause from the verdict that ranks or watchdogs left; the launcher's own code can be any rank's, or a signal's."""
    verdict = read_verdict(log_dir)
    if verdict is not None:
        return JobEnd(verdict.exit_code, verdict.message, log_file)
    if 0 < returncode < 128 and returncode in list(ExitCode):
        # Its ranks have said why, often all of them the same; what the launcher says of them is no part of it.
        told = dict.fromkeys(line for line in _tail(log_file, 40) if not _LAUNCHER_LINE.match(line))
        return JobEnd(returncode, "\n".join(told), log_file)
    message = f"the job ended without a verdict (launcher code {returncode}); the end of {log_file}:"
    return JobEnd(ExitCode.INFRASTRUCTURE, "\n".join([message, *_tail(log_file)]), log_file)


def _tail(path: Path, lines: int = 20) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
