"""Runs Python as gloo ranks on the CPU and tells the largest resident size of each.

The ranks are children of this process, so the kernel's own account of each (`ru_maxrss` of wait4) covers its whole life:
imports, training, saving and exit, the same for whatever runs in them. It cannot be below this process' own size at the
start of a rank, which therefore has to stay far below theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsgpt.process import free_port
from tests.benchmarks._anonymous import anonymous_bytes

NUM_RANKS = 2
GIVE_UP_SECONDS = 900
_CPU_ONLY = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass
class Watch:
    """What is sampled of all ranks together while they run.

    `anonymous`: the most that one of them held of what no file backs, in bytes.
    """

    anonymous: int = 0
    _times: list[float] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)

    def look(self, pids: Sequence[int]) -> None:
        seconds = 0.0
        for pid in pids:
            self.anonymous = max(self.anonymous, anonymous_bytes(pid))
            times = Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rpartition(")")[2].split()
            seconds += (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        self._times.append(time.time())
        self._seconds.append(seconds)

    def processor_seconds(self, start: float, stop: float) -> float:
        """Spent by all ranks between two times; other jobs on the machine hardly change it."""
        before, after = np.interp([start, stop], self._times, self._seconds)
        return float(after - before)


def run_ranks(arguments: Sequence[str], log: Path, watch: Watch | None = None) -> list[int]:
    """Run `python arguments` on all ranks with one thread each; peak resident bytes of each rank.

    Raises RuntimeError with the end of the log where a rank fails or takes longer than GIVE_UP_SECONDS.
    """
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(NUM_RANKS),
        "LOCAL_SIZE": str(NUM_RANKS),
        "LOCAL_WORLD_SIZE": str(NUM_RANKS),
        # What is compiled at run time goes with the run's folder.
        "TORCHINDUCTOR_CACHE_DIR": str(log.parent / "compiled"),
    }
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(NUM_RANKS)]
    return _run(arguments, log, environments, watch)


def peak_of(arguments: Sequence[str], log: Path) -> int:
    """Run `python arguments` alone; its peak resident bytes."""
    return _run(arguments, log, [{}])[0]


def _run(
    arguments: Sequence[str], log: Path, environments: Sequence[Mapping[str, str]], watch: Watch | None = None
) -> list[int]:
    processes = []
    try:
        with log.open("wb") as file:
            for extra in environments:
                environment = {**os.environ, **_CPU_ONLY, **extra}
                command = [sys.executable, *arguments]
                processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
                )
        return _wait(processes, watch)
    except RuntimeError as error:
        raise RuntimeError(f"{error}:\n{log.read_text('utf-8', errors='replace')[-3000:]}") from None
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], watch: Watch | None) -> list[int]:
    peaks: dict[int, int] = {}
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while len(peaks) < len(processes):
        if watch and not peaks:
            watch.look([process.pid for process in processes])
        for rank, process in enumerate(processes):
            if rank in peaks:
                continue
            found, status, usage = os.wait4(process.pid, os.WNOHANG)
            if found:
                process.returncode = os.waitstatus_to_exitcode(status)
                peaks[rank] = usage.ru_maxrss * 1024
                if process.returncode:
                    raise RuntimeError(f"rank {rank} ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"not finished after {GIVE_UP_SECONDS} s")
        time.sleep(0.03 if watch else 0.1)
    return [peaks[rank] for rank in sorted(peaks)]
