"""Whether the ranks of a job reach each other, fast and without damage: `dsgpt doctor --distributed` on every rank.

    srun python -m dsgpt doctor --distributed        or torchrun, deepspeed --module; alone it starts local ranks

The ranks meet, their nodes are compared (dsgpt.nodes), sums are made and checked, and each endpoint (a node, or a rank where
there is one node) exchanges data with its two neighbours in a ring, in disjoint pairs, so that a host that is slow with both
is told from a slow link. Bandwidths as nccl-tests define them: bytes over time, and for the bus that times 2(n-1)/n.

A host that is lost on the way is found by roll call in the store: who does not answer is named. The exit code is 0, 76
(a host or link is lost, slow or damages data) or 78 (software that must not differ). Growth: a fixed number of collectives;
the ring takes two or three rounds at any size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dsgpt import distributed
from dsgpt.distributed import World
from dsgpt.errors import DsgptError, ExitCode, PeerError
from dsgpt.nodes import NodesReport, compare_nodes
from dsgpt.rendezvous import addresses_in, roll_call
from dsgpt.units import fold_names

MEET_SECONDS, PATIENCE_SECONDS, ROLL_CALL_SECONDS = 120.0, 60.0, 20.0
MIB = 1 << 20
SIZES = {"cpu": (64 << 10, MIB, 4 * MIB, 16 * MIB), "cuda": (MIB, 16 * MIB, 64 * MIB, 256 * MIB)}
PAIR_BYTES = {"cpu": 4 * MIB, "cuda": 64 * MIB}
REPEATS, LATENCY_REPEATS = 5, 50
SLOW = 3.0  # times slower than the best quarter of the links
SLOWEST_BYTES_PER_SECOND = 50e6  # half of what a network of 1 Gbit/s carries
SLOW_SECONDS = 0.005  # below this difference the machine's own noise is measured, not a link


@dataclass
class Edge:
    """One pair of neighbours: both names, seconds there and back, and how many values arrived changed."""

    one: str
    other: str
    seconds: float
    wrong: int = 0
    bytes: int = 0


@dataclass
class Report:
    """What rank 0 has to tell."""

    world_size: int = 0
    num_nodes: int = 0
    device: str = "cpu"
    rendezvous: dict[str, Any] = field(default_factory=dict)
    latency_seconds: float = 0.0
    all_reduce: list[dict[str, Any]] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    nodes: NodesReport = field(default_factory=NodesReport)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.INFRASTRUCTURE if self.problems else ExitCode.DONE

    def as_dict(self) -> dict[str, Any]:
        return {"ok": not self.problems, **asdict(self)}


def start_and_probe(expected_hosts: Sequence[str] = ()) -> tuple[World, Report]:
    """Join the other ranks and measure; what `dsgpt doctor --distributed` does on every rank."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    world = distributed.start(device, PATIENCE_SECONDS, MEET_SECONDS, expected_hosts)
    report = probe(world, time.monotonic() - began)
    report.problems = world.broadcast_object(report.problems)  # all ranks leave with one code
    return world, report


def probe(world: World, met_seconds: float, sizes: Sequence[int] = (), delay: float = 0.0) -> Report:
    """Measure on every rank; the report is rank 0's. `delay` slows this rank's part in the ring, for tests.

    Raises PeerError with the hosts that no longer answer, ConfigError where software must not differ.
    """
    try:
        return _measure(world, met_seconds, sizes or SIZES[world.device.type], delay)
    except DsgptError:
        raise
    except Exception as error:  # torch has many, and tells in their text at most an address
        raise PeerError(*explain(world, error)) from error


def explain(world: World, error: Exception) -> tuple[str, str, str]:
    """What, seen and do for a collective that failed: the roll is called, and who does not answer is named."""
    seen = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if world.place is None or world.store is None:
        return "the ranks lost each other", seen, ""
    answer = roll_call(world.store, "lost", world.place, ROLL_CALL_SECONDS)
    first = answer.split("\n")[0]
    addresses = fold_names(addresses_in(seen))
    what = first or f"a connection broke, though all ranks still answer ({addresses or 'no address is told'})"
    return what, seen, "look at that node and its network; leave it out with --exclude"


def _measure(world: World, met_seconds: float, sizes: Sequence[int], delay: float) -> Report:
    report = Report(world.size, 1, world.device.type)
    (slowest,) = world.max(met_seconds)
    (fastest,) = (-value for value in world.max(-met_seconds))
    last = int(world.max(float(world.rank) if met_seconds == fastest else -1.0)[0])
    report.nodes = compare_nodes(world)
    report.num_nodes, report.warnings = report.nodes.num_nodes, list(report.nodes.warnings)
    if world.is_main:
        report.rendezvous = {"seconds": round(slowest, 3), "last": f"rank {last} on {world.host_of(last)}"}
    if world.size > 1:
        report.latency_seconds = _time(world, torch.ones(1, device=world.device), LATENCY_REPEATS)[0]
        for size in sizes:
            report.all_reduce.append(_all_reduce(world, size, report.problems))
        edges = ring(world, PAIR_BYTES[world.device.type], delay)
        if edges is not None:
            report.edges = edges
            problems, warnings = judge(edges)
            report.problems += problems
            report.warnings += warnings
    return report


# ---- sums of all ranks


def _all_reduce(world: World, size: int, problems: list[str]) -> dict[str, Any]:
    """Time one size, and check every value of the sum: the numbers are whole and small, so that any order sums them alike."""
    tensor = _pattern(size // 4, world.rank, world.device)
    total = tensor.clone()
    dist.all_reduce(total)
    wanted = world.size * _pattern(len(total), 0, world.device) + sum(rank % 7 for rank in range(world.size))
    wrong = int((total != wanted).sum())
    told = world.collect([world.rank, world.host, wrong] if wrong else None)
    if told:
        hosts = fold_names(sorted({host for _, host, _ in told}))
        problems.append(
            f"the sum over all ranks is wrong on {hosts}: {max(n for _, _, n in told)} of {len(total)} values"
        )
    seconds, _ = _time(world, tensor, REPEATS)
    rate = size / seconds
    return {"bytes": size, "seconds": seconds, "algorithm": rate, "bus": rate * 2 * (world.size - 1) / world.size}


def _pattern(length: int, rank: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(length, device=device) % 251 + rank % 7).to(torch.float32)


def _time(world: World, tensor: torch.Tensor, repeats: int) -> tuple[float, float]:
    """(mean, least) seconds of an all-reduce, on the slowest rank."""
    times = []
    scratch = tensor.clone()
    for repeat in range(repeats + 2):
        scratch.copy_(tensor)
        _finish(world)
        began = time.perf_counter()
        dist.all_reduce(scratch)
        _finish(world)
        if repeat > 1:
            times.append(time.perf_counter() - began)
    mean, least = world.max(statistics.mean(times), min(times))
    return mean, least


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


# ---- neighbours


def rounds(number: int) -> list[list[tuple[int, int]]]:
    """The edges of a ring of so many, in rounds of disjoint pairs: two, or three where the number is odd."""
    edges = [(place, (place + 1) % number) for place in range(number if number > 2 else number - 1)]
    last = edges[-1:] if number % 2 and number > 2 else []
    paired = edges[: len(edges) - len(last)]
    return [part for part in (paired[::2], paired[1::2], last) if part]


def ring(world: World, size: int, delay: float = 0.0) -> list[Edge] | None:
    """Have neighbours exchange `size` bytes; the edges on rank 0, None elsewhere."""
    everyone = world.broadcast_object(_endpoints(world))
    ranks = [rank for rank, _ in everyone]
    mine = []
    for pairs in rounds(len(ranks)):
        for one, other in pairs:
            if world.rank in (ranks[one], ranks[other]):
                peer = ranks[other] if world.rank == ranks[one] else ranks[one]
                seconds, wrong = _exchange(world, peer, size, delay)
                mine.append([everyone[one][1], everyone[other][1], seconds, wrong])
        world.barrier()
    told = world.collect(mine or None)
    if told is None:
        return None
    merged: dict[tuple[str, str], Edge] = {}
    for one, other, seconds, wrong in (edge for edges in told for edge in edges):
        edge = merged.setdefault((one, other), Edge(one, other, 0.0, 0, size))
        edge.seconds, edge.wrong = max(edge.seconds, seconds), edge.wrong + wrong
    return sorted(merged.values(), key=lambda edge: -edge.seconds)


def _endpoints(world: World) -> list[tuple[int, str]] | None:
    """On rank 0: (rank, name) of the first rank of each node; of every rank where there is one node."""
    if not world.is_main or world.store is None:
        return None
    hosts = distributed.hosts_of(world.store, range(world.size))
    first = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    if len(first) > 1:
        return sorted((rank, host) for host, rank in first.items())
    return [(rank, f"rank {rank} on {host}") for rank, host in enumerate(hosts)]


def _exchange(world: World, peer: int, size: int, delay: float) -> tuple[float, int]:
    """(least seconds to send and receive at once, values that came wrong)."""
    outgoing = _pattern(size // 4, world.rank, world.device)
    incoming = torch.zeros_like(outgoing)
    wanted = _pattern(size // 4, peer, world.device)
    least, wrong = math.inf, 0
    for _ in range(REPEATS):
        incoming.zero_()
        _finish(world)
        began = time.perf_counter()
        if delay:
            time.sleep(delay)
        requests = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, outgoing, peer), dist.P2POp(dist.irecv, incoming, peer)]
        )
        for request in requests:
            request.wait()
        _finish(world)
        least = min(least, time.perf_counter() - began)
        wrong = max(wrong, int((incoming != wanted).sum()))
    return least, wrong


def judge(edges: Sequence[Edge]) -> tuple[list[str], list[str]]:
    """(problems, warnings): hosts that are slow with all their neighbours or send damaged data, and single slow links."""
    problems, warnings = [], []
    problems += _blame([edge for edge in edges if edge.wrong], edges, "damages data")
    times = sorted(edge.seconds for edge in edges)
    good = times[(len(times) - 1) // 4] if times else 0.0
    slow = [edge for edge in edges if edge.seconds > SLOW * good and edge.seconds - good > SLOW_SECONDS]
    if slow:
        others = Edge("", "", good, 0, slow[0].bytes)
        told = _blame(slow, edges, f"is slow: {_rate(slow[0])}, others {_rate(others)}")
        problems += [text for text in told if text.startswith("host ")]
        warnings += [text for text in told if not text.startswith("host ")]
    elif len(edges) == 1 and edges[0].bytes < SLOWEST_BYTES_PER_SECOND * edges[0].seconds:
        # Two nodes: nothing to compare the link with.
        told = f"the link between {edges[0].one} and {edges[0].other} is slow: {_rate(edges[0])}"
        warnings.append(f"{told}; run it on three nodes or more to see which of the two is at fault")
    return problems, warnings


def _blame(bad: Sequence[Edge], edges: Sequence[Edge], what: str) -> list[str]:
    """The hosts of which both edges are bad, then the links that none of these explains."""

    def of(name: str, among: Sequence[Edge]) -> list[Edge]:
        return [edge for edge in among if name in (edge.one, edge.other)]

    names = {name for edge in bad for name in (edge.one, edge.other)}
    guilty = sorted(name for name in names if len(of(name, bad)) == len(of(name, edges)) > 1)
    rest = [edge for edge in bad if edge.one not in guilty and edge.other not in guilty]
    return [f"host {name} {what}" if not name.startswith("rank") else f"host of {name} {what}" for name in guilty] + [
        f"the link between {edge.one} and {edge.other} {what}" for edge in rest
    ]


def _rate(edge: Edge) -> str:
    return f"{edge.bytes / max(edge.seconds, 1e-9) / 1e6:.0f} MB/s"
