"""Whether the nodes of a job are alike: versions, drivers, clocks, memory, networks. Compared once, when the ranks have met.

    report = compare_nodes(world)                 # on every rank; raises ConfigError on all where they must not differ
    report.groups, report.warnings                # on rank 0

What must be equal (dsgpt, torch, deepspeed) ends all ranks with 78 and the names of the hosts; what should be equal, a clock
that is off and little memory are warnings. The clock's offset is known with a bound: nobody leaves an all-reduce before all
have entered it, so two clocks differ by no more than the time it takes.

Growth: every rank's facts are compared by one all-reduce of hashes, the clocks by a few more, in O(log ranks). Then the
first rank of each node sends one line of some 700 bytes to rank 0 (1,000 nodes: 0.7 MB, below a second); details of ranks
that differ are sent only by these. Nodes with equal facts are one entry of the record, their names written as ranges.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

import dsgpt
from dsgpt.distributed import World
from dsgpt.errors import ConfigError, Problem
from dsgpt.launch import hardware, network
from dsgpt.units import fold_names, format_bytes

MUST_BE_EQUAL = ("dsgpt", "torch", "deepspeed")
MAY_DIFFER = ("kernel", "cpus", "memory_bytes")
CLOCK_SECONDS = 5.0
MEMORY_PER_RANK, SHARED_MEMORY = 2 << 30, 512 << 20
_PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "numpy")
_ROUNDS = 4
_DETAILS, _TEXT = 20, 200  # of what one rank tells: at most so many keys, so many characters each


@dataclass
class NodesReport:
    """What rank 0 learned. `groups` are nodes with equal facts, the largest group first."""

    num_nodes: int = 0
    groups: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One line for people."""
        if not self.groups:
            return ""
        first = self.groups[0]
        parts = [f"python {first['python']}", f"torch {first['torch']}", f"deepspeed {first['deepspeed']}"]
        parts += [f"driver {first['driver']}"] if first.get("driver") else []
        alike = "all alike" if len(self.groups) == 1 else f"{len(self.groups)} kinds"
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes, {alike}"
        return f"nodes      {nodes}: {first['gpus'] or 'no GPU'}, {', '.join(parts)}"


def facts(world: World) -> dict[str, Any]:
    """What should be equal on all nodes."""
    found: dict[str, Any] = {"dsgpt": dsgpt.__version__, "python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    on_gpu = world.device.type == "cuda"
    properties = torch.cuda.get_device_properties(world.device) if on_gpu else None
    return found | {
        "driver": hardware.current_signs().driver or "" if on_gpu else "",
        "cuda": torch.version.cuda or "",
        "nccl": ".".join(str(number) for number in torch.cuda.nccl.version()) if on_gpu else "",
        "gpus": f"{world.local_size} x {properties.name}" if properties else "",
        "gpu_memory_bytes": properties.total_memory if properties else 0,
        "network": network.settings(),
        "kernel": platform.release(),
        "cpus": hardware.cpu_count(),
        "memory_bytes": hardware.memory_bytes(),
    }


def compare_nodes(
    world: World, own: Mapping[str, Any] | None = None, now: Callable[[], float] = time.time
) -> NodesReport:
    """Compare all ranks, gather the nodes on rank 0. Raises ConfigError, on all ranks alike, where some must not go on."""
    own = dict(own or facts(world))
    require_equal(world, {key: own[key] for key in MUST_BE_EQUAL}, "the software is not the same on all nodes",
                  "start all ranks from one environment (one path on a shared file system, or the same image)")  # fmt: skip
    warnings = _differences(world, {key: value for key, value in own.items() if key not in MAY_DIFFER})
    offset, bound = clock_offset(world, now)
    shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    place = world.place
    address, interface = network.route_to(place.address, place.port) if place and world.size > 1 else ("", "")
    measured = {
        "host": world.host,
        "address": address,
        "interface": interface,
        "clock_offset_seconds": round(offset, 6),
        "clock_bound_seconds": round(bound, 6),
        "available_memory_bytes": hardware.available_memory_bytes(),
        "shared_memory_bytes": shared.f_bavail * shared.f_frsize if shared else 0,
        "ranks": world.local_size,
    }
    nodes = world.collect([own, measured] if world.local_rank == 0 else None)
    if nodes is None:
        return NodesReport()
    measures = [one for _, one in nodes]
    return NodesReport(len(nodes), group(nodes), [*warnings, *judge(measures)])


# ---- comparing


def digest(value: Any) -> float:
    """48 bits of a hash: exact in the double precision that ranks compare numbers in."""
    text = json.dumps(value, sort_keys=True, default=str)
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


def is_equal(world: World, value: Any) -> bool:
    """Whether all ranks have the same value: one all-reduce of two numbers."""
    number = digest(value)
    low, high = world.max(-number, number)
    return -low == high


def differing(world: World, own: Mapping[str, Any]) -> list[tuple[str, str, Any, Any]]:
    """On rank 0, (hosts, key, value there, value on rank 0) for what differs from rank 0; on the others nothing.

    Costs one all-reduce where all is equal.
    """
    if is_equal(world, own):
        return []
    first = world.broadcast_object({key: _short(value) for key, value in own.items()})
    mine = {key: _short(value) for key, value in own.items()}
    keys = [key for key in sorted({*mine, *first}) if mine.get(key) != first.get(key)]
    told = world.collect([world.host, world.rank, {key: mine.get(key) for key in keys[:_DETAILS]}] if keys else None)
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for host, rank, values in told or []:
        for key, value in values.items():
            found.setdefault((key, json.dumps(value)), []).append((rank, host))
    rows = []
    for (key, value), where in found.items():
        hosts = fold_names(host for _, host in sorted(where))
        if all(host == world.host for _, host in where):  # on the node of rank 0 a host says too little
            hosts += f" (rank {fold_names(str(rank) for rank, _ in sorted(where)).strip('[]')})"
        rows.append((hosts, key, json.loads(value), first.get(key)))
    return rows


def require_equal(world: World, own: Mapping[str, Any], what: str, do: str) -> None:
    """Raise ConfigError on every rank, naming hosts and keys, where `own` is not the same on all."""
    rows = differing(world, own)
    problems = [
        Problem(f"{what}: {key}", f"{value!r} on {hosts}, {first!r} on rank 0 ({world.host})", do)
        for hosts, key, value, first in rows[:_DETAILS]
    ]
    refuse_together(world, problems)


def refuse_together(world: World, problems: Sequence[Problem]) -> None:
    """Raise rank 0's problems, if any, on every rank."""
    shared = world.broadcast_object([[one.what, one.seen, one.do] for one in problems])
    if shared:
        raise ConfigError(problems=[Problem(*one) for one in shared])


def _differences(world: World, own: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} differs: {value or 'none'} on {hosts}, {first or 'none'} on rank 0 ({world.host})"
        for hosts, key, value, first in differing(world, own)
    ]


def _short(value: Any) -> Any:
    text = json.dumps(value, sort_keys=True, default=str)
    return json.loads(text) if len(text) <= _TEXT else f"{text[:_TEXT]}… ({digest(value):.0f})"


# ---- measuring


def clock_offset(world: World, now: Callable[[], float] = time.time) -> tuple[float, float]:
    """(this host's clock minus rank 0's, how far off that may be), in seconds.

    Nobody leaves an all-reduce before all have entered: what this clock says on leaving is later than what rank 0's said on
    entering, and the other way round. The best of a few rounds counts; the first is for connections to be made.
    """
    low, high = -math.inf, math.inf
    for _ in range(_ROUNDS if world.size > 1 else 0):
        entered = now()
        world.max(0.0)
        left = now()
        main_entered, main_left = world.sum(*((entered, left) if world.is_main else (0.0, 0.0)))
        low, high = max(low, entered - main_left), min(high, left - main_entered)
    if world.is_main or world.size == 1:
        return 0.0, 0.0
    return (low + high) / 2, max(0.0, (high - low) / 2)


def judge(measures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about clocks and memory, each with the hosts."""
    found = []
    late = [m for m in measures if abs(m["clock_offset_seconds"]) - m["clock_bound_seconds"] > CLOCK_SECONDS]
    if late:
        worst = max(late, key=lambda m: abs(m["clock_offset_seconds"]))
        found.append(
            f"the clock of {fold_names(m['host'] for m in late)} is off: {worst['clock_offset_seconds']:+.1f} s on "
            f"{worst['host']} against rank 0's; have it synchronised (chrony, ntpd)"
        )
    short = [m for m in measures if 0 < m["available_memory_bytes"] < MEMORY_PER_RANK * m["ranks"]]
    if short:
        least = min(short, key=lambda m: m["available_memory_bytes"])
        found.append(
            f"little memory on {fold_names(m['host'] for m in short)}: {format_bytes(least['available_memory_bytes'])} "
            f"available for {least['ranks']} ranks on {least['host']}"
        )
    small = [m for m in measures if m["shared_memory_bytes"] < SHARED_MEMORY and m["ranks"] > 1]
    if small:
        least = min(small, key=lambda m: m["shared_memory_bytes"])
        found.append(
            f"little shared memory on {fold_names(m['host'] for m in small)}: "
            f"{format_bytes(least['shared_memory_bytes'])} free in /dev/shm of {least['host']}"
        )
    return found


def group(nodes: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Nodes with equal facts as one entry: names as ranges, what was measured as extremes with their host."""
    alike: dict[str, list[Sequence[Any]]] = {}
    for node in nodes:
        alike.setdefault(json.dumps(node[0], sort_keys=True), []).append(node)
    groups = []
    for members in alike.values():
        measures = sorted((one for _, one in members), key=lambda m: str(m["host"]))
        entry = {"hosts": fold_names(m["host"] for m in measures), "num_nodes": len(members), **members[0][0]}
        entry["addresses"] = fold_names(m["address"] for m in measures if m["address"])
        entry["interfaces"] = sorted({m["interface"] for m in measures if m["interface"]})
        for key, worst in (
            ("clock_offset_seconds", max(measures, key=lambda m: abs(m["clock_offset_seconds"]))),
            ("available_memory_bytes", min(measures, key=lambda m: m["available_memory_bytes"])),
            ("shared_memory_bytes", min(measures, key=lambda m: m["shared_memory_bytes"])),
        ):
            entry[key] = {"worst": worst[key], "host": worst["host"]}
        entry["clock_bound_seconds"] = max(m["clock_bound_seconds"] for m in measures)
        groups.append(entry)
    return sorted(groups, key=lambda one: (-one["num_nodes"], one["hosts"]))
