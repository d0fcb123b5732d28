"""Ranks that meet, and ranks that do not: real processes, bounded time, and the one at fault named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from dsgpt.process import free_port
from dsgpt.units import fold_names

RANK = """
import json, sys, time
import dsgpt.rendezvous as rendezvous
rank, size, address, port, seconds, host, expected = json.loads(sys.argv[1])
rendezvous.TELL_SECONDS = 5.0
began = time.monotonic()
try:
    store = rendezvous.meet(rendezvous.Place(address, port, rank, size, host), seconds, expected)
    print("met")
    if rank == 0:
        rendezvous._let_them_read(store, "meet")  # a job would go on
except rendezvous.RendezvousError as error:
    print(f"{error.exit_code.value} after {time.monotonic() - began:.1f}\\n{error}")
"""


def start_rank(rank, size, port, seconds=4.0, host="here", address="127.0.0.1", expected=()):
    import json

    argument = json.dumps([rank, size, address, port, seconds, host, list(expected)])
    return subprocess.Popen(
        [sys.executable, "-c", RANK, argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def outputs(*processes, timeout=90):
    return [process.communicate(timeout=timeout)[0] for process in processes]


@pytest.mark.slow
def test_ranks_meet_whoever_is_first():
    port = free_port()
    first = start_rank(1, 3, port, 60)
    time.sleep(2)
    assert outputs(first, start_rank(0, 3, port, 60), start_rank(2, 3, port, 60)) == ["met\n"] * 3


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_with_its_host_by_all_that_came():
    """T709."""
    port, expected = free_port(), ["node1", "node2", "node3"]
    here = [start_rank(rank, 4, port, 8, host, expected=expected) for rank, host in ((0, "node1"), (1, "node1"))]
    texts = outputs(*here, start_rank(3, 4, port, 8, "node3.site", expected=expected))
    for text in texts:
        assert "76 after " in text, text
        assert f"rank 2 of 4 did not come to 127.0.0.1:{port} within " in text
        assert "(no rank came from node2)" in text and "3 came, from node1,node3.site" in text


def test_without_a_list_of_hosts_the_ranks_are_named():
    (text,) = outputs(start_rank(0, 6, free_port(), 1))
    assert "ranks 1-5 of 6 did not come" in text and "1 came, from here" in text


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("no.such.host.invalid", marks=pytest.mark.slow)])
def test_a_rank_that_cannot_reach_rank_0_says_which_address_it_tried(address):
    port = free_port()
    (text,) = outputs(start_rank(1, 2, port, 3, "node2", address))
    assert text.startswith("76 after 3."), text
    assert f"rank 1 on node2 could not reach rank 0 at {address}:{port}" in text
    assert ("Connection refused" if address == "127.0.0.1" else "does not resolve") in text


@pytest.mark.parametrize("rank", [0, 1])
def test_another_program_at_the_port_is_no_rank_0(rank):
    """torch alone waits for ever for the answer of something that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (text,) = outputs(start_rank(rank, 2, port, 3))
    assert "76 after " in text, text
    assert ("cannot listen at" if rank == 0 else "what listens there does not answer") in text
    assert "MASTER_PORT" in text


def test_the_store_listens_on_the_masters_address_alone():
    """T920."""
    port = free_port()
    process = start_rank(0, 2, port, 60, address="127.0.0.2")
    try:
        deadline = time.monotonic() + 60
        while not (found := listening(port)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found == ["127.0.0.2"]
    finally:
        process.kill()


def listening(port: int) -> list[str]:
    """IPv4 and IPv6 addresses with a listener at a port; the kernel's hexadecimal turned into what people write."""
    found = []
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        for address, state in ((row[1], row[3]) for row in rows):
            host, _, number = address.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.append(socket.inet_ntoa(bytes.fromhex(host)[::-1]) if len(host) == 8 else host)
    return found


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([], ""),
        (["one"], "one"),
        (["node1", "node2", "node3", "x"], "node[1-3],x"),
        (["n01", "n02", "n09", "n10", "n11"], "n[01-02,09-11]"),
        (["10.99.0.11", "10.99.0.12"], "10.99.0.[11-12]"),
        (["a1b2.x", "a1b3.x", "a1b2.x"], "a1b[2-3].x"),
        (["n9", "n10", "n11"], "n[9-11]"),
    ],
)
def test_names_are_folded_as_schedulers_write_them(names, folded):
    assert fold_names(names) == folded
