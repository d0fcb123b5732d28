"""Starting a training job: the real `deepspeed` launcher as a child, or one on each of several hosts, watched to the end.

The children run in their own sessions, so Ctrl-C reaches only us; we pass a stop on through a file in the run folder that
rank 0 reads between steps. (DeepSpeed's launcher would end its workers one after another, and kill them after 30 s.) Their
output goes to `logs/<attempt>/<node>.log`; what a person sees comes from the run's own metrics and events. How the job
ended is what the verdict says; codes of launchers, ssh and pdsh are only told where there is none.
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
from dsgpt.launch.carried import Carried, carried_environment
from dsgpt.launch.follow import Follower
from dsgpt.launch.remote import Remote, commands, transport_environment, write_hostfile
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
# How long ranks on other hosts may take to notice that a host has gone, and to leave. A save may be under way.
PEERS_SECONDS = 60.0
FAILED_SECONDS = 10.0
END_SECONDS = 40.0  # a host's part kills its ranks 30 s after it was told to stop
_KILL_SECONDS = 3.0
RUNNING = "running-{}"  # in the logs while the launcher of a host, by its number, lives
ATTEMPT_FILE = "attempt"  # in the logs of a start that joined another one: that one's name


@dataclass(frozen=True)
class Job:
    """One start of a run, on this node or on those of `remote`: `arguments` are the YAMLs and key=value of `dsgpt train`."""

    arguments: Sequence[str]
    output_dir: Path
    num_processes: int
    device: str
    threads_per_process: int
    debug: bool = False
    remote: Remote | None = None

    @property
    def is_joining(self) -> bool:
        """Whether another host's start leads: this one has neither the first rank nor, before the ranks met, its attempt."""
        return self.remote is not None and self.remote.node_rank > 0


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


def launch_commands(job: Job, attempt: str, log_dir: Path) -> dict[str, list[str]]:
    """What is started here: the name of a host or program -> its command."""
    if job.remote is None:
        return {socket.gethostname(): launch_command(job)}
    carried = Carried(
        [*job.arguments, *(["--debug"] if job.debug else [])],
        os.getcwd(),
        str(log_dir.absolute()),
        {node.host: list(node.slots) for node in job.remote.nodes},
        job.remote.master_addr,
        job.remote.master_port,
        carried_environment(_environment(job, attempt, log_dir)),
    )
    return commands(job.remote, carried, log_dir, os.environ)


def run_job(job: Job, follower_for: Callable[[Path, str], Follower]) -> JobEnd:
    """Start the job, show its progress, pass stops on, and say how it ended."""
    attempt = new_attempt()
    log_dir = job.output_dir / "logs" / attempt
    wanted = launch_commands(job, attempt, log_dir)
    if not job.is_joining:
        require_free(job.output_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    log_file = log_dir / ("launcher.log" if job.remote else f"{socket.gethostname()}.log")
    environment = _environment(job, attempt, log_dir)
    if job.remote is not None:
        write_hostfile(job.remote, log_dir)
        environment = transport_environment(job.remote, environment)
    follower = follower_for(job.output_dir, attempt)
    with log_file.open("ab") as log, _StopForwarder(log_dir) as stopper:
        for name, command in wanted.items():
            stopper.started[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE if job.remote else subprocess.DEVNULL,
                env=environment,
                cwd=log_dir if name == "mpirun" else None,  # its hostfile is there, whatever that path looks like
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        with follower:
            _watch(stopper.started, follower, log_dir)
            if job.remote is not None:
                _await_verdict(log_dir, any(process.returncode < 0 for process in stopper.started.values()))
            follower.poll()
    codes = {name: process.returncode for name, process in stopper.started.items()}
    end = _end_of(_joined(log_dir), log_file, codes)
    if read_verdict(_joined(log_dir)) is None:  # the ranks died before they knew where to write it
        record_verdict(log_dir, Verdict(end.exit_code, "no_verdict" if end.exit_code == 76 else "", end.message))
    return end


def _watch(started: Mapping[str, subprocess.Popen[bytes]], follower: Follower, log_dir: Path) -> None:
    """Return when all that was started has ended: a launcher can be killed alone, and its whole process group counts.

    Where one host's part is gone for long, or the verdict is there, and the others do not end, they are ended.
    """
    alive, first_gone, told = dict(started), None, None
    is_remote = any(process.stdin is not None for process in started.values())
    while alive:
        follower.poll()
        time.sleep(_POLL_SECONDS)
        for name, process in list(alive.items()):
            if process.poll() is not None and not group_is_alive(process.pid):
                del alive[name]
        verdict = read_verdict(_joined(log_dir)) if is_remote else None
        if not alive or (len(alive) == len(started) and verdict is None):
            continue
        now = time.monotonic()
        first_gone = first_gone or now
        if told is None and now - first_gone > _patience(log_dir, verdict):
            told = now
            gone = ", ".join(f"{name} ({started[name].returncode})" for name in started if name not in alive)
            message = f"the launcher ended on {gone}, and not on {', '.join(alive)}: stopped there"
            record_verdict(_joined(log_dir), Verdict(ExitCode.INFRASTRUCTURE, "launcher_died", message))
            for process in alive.values():
                _close(process)
                _kill(process, signal.SIGTERM)
        if told is not None and now - told > END_SECONDS:
            for process in alive.values():
                _kill(process, signal.SIGKILL)


def _patience(log_dir: Path, verdict: Verdict | None) -> float:
    """How long those that are left may take: little where a watchdog ends them anyway, or where no rank met another yet."""
    if verdict is None:
        have_met = any(_joined(log_dir).glob("stacks-rank-*"))
        return PEERS_SECONDS if have_met else FAILED_SECONDS
    return PEERS_SECONDS if verdict.exit_code in (ExitCode.DONE, ExitCode.PREEMPTED) else FAILED_SECONDS


def _await_verdict(log_dir: Path, was_killed: bool) -> None:
    """What carried the job is gone, and the ranks may not be: they are told so now, and commit. Wait for what they say."""
    until = time.monotonic() + PEERS_SECONDS
    while read_verdict(_joined(log_dir)) is None and time.monotonic() < until:
        if not was_killed and not list(log_dir.glob(RUNNING.format("*"))):
            return
        time.sleep(_POLL_SECONDS)


def _close(process: subprocess.Popen[bytes], last: bytes = b"") -> None:
    """End its standard input: on the other host the ranks stop, after the byte `K` at once."""
    with contextlib.suppress(OSError, ValueError):
        if process.stdin is not None:
            os.write(process.stdin.fileno(), last)
            process.stdin.close()


def _kill(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _joined(log_dir: Path) -> Path:
    """The logs of the start that this one takes part in: another one's, where another host leads."""
    with contextlib.suppress(OSError):
        return log_dir.with_name((log_dir / ATTEMPT_FILE).read_text("utf-8").strip() or log_dir.name)
    return log_dir


def group_is_alive(process_group: int) -> bool:
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


def _environment(job: Job, attempt: str, log_dir: Path) -> dict[str, str]:
    environment = {**os.environ, "DSGPT_ATTEMPT": attempt, "DSGPT_LOG_DIR": str(log_dir), "PYTHONUNBUFFERED": "1"}
    if job.remote is None:  # else each host counts its own cores
        environment.setdefault("OMP_NUM_THREADS", str(job.threads_per_process))
    if job.is_joining:
        environment["DSGPT_TELL_ATTEMPT"] = str((log_dir / ATTEMPT_FILE).absolute())
    if job.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


class _StopForwarder:
    """The first signal asks the run to commit and stop; SIGINT or SIGTERM again, seconds later, kills the job at once."""

    def __init__(self, log_dir: Path):
        self.log_dir = log_dir
        self.started: dict[str, subprocess.Popen[bytes]] = {}
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
        if is_second_request(self._first, number) and self.started:
            message = (
                f"{signal.Signals(number).name} twice: stopped at once; the same command continues from the last commit"
            )
            self._kill_all()
            record_verdict(_joined(self.log_dir), Verdict(128 + number, "stopped_at_once", message))
            complain(message)
            os._exit(128 + number)
        request_file = _joined(self.log_dir) / "stop-request"
        if request_file.exists():
            return
        name = signal.Signals(number).name
        try:
            request_file.write_text(name + "\n", encoding="utf-8")
        except OSError:  # a full disk: ask through the launcher instead, which passes SIGTERM on to its ranks
            for process in self.started.values():
                _kill(process, signal.SIGTERM)
        with contextlib.suppress(OSError):  # the terminal may be gone
            again = f"again after {SECOND_REQUEST_SECONDS:.0f} s: stop at once"
            print(f"\n{name}: the run commits its current step and stops ({again})", file=sys.stderr, flush=True)

    def _kill_all(self) -> None:
        """Here at once; on other hosts when the word has got there, which is why the way to them stays for a moment."""
        away = [process for process in self.started.values() if process.stdin is not None]
        for process in away:
            _close(process, b"K")
        until = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < until and any(_is_running(process) for process in away):
            time.sleep(_POLL_SECONDS)
        for process in self.started.values():
            _kill(process, signal.SIGKILL)


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    """Also inside a signal handler, where the interrupted code may hold the lock of `poll`."""
    return process.returncode is None and Path(f"/proc/{process.pid}").exists() and group_is_alive(process.pid)


def _end_of(log_dir: Path, log_file: Path, codes: Mapping[str, int]) -> JobEnd:
    """The cause from the verdict that ranks or watchdogs left; a launcher's own code can be any rank's, or a signal's."""
    verdict = read_verdict(log_dir)
    strange = ", ".join(
        f"{name} ended with {code}" for name, code in codes.items() if code and code not in list(ExitCode)
    )
    if verdict is not None:
        of_host = log_dir / f"{verdict.host}.log"
        said = verdict.message
        if log_file.name == "launcher.log" and verdict.exit_code == ExitCode.INFRASTRUCTURE and strange:
            said = "\n".join([said, strange, *_tail(log_file, 5)])  # ranks know who did not come, ssh knows why
        return JobEnd(verdict.exit_code, said, of_host if verdict.host and of_host.exists() else log_file)
    known = [code for code in codes.values() if code > 0 and code in list(ExitCode)]
    # Where one host could not start, the others only missed it.
    for code in sorted(known, key=lambda code: code == ExitCode.INFRASTRUCTURE):
        # Its ranks have said why, often all of them the same; what the launcher says of them is no part of it.
        lines = _tail(log_file, 40) or _tail(log_dir / f"{next(iter(codes))}.log", 40)
        return JobEnd(
            code, "\n".join(dict.fromkeys(line for line in lines if not _LAUNCHER_LINE.match(line))), log_file
        )
    told = f"launcher code {codes[next(iter(codes))]}"
    if len(codes) > 1 or log_file.name == "launcher.log":
        told = strange or "all ended with 0"
    message = f"the job ended without a verdict ({told}); the end of {log_file}:"
    hosts = [
        line for name in codes if (log_dir / f"{name}.log") != log_file for line in _tail(log_dir / f"{name}.log", 5)
    ]
    return JobEnd(ExitCode.INFRASTRUCTURE, "\n".join([message, *_tail(log_file), *hosts[:40]]), log_file)


def _tail(path: Path, lines: int = 20) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
