"""Ranks, devices and agreements of one worker process.

`start()` reads the launcher's environment (the `deepspeed` launcher and torchrun set RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT), opens the process group (NCCL on GPUs, gloo on CPUs) and returns `World`, which the floors
above hand around instead of reading the environment. All small agreements between ranks go through `World`.

Growth: every collective here is a reduction or gather of a few bytes per rank; none is O(world size) in time on rank 0
except `gather_objects`, which is used once per checkpoint. `collect` costs by the ranks that have something to say.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsgpt.errors import ConfigError, LockedError, PeerError
from dsgpt.lease import Lease, Owner
from dsgpt.process import (
    attempt_of_environment,
    complain,
    die_with_parent,
    free_port,
    host_name,
    new_attempt,
    scheduler_job,
    write_once,
)
from dsgpt.rendezvous import Place, RendezvousError, addresses_in, hosts_of, meet

_TIMEOUT_SECONDS = 1800.0


@dataclass
class World:
    """This process among all: rank, local rank, size, device, and the agreements between ranks."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: str = field(default_factory=host_name)
    attempt: str = "0"
    job: str = ""  # the scheduler's id of the job, "" outside one, and how often it was requeued
    restarts: int = 0
    place: Place | None = None  # where the ranks met, and the store they met in
    store: Any = None
    _collected: int = 0

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

    def broadcast_in_place(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

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

    def collect(self, value: Any | None) -> list[Any] | None:
        """The values (JSON) of the ranks that have one, on rank 0, in no order; None elsewhere.

        Through the store: ranks without one send nothing but their part in a barrier.
        """
        if self.size == 1:
            return [] if value is None else [value]
        self._collected += 1
        key = f"collect/{self._collected}"
        if value is not None:
            self.store.append(key, json.dumps(value) + "\n")
            self.store.add(f"{key}/n", 1)  # its answer says that the line has arrived
        (number,) = self.sum(float(value is not None))
        if not self.is_main:
            return None
        return [json.loads(line) for line in self.store.get(key).decode().splitlines()] if number else []

    def host_of(self, rank: int) -> str:
        """The host of another rank, as it told when the ranks met."""
        return self.host if rank == self.rank or self.store is None else hosts_of(self.store, [rank])[0]

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


def start(
    device: str,
    timeout_seconds: float = _TIMEOUT_SECONDS,
    meet_seconds: float = _TIMEOUT_SECONDS,
    expected_hosts: Sequence[str] = (),
) -> World:
    """Join the process group described by the environment; `device` is "cpu" or "cuda". Raises ConfigError.

    Raises RendezvousError, which names the ranks and hosts that did not come, after `meet_seconds`; collectives that do
    not end fail after `timeout_seconds`. `expected_hosts` are those of the scheduler's allocation, where that is known.
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
        # SLURM can bind every rank to a GPU of its own, which each then sees as the only one of the step's.
        bound = torch.cuda.device_count() == 1 and "," in os.environ.get("SLURM_STEP_GPUS", "")
        torch_device = torch.device("cuda", 0 if bound else local_rank)
        torch.cuda.set_device(torch_device)
    die_with_parent()
    world = World(rank, local_rank, size, local_size, torch_device)
    world.job, world.restarts = scheduler_job()
    world.place = Place(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        rank,
        size,
        world.host,
        agent=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
    if not dist.is_initialized():
        world.store = meet(world.place, meet_seconds, expected_hosts)
        _connect(world, "nccl" if device == "cuda" else "gloo", timeout_seconds)
    attempt = attempt_of_environment() or new_attempt()
    world.attempt = world.broadcast_object(attempt)
    told = os.environ.get("DSGPT_TELL_ATTEMPT")  # of a supervisor that is not rank 0's, and looks for its verdict
    if told and local_rank == 0:
        with contextlib.suppress(OSError):
            write_once(Path(told), world.attempt + "\n")
    return world


def _connect(world: World, backend: str, seconds: float) -> None:
    """Open the process group: gloo connects every rank with every other, and says of a failure only an address."""
    try:
        timeout = datetime.timedelta(seconds=seconds)
        store = dist.PrefixStore("group", world.store)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
        settings = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise RendezvousError(
            f"rank {world.rank} on {world.host} met the others at {world.place}, but {backend} could not connect to "
            f"{', '.join(addresses_in(str(error))) or 'them'}",
            seen=f"{str(error).strip().splitlines()[0]} {settings}".strip(),
            do="name the interface that connects the nodes in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, on all nodes",
        ) from error


@contextlib.contextmanager
def folder_lease(
    folder: Path, world: World, on_lost: Callable[[str], None] = lambda text: None
) -> Iterator[Lease | None]:
    """Hold the run folder for this job; rank 0 has the lease. A second job gets LockedError on all its ranks.

    `on_lost` is called in a thread of rank 0 when a later job has taken the folder over.
    """
    error, lease = None, None
    if world.is_main:
        try:
            owner = Owner.of_this_process(world.attempt, world.job, world.restarts)
            lease = Lease.acquire(folder, owner, say=complain, on_lost=on_lost)
        except LockedError as problem:
            error = problem
    try:
        world.require_folder(error)
        yield lease
    finally:
        if lease is not None:
            lease.release()


def last_barrier() -> None:
    """Wait until every rank has come this far; nothing where the ranks never met, or left already."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def set_deterministic(threads: int | None = None) -> None:
    """Same inputs, same bits: no autotuned kernels. `threads` limits CPU ranks to their share of the cores."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if threads:
        torch.set_num_threads(threads)
