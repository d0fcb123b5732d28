"""What every process of a run needs from the operating system: stop requests, parents, ports, names. Torch-free.

Being asked to stop: SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set a flag that the training loop reads between steps. Saving
inside a signal handler would deadlock collectives and could interrupt a save; a flag cannot. The handlers must be in place
before the slow imports of a worker start: until then the default action of these signals is death.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from dsgpt.errors import ExitCode

_PR_SET_PDEATHSIG = 1
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8  # of mallopt(3)
# One request often arrives twice within moments, from the terminal and from a launcher that passes it on.
SECOND_REQUEST_SECONDS = 3.0
# What a scheduler sends ahead of time, as often as it likes.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *WARNINGS)
_LAUNCHER_POLL_SECONDS = 1.0
# How long a rank may still need, after its launcher is gone, to finish a step and commit.
_ORPHAN_SECONDS = 300.0


def die_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent dies, so that no orphan keeps computing."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the launcher's own clean-up remains
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, and end at once where that has happened already."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the end of its input ends it
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def rank_of_environment() -> int:
    """This process's rank as a launcher tells it, before anything else is known."""
    text = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdecimal() else 0


def scheduler_job(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """(what SLURM's commands call this job, how often it was requeued); ("", 0) outside one.

    An array task is a job of its own, though its number may be that of the whole array; the parts of a heterogeneous job
    are one.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    job = environment.get("SLURM_HET_JOB_ID") or environment.get("SLURM_JOB_ID", "")
    job = f"{array}_{task}" if array and task else job
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    return job, int(restarts) if job and restarts.isdecimal() else 0


def host_name() -> str:
    """This host as SLURM calls it, which its commands know; outside SLURM its own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def attempt_of_environment() -> str:
    """The name that whoever started this job gave to this start of the run, "" where nobody did."""
    return os.environ.get("DSGPT_ATTEMPT", "")


def log_dir_of_environment() -> Path | None:
    """The folder logs/<attempt> of this start, where whoever started the job has made it."""
    folder = Path(os.environ.get("DSGPT_LOG_DIR", ""))
    return folder if os.environ.get("DSGPT_LOG_DIR") and folder.is_dir() else None


def process_age() -> float:
    """Seconds since the kernel started this process; 0 where it does not tell."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def batch_phases() -> list[tuple[str, float]]:
    """What the batch script did before it started the ranks, and when each part began: DSGPT_PHASES="name=epoch,..."."""
    found = []
    for part in os.environ.get("DSGPT_PHASES", "").split(","):
        name, _, began = part.strip().rpartition("=")
        with contextlib.suppress(ValueError):  # a line for people: nothing may fail for it
            found.append((name[:40], float(began)))
    return [one for one in found if one[0]]


def tune_allocator() -> None:
    """On a CPU: blocks of 8 MiB and more go back to the system when they are freed, smaller ones stay, in one heap (glibc).

    By itself glibc learns to keep blocks of up to 32 MiB, and gives the end of the heap back after every step, to fault it
    in again in the next: measured on a 9M-parameter model, 3 % of the peak memory and 4 % of the speed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 8 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_ARENA_MAX, 1)


def complain(text: str) -> None:
    """To stderr, which may be a closed pipe or a log on a full disk: that must change nothing else."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_once(path: Path, text: str) -> bool:
    """Create a file whole, or not at all; False when it is there already. Raises OSError where it cannot be written.

    Of any number of processes on any hosts exactly one succeeds.
    """
    tmp = path.with_name(f".tmp-{path.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        tmp.write_text(text, "utf-8")
        try:
            os.link(tmp, path)
        except FileExistsError:
            return tmp.stat().st_nlink == 2  # it was this call: a network file system repeats what it got no answer to
        except OSError:  # a file system without hard links: there, for a moment, it may be seen half written
            with path.open("x", encoding="utf-8") as file:
                try:
                    file.write(text)
                    file.flush()
                except OSError:
                    path.unlink()
                    raise
        return True
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()


def new_attempt() -> str:
    """A name for one start of a run: sortable by time, unique between starts in the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def is_ignored_hangup(number: signal.Signals) -> bool:
    """Whether `nohup` asked this process to outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class StopRequest:
    """`requested` says why (a signal's name, a control file, a launcher that is gone), or is empty.

    The same SIGINT or SIGTERM again after some seconds is a person losing patience: the process ends at once, which loses
    nothing, because only whole checkpoints are ever visible. Until `patient` is set, when the ranks have met, nobody could
    commit anything yet: SIGTERM and its like end the process at once, instead of after a launcher's patience of 30 s.

    Under a `scheduler` that starts the ranks itself there is no person: it repeats SIGTERM before it kills, and all ranks
    leave together, also from a start.
    """

    def __init__(self) -> None:
        self.requested = os.environ.get("DSGPT_STOP_ASKED", "")
        self.patient = self.scheduler = False
        self._control_file: Path | None = None
        self._first: dict[int, float] = {}

    def install(self, scheduler: bool = False) -> None:
        self.patient = self.scheduler = scheduler
        for number in STOP_SIGNALS:
            if not is_ignored_hangup(number):
                signal.signal(number, self._handle)

    def watch(self, control_file: Path) -> None:
        """Also stop when this file appears: the supervisor's way to ask all nodes without a signal. For one rank."""
        self._control_file = control_file

    def watch_launcher(self) -> None:
        """Also stop when the parent or its parent ends: DeepSpeed's launchers can die without telling their workers.

        A rank that cannot reach the end of a step by itself any more leaves after some minutes.
        """
        ancestors = _ancestors()

        def look() -> None:
            while _ancestors() == ancestors:
                time.sleep(_LAUNCHER_POLL_SECONDS)
            self.requested = self.requested or "the launcher is gone"
            time.sleep(_ORPHAN_SECONDS)
            os._exit(int(ExitCode.INFRASTRUCTURE))

        threading.Thread(target=look, daemon=True, name="dsgpt-launcher").start()

    def poll(self) -> bool:
        """`is_asked`, once a step."""
        return self.is_asked()

    def is_asked(self) -> bool:
        if not self.requested and self._control_file is not None:
            with contextlib.suppress(OSError):  # a stale file system view is not a reason to stop
                if self._control_file.exists():
                    self.requested = self._control_file.read_text("utf-8").strip() or self._control_file.name
        return bool(self.requested)

    def _handle(self, number: int, frame: object) -> None:
        if not self.patient and number not in WARNINGS:
            os._exit(int(ExitCode.INFRASTRUCTURE))
        if not self.scheduler and is_second_request(self._first, number):
            os._exit(128 + number)
        self.requested = self.requested or signal.Signals(number).name


def is_second_request(first: dict[int, float], number: int) -> bool:
    """Whether this SIGINT or SIGTERM repeats an earlier one on purpose; remembers the first of each kind in `first`.

    A scheduler's warning is none, however often it comes.
    """
    began = first.setdefault(number, time.monotonic())
    return number not in WARNINGS and time.monotonic() - began >= SECOND_REQUEST_SECONDS


def _ancestors() -> tuple[int, int]:
    """The parent's process id, and its parent's where the parent is DeepSpeed's launcher (else 0).

    Only there does the grandparent matter: the `deepspeed` command. Elsewhere it may be a daemon that restarts.
    """
    parent = os.getppid()
    try:
        if b"deepspeed" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent, 0
        # pid (command) state ppid …; the command may hold anything, so look after its closing bracket.
        return parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return parent, 0
