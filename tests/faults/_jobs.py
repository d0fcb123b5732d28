"""Real jobs that can be killed: two ranks with DeepSpeed, found in /proc by a mark, compared bit by bit. No entry itself.

    with Job(yaml) as job: job.kill_all()              # ranks, watchdogs, launcher: whatever carries the job's mark
    differences(folder, Reference.of(other_folder))    # empty where both runs logged and saved the same bits

A mark in the environment is inherited by every process of a job, so nothing is overlooked whatever its command line is.
Trade-off: ranks are started as plain processes, as srun does it, which is faster and harder than with a launcher: nobody
but they and their watchdogs can end the job. `launcher=True` starts `dsgpt train` instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import commit
from dsgpt.process import free_port
from dsgpt.train.state import read_metrics

MARK, WORLD_SIZE = "DSGPT_FAULTS_JOB", 2
NO_PROGRESS = 93
HANG_SECONDS, SAVE_INTERVAL, MAX_STEPS = 8, 4, 40
# Dropout, accumulation (16 = 2 ranks x 4 x 2), warmup and cosine, more than two epochs: faults of any of them show.
SETTINGS = {
    "training.max_steps": MAX_STEPS,
    "checkpoint.save_interval": SAVE_INTERVAL,
    "checkpoint.keep_last": 2,
    "run.hang_timeout_seconds": HANG_SECONDS,
}
COMPARED = ("loss", "learning_rate", "gradient_norm", "data_crc", "consumed_samples")
# A disk that takes its time makes every gap between two calls of a save as long as the others.
RANK = """
import os, sys, time
from dsgpt.train.worker import main

def slow(descriptor, fsync=os.fsync, seconds=float(os.environ["FSYNC_SECONDS"])):
    time.sleep(seconds / 2)
    fsync(descriptor)
    time.sleep(seconds / 2)

os.fsync = slow
sys.exit(main(sys.argv[1:]))
"""


class Job:
    """One start of a run, with `topology` = (ranks, DeepSpeed config). Leaving the context kills what is left of it."""

    def __init__(
        self,
        yaml: Path,
        launcher: bool = False,
        fsync_seconds: float = 0.0,
        command: list[str] | None = None,
        topology: tuple[int, str] | None = None,
    ):
        world_size = topology[0] if topology else WORLD_SIZE
        arguments = [str(yaml), *([f"deepspeed={topology[1]}"] if topology else [])]
        self.mark, self.launcher = secrets.token_hex(8), launcher
        self.began = time.monotonic()
        self.log = yaml.with_name(f"{yaml.stem}-{self.mark}.log")
        rank_command = command or [sys.executable, "-c", RANK, *arguments]
        environment = {
            **os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            "FSYNC_SECONDS": str(fsync_seconds), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DSGPT_ATTEMPT": f"start-{self.mark}"}
        group |= {"WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size)}
        with self.log.open("wb") as log:
            if launcher:
                supervisor = [sys.executable, "-m", "dsgpt", "train", *arguments, "--num-processes", str(world_size)]
                self.processes = [subprocess.Popen(supervisor, stdout=log, stderr=log, env=environment)]
            else:
                self.processes = [
                    subprocess.Popen(
                        rank_command,
                        stdout=log,
                        stderr=log,
                        env={**environment, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
                    for rank in range(world_size)
                ]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_all()
        for process in self.processes:
            process.wait()

    @property
    def age(self) -> float:
        return time.monotonic() - self.began

    def pids(self) -> list[int]:
        """Living processes that carry the mark."""
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal() and f"{MARK}={self.mark}".encode() in _environment(int(entry.name)):
                found.append(int(entry.name))
        return found

    def ranks(self) -> dict[int, int]:
        """rank -> process id, of those that exist already."""
        found = {}
        for pid in self.pids():
            rank = next((v[5:] for v in _environment(pid) if v.startswith(b"RANK=")), None)
            if rank is not None and not _is_helper(pid):
                found[int(rank)] = pid
        return found

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """As a node without power: everything, and what was being started meanwhile."""
        while pids := self.pids():
            for pid in pids:
                self.kill(pid)
            for process in self.processes:
                process.poll()

    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def wait_until_gone(self, seconds: float) -> list[int]:
        """Processes that are left after at most so many seconds."""
        until = time.monotonic() + seconds
        while (self.is_running() or self.pids()) and time.monotonic() < until:
            time.sleep(0.05)
        return self.pids()

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def output(self) -> str:
        return self.log.read_text("utf-8", errors="replace")


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _is_helper(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
    helpers = (b"dsgpt.watchdog", b"deepspeed.launcher", b"dsgpt.checkpoint.writer")
    return any(name in command for name in helpers)


# ---- what a run left ------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, without one that a death cut short."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(text))
    return found


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder / "events.jsonl") if line["event"] == name]


def acknowledged(folder: Path) -> int:
    """The newest step that was ever reported as committed; 0 of none."""
    return max((int(event["step"]) for event in events(folder, "committed")), default=0)


def newest_commit(folder: Path) -> int:
    committed = commit.list_committed(folder / "checkpoints")
    return committed[-1][0] if committed else 0


def bits(line: dict[str, Any]) -> list[str]:
    keys = [*COMPARED, *(["loss_scale"] if "loss_scale" in line else [])]
    return [float("nan" if line[key] is None else line[key]).hex() for key in keys]


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: the bits of every step, the hashes of its last partition files; and how long things took."""

    steps: dict[int, list[str]]
    hashes: dict[str, str]
    startup_seconds: float = 8.0
    step_seconds: float = 0.1
    save_seconds: float = 0.2

    @classmethod
    def of(cls, folder: Path, startup_seconds: float = 8.0) -> Reference:
        metrics = read_metrics(folder / "metrics.jsonl")
        steps = {line["step"]: bits(line) for line in metrics}
        per_step = (metrics[-1]["time"] - metrics[0]["time"]) / max(1, len(metrics) - 1)
        save = max((event["seconds"] for event in events(folder, "committed")), default=0.2)
        return cls(steps, _hashes(folder), startup_seconds, per_step, save)


def _hashes(folder: Path) -> dict[str, str]:
    """Of the newest checkpoint's partition files, computed anew."""
    ((_, newest), *_) = reversed(commit.list_committed(folder / "checkpoints"))
    return {path.name: commit.hash_file(path) for path in sorted(newest.glob("rank-*"))}


def differences(folder: Path, reference: Reference) -> list[str]:
    """What a finished run logged or saved otherwise than the undisturbed one, also in steps it did twice."""
    found = []
    counted = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
    if counted != [*reference.steps]:
        found.append(f"the steps that count are {counted}")
    for line in lines_of(folder / "metrics.jsonl"):
        if "step" in line and bits(line) != reference.steps.get(line["step"]):
            found.append(
                f"step {line['step']} of {line['attempt']}: {bits(line)}, not {reference.steps.get(line['step'])}"
            )
    if newest_commit(folder) != max(reference.steps):
        found.append(f"the newest commit is {newest_commit(folder)}")
    elif _hashes(folder) != reference.hashes:
        found.append(f"the last partitions are {_hashes(folder)}, not {reference.hashes}")
    return found


# ---- what a run needs -----------------------------------------------------------------------------------------------


def undisturbed(yaml: Path, folder: Path, fsync_seconds: float = 0.0) -> Reference:
    """Run a job to its end and keep what it left."""
    began = time.time()
    with Job(yaml, fsync_seconds=fsync_seconds) as job:
        job.wait_until_gone(600)
        if job.codes() != [0] * len(job.processes):
            raise RuntimeError(f"the undisturbed run ended with {job.codes()}:\n{job.output()[-3000:]}")
    return Reference.of(folder, read_metrics(folder / "metrics.jsonl")[0]["time"] - began)
