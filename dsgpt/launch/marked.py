"""A command whose every process can be found and killed at once, as a node without power would end it. Torch-free.

    job = MarkedJob([sys.executable, "-m", "dsgpt", "train", ...], log_file, ranks=2)
    job.kill()                  # SIGKILL to the command, the launcher, ranks, watchdogs and writers, wherever they are by now

A mark in the environment is inherited by all of them, whatever session or parent they have; killing the launcher alone
would let the ranks commit and leave. Trade-off: it needs /proc, and sees the processes of this node: a job on several nodes
is killed by calling the same on each.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from dsgpt.launch.hardware import detect
from dsgpt.process import die_with_parent

_MARK = "DSGPT_MARKED_JOB"
_POLL_SECONDS = 0.02


class MarkedJob:
    """Starts the command with its output in `log_file`. GPUs beyond `ranks` are hidden from it, one rank has one GPU."""

    def __init__(self, command: Sequence[str], log_file: Path, ranks: int | None = None):
        self.mark = f"{_MARK}={secrets.token_hex(8)}".encode()
        self.log_file = log_file
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(self.mark.decode(), ranks),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def __enter__(self) -> MarkedJob:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def poll(self) -> int | None:
        """The command's exit code, None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Return when nothing of the job is left alive, nor what was being started meanwhile."""
        while pids := self._pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(_POLL_SECONDS)  # a GPU's memory is given back before the process is gone
        if self._process.poll() is None:  # a system without /proc: at least the command, whose launcher follows it
            self._process.kill()
        self._process.wait()

    def _pids(self) -> list[int]:
        """Living processes that carry the mark, ranks before those who would tell them of a death."""
        pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
        return sorted((pid for pid in pids if self.mark in _environment_of(pid)), reverse=True)


def _environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _environment(mark: str, ranks: int | None) -> dict[str, str]:
    name, _, value = mark.partition("=")
    environment = {**os.environ, name: value}
    # What is started here is always new: the count of a requeued job would make it look for an earlier start.
    environment.pop("SLURM_RESTART_COUNT", None)
    gpus = detect().num_gpus
    if ranks and ranks < gpus:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:ranks])
    return environment
