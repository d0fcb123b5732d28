"""How the ranks of a job find each other, in bounded time, and who is named where one does not come.

    store = meet(Place("node1", 29500, rank, size, host), seconds=600, expected_hosts=["node1", "node2"])

Rank 0 listens at MASTER_ADDR:MASTER_PORT, on that address alone where it is one of its own; the others connect, tell their
name and wait for rank 0's word. At the time limit rank 0 says which ranks, and where the expected hosts are known which
hosts, did not come; those that came say the same, and those that cannot reach rank 0 say which address they tried.
torch's own rendezvous tries longer than it is told, for ever where something else listens at the port, and names nobody.

Whoever can reach the port can read and change what the ranks agree on, and NCCL and gloo do not encrypt: a network that is
trusted is assumed. Growth: four small messages per rank to one server thread on rank 0 and no collective, below a second
at 8,192 ranks; only a failed rendezvous looks for every rank's key.
"""

from __future__ import annotations

import contextlib
import datetime
import random
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dsgpt.errors import PeerError
from dsgpt.units import fold_names

MET = "met"  # what rank 0 answers when all have come; else it answers with the message
TELL_SECONDS = 10.0  # how long rank 0 stays for the others to read why it leaves


class RendezvousError(PeerError):
    """Not all ranks came together: another one is at fault, as far as this one knows."""

    cause = "rendezvous"


@dataclass(frozen=True)
class Place:
    """Where the ranks meet, and who this one is. `agent` says that torchrun's agent listens there, not rank 0."""

    address: str
    port: int
    rank: int
    size: int
    host: str
    agent: bool = False

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def meet(place: Place, seconds: float, expected_hosts: Sequence[str] = ()) -> Any:
    """Open the store and wait until all ranks have come. Raises RendezvousError after `seconds`."""
    deadline = time.monotonic() + seconds
    listener = None
    if place.rank == 0 and not place.agent:
        listener = _listen(place)
    else:
        _reach(place, deadline, seconds)
    store = _open_store(place, listener, deadline, seconds)
    missing = roll_call(store, "meet", place, deadline - time.monotonic(), expected_hosts)
    if missing:
        raise RendezvousError(*missing.split("\n"))
    return store


def roll_call(store: Any, name: str, place: Place, seconds: float, expected_hosts: Sequence[str] = ()) -> str:
    """Have every rank answer within `seconds`; "" where all did, else rank 0's message about those that did not.

    The same text on all ranks that answered. Others wait a little longer than rank 0, for its word.
    """
    try:
        store.set(f"{name}/{place.rank}", place.host)
        if store.add(f"{name}/count", 1) == place.size:
            store.set(f"{name}/all", "1")
        if place.rank:
            _wait(store, f"{name}/word", seconds + TELL_SECONDS)
            word = store.get(f"{name}/word").decode()
            store.add(f"{name}/told", 1)
            return "" if word == MET else word
        if _arrived(store, f"{name}/all", seconds):
            store.set(f"{name}/word", MET)
            return ""
        message = _missing(store, name, place, seconds, expected_hosts)
        store.set(f"{name}/word", message)
        _let_them_read(store, name)
        return message
    except dist.DistError as error:
        what = f"rank {place.rank} on {place.host} met no answer of rank 0 at {place}"
        return "\n".join((what, _first_line(error), "look into the log of rank 0's node"))


def hosts_of(store: Any, ranks: Sequence[int], name: str = "meet") -> list[str]:
    """The hosts of some ranks, as they told them."""
    return [value.decode() for value in store.multi_get([f"{name}/{rank}" for rank in ranks])] if ranks else []


def addresses_in(text: str) -> list[str]:
    """IP addresses that an error of gloo or NCCL names, which for most of them is all they say of a peer."""
    return re.findall(r"\[?((?:\d{1,3}\.){3}\d{1,3}|[0-9a-f]*:[0-9a-f:]+:[0-9a-f]+)\]?[:<]\d", text)


# ---- one rank's steps


def _listen(place: Place) -> socket.socket | None:
    """A listening socket on the master's address alone, so that no other network sees the store.

    None where that is not an address of this machine (a forwarded one), or is loopback under another name while ranks may
    come from elsewhere (Debian's 127.0.1.1): then torch listens on all.
    """
    try:
        found = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RendezvousError(
            f"rank 0 on {place.host} cannot resolve MASTER_ADDR", f"{place.address}: {error}", "set it to its host name"
        ) from None
    family, kind, protocol, _, target = found[0]
    literal = place.address in ("localhost", "::1") or place.address.startswith("127.")
    if str(target[0]).startswith(("127.", "::1")) and not literal:
        return None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(4096)
        return listener
    except OSError as error:
        listener.close()
        if "Cannot assign" in str(error):
            return None
        do = "set MASTER_PORT to a free port, the same on all ranks"
        raise RendezvousError(f"rank 0 on {place.host} cannot listen at {place}", str(error), do) from None


def _reach(place: Place, deadline: float, seconds: float) -> None:
    """Wait until something listens there: rank 0 may start later."""
    seen: OSError | str = "nothing tried"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((place.address, place.port), timeout=min(left, 10.0)).close()
            return
        except OSError as error:
            seen = error
            time.sleep(min(max(0.0, deadline - time.monotonic()), random.uniform(0.1, 0.5)))
    raise RendezvousError(
        f"rank {place.rank} on {place.host} could not reach rank 0 at {place} within {seconds:.0f} s",
        seen=f"{seen} ({_resolved(place.address)})",
        do="is rank 0 running there, is MASTER_ADDR its name for this node, does a firewall let the port through?",
    )


def _open_store(place: Place, listener: socket.socket | None, deadline: float, seconds: float) -> Any:
    """The connection to the store. In a thread: where another program listens at the port, torch waits for ever."""
    result: list[Any] = []

    def connect() -> None:
        left = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
        serves = place.rank == 0 and not place.agent
        descriptor = listener.detach() if listener else None
        try:
            result.append(
                dist.TCPStore(
                    place.address,
                    place.port,
                    place.size,
                    serves,
                    left,
                    wait_for_workers=False,
                    master_listen_fd=descriptor,
                )
            )
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=connect, daemon=True, name="dsgpt-rendezvous")
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if result and not isinstance(result[0], Exception):
        return result[0]
    raise RendezvousError(
        f"rank {place.rank} on {place.host} reached {place}, but not rank 0 of this job within {seconds:.0f} s",
        seen=_first_line(result[0]) if result else "what listens there does not answer",
        do="another program or job may use the port: set MASTER_PORT to a free one, the same on all ranks",
    )


def _arrived(store: Any, key: str, seconds: float) -> bool:
    """Rank 0 asks its own server now and then: torch complains of a wait that times out."""
    deadline = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _wait(store: Any, key: str, seconds: float) -> None:
    store.wait([key], datetime.timedelta(seconds=max(0.1, seconds)))


def _let_them_read(store: Any, name: str) -> None:
    """Rank 0 has the store: it stays until the others know, or for some seconds."""
    came = store.add(f"{name}/count", 0) - 1
    until = time.monotonic() + TELL_SECONDS
    while store.add(f"{name}/told", 0) < came and time.monotonic() < until:
        time.sleep(0.05)


def _missing(store: Any, name: str, place: Place, seconds: float, expected_hosts: Sequence[str]) -> str:
    """Three lines about who did not come: what, seen, do."""
    ranks = range(place.size)
    came = [rank for rank in ranks if store.check([f"{name}/{rank}"])]
    gone = sorted(set(ranks) - set(came))
    hosts = hosts_of(store, came, name)
    silent = [host for host in expected_hosts if not any(_same_host(host, one) for one in hosts)]
    who = f"ranks {_shown(gone)} of {place.size}" if len(gone) > 1 else f"rank {gone[0]} of {place.size}"
    where = f" (no rank came from {fold_names(silent)})" if silent else ""
    if not silent and expected_hosts:
        counts = {host: hosts.count(host) for host in set(hosts)}
        fewest = min(counts.values())
        where = (
            f" (every host answered; fewest ranks came from {fold_names([h for h in counts if counts[h] == fewest])})"
        )
    what = f"{who} did not come to {place} within {seconds:.0f} s{where}"
    seen = f"{len(came)} came, from {fold_names(sorted(set(hosts)))}"
    node = fold_names(silent) if silent else "their nodes"
    return "\n".join((what, seen, f"look into the logs of {node}: did the rank start, and can it reach {place}?"))


def _same_host(one: str, other: str) -> bool:
    """Whether two names mean one host: with or without its domain."""
    return one == other or one.partition(".")[0] == other.partition(".")[0]


def _shown(ranks: Sequence[int]) -> str:
    """Their numbers with runs shortened: 1, 3-7."""
    return fold_names([str(rank) for rank in ranks]).strip("[]").replace(",", ", ")


def _resolved(address: str) -> str:
    with contextlib.suppress(OSError):
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(address, None)}
        return f"{address} is {', '.join(sorted(found))}"
    return f"{address} does not resolve"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
