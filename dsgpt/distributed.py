"""Ranks, devices and agreements of one worker process.

`start()` reads the launcher's environment (the `deepspeed` launcher and torchrun set RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT), opens the process group (NCCL on GPUs, gloo on CPUs) and returns `World`, which the floors
above hand around instead of reading the environment. All small agreements between ranks go through `World`.

Growth: every collective here is a reduction or gather of a few bytes per rank; none is O(world size) in time on rank 0
except `gather_objects`, which is used once per checkpoint.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsgpt.errors import ConfigError, LockedError, PeerError
from dsgpt.lease import Lease, Owner
from dsgpt.process import complain, die_with_parent, free_port, new_attempt, write_once

_TIMEOUT_SECONDS = 1800.0


@dataclass
class World:
    """This process among all: rank, local rank, size, device, and the agreements between ranks."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: str = field(default_factory=socket.gethostname)
    attempt: str = "0"
    job: str = ""  # the scheduler's id of the job, "" outside one, and how often it was requeued
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks, in double precision."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank (a small JSON-like object)."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def gather_objects(self, value: Any) -> list[Any] | None:
        """All ranks' values, in rank order, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size if self.is_main else None
        dist.gather_object(value, gathered, dst=0)
        return gathered

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, error: BaseException | None, what: str) -> None:
        """Raise on every rank when any rank failed at `what`: its own error where there is one."""
        (failed,) = self.max(float(error is not None))
        if error is not None:
            raise error
        if failed:
            raise PeerError(f"another rank failed: {what}", do="its message is in the log of its node")

    def require_folder(self, error: LockedError | None) -> None:
        """Raise rank 0's error on every rank: before there is a verdict to read, each needs the code of the contract."""
        refused = self.broadcast_object(error and error.problems)
        if refused:
            raise LockedError(problems=refused)


def start(device: str, timeout_seconds: float = _TIMEOUT_SECONDS, meet_seconds: float = _TIMEOUT_SECONDS) -> World:
    """Join the process group described by the environment; `device` is "cpu" or "cuda". Raises ConfigError.

    Ranks that do not come fail after `meet_seconds` (torch tries twice to reach rank 0), collectives that do not end
    after `timeout_seconds`.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if not 0 <= rank < size:
        raise ConfigError("RANK and WORLD_SIZE disagree", seen=f"RANK={rank} WORLD_SIZE={size}")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local_rank)):
        os.environ.setdefault(name, str(value))
    torch_device = torch.device("cpu")
    if device == "cuda":
        torch_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(torch_device)
    die_with_parent()
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=meet_seconds)))
        backend, timeout = "nccl" if device == "cuda" else "gloo", datetime.timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    world = World(rank, local_rank, size, local_size, torch_device)
    world.job, world.restarts = scheduler_job()
    attempt = os.environ.get("DSGPT_ATTEMPT") or new_attempt()
    world.attempt = world.broadcast_object(attempt)
    told = os.environ.get("DSGPT_TELL_ATTEMPT")  # of a supervisor that is not rank 0's, and looks for its verdict
    if told and local_rank == 0:
        with contextlib.suppress(OSError):
            write_once(Path(told), world.attempt + "\n")
    return world


@contextlib.contextmanager
def folder_lease(folder: Path, world: World) -> Iterator[Lease | None]:
    """Hold the run folder for this job; rank 0 has the lease. A second job gets LockedError on all its ranks."""
    error, lease = None, None
    if world.is_main:
        try:
            owner = Owner.of_this_process(world.attempt, world.job, world.restarts)
            lease = Lease.acquire(folder, owner, say=complain)
        except LockedError as problem:
            error = problem
    try:
        world.require_folder(error)
        yield lease
    finally:
        if lease is not None:
            lease.release()


def scheduler_job() -> tuple[str, int]:
    """(id of the scheduler's job, how often it was requeued); ("", 0) outside one. An array task is a job of its own."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return job, int(restarts) if job and restarts.isdecimal() else 0


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def set_deterministic(threads: int | None = None) -> None:
    """Same inputs, same bits: no autotuned kernels. `threads` limits CPU ranks to their share of the cores."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if threads:
        torch.set_num_threads(threads)
