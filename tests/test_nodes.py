"""Nodes that differ are found and named, by real ranks; equal ones are one entry of the record."""

from __future__ import annotations

import contextlib
import time

import pytest

from dsgpt import nodes
from dsgpt.errors import ConfigError
from tests.pool import ranks


@contextlib.contextmanager
def own_node(world):
    """Every rank as the first rank of a node of its own."""
    before = world.local_rank, world.local_size, world.host
    world.local_rank, world.local_size, world.host = 0, 1, f"node{world.rank + 1}"
    try:
        yield
    finally:
        world.local_rank, world.local_size, world.host = before


def compare(world, changes, shift=0.0, rank=1):
    own = nodes.facts(world) | (changes if world.rank == rank else {})
    shifted = shift if world.rank == rank else 0.0
    with own_node(world):
        try:
            report = nodes.compare_nodes(world, own, lambda: time.time() + shifted)
        except ConfigError as error:
            return str(error)
    return report.num_nodes, report.groups, report.warnings, report.text()


def test_equal_nodes_are_one_entry():
    (number, groups, warnings, text), rest = ranks(2).run(compare, {})
    assert rest == (0, [], [], "")
    assert number == 2 and len(groups) == 1 and "2 nodes, all alike: no GPU, python" in text
    assert groups[0]["hosts"] == "node[1-2]" and groups[0]["num_nodes"] == 2
    assert groups[0]["addresses"] == "127.0.0.1" and groups[0]["interfaces"] == ["lo"]
    assert not [one for one in warnings if "differs" in one or "clock" in one]


def test_another_version_of_what_counts_ends_all_ranks_and_names_the_host():
    texts = ranks(2).run(compare, {"torch": "1.0"})
    assert texts[0] == texts[1]
    assert "the software is not the same on all nodes: torch" in texts[0] and "'1.0' on node2" in texts[0]


def test_other_differences_are_warnings():
    (number, groups, warnings, text), _ = ranks(2).run(compare, {"driver": "570.1", "kernel": "other"})
    assert any("driver differs: 570.1 on node2, none on rank 0 (node1)" in one for one in warnings)
    assert not any("kernel" in one for one in warnings)
    assert number == 2 and [one["hosts"] for one in groups] == ["node1", "node2"] and "2 kinds" in text


@pytest.mark.parametrize("shift", [-7.0, 3600.0])
def test_a_clock_that_is_off_is_told_with_its_host(shift):
    (_, groups, warnings, _), _ = ranks(2).run(compare, {}, shift)
    (warning,) = [one for one in warnings if "clock" in one]
    assert "the clock of node2 is off" in warning and f"{shift:+.1f} s on node2" in warning
    worst = groups[0]["clock_offset_seconds"]
    assert worst["host"] == "node2" and abs(worst["worst"] - shift) <= groups[0]["clock_bound_seconds"] + 1e-5


def test_a_clock_within_its_bound_is_no_warning():
    """A round trip of ten seconds cannot tell six seconds."""
    measure = {"host": "n1", "ranks": 1, "available_memory_bytes": 1 << 40, "shared_memory_bytes": 1 << 40}
    assert nodes.judge([{**measure, "clock_offset_seconds": 6.0, "clock_bound_seconds": 5.0}]) == []


def test_little_memory_is_told():
    measure = {"clock_offset_seconds": 0.0, "clock_bound_seconds": 0.0, "ranks": 4}
    full = {**measure, "available_memory_bytes": 64 << 30, "shared_memory_bytes": 8 << 30}
    bare = {**measure, "available_memory_bytes": 3 << 30, "shared_memory_bytes": 64 << 20}
    texts = nodes.judge([{"host": "n1", **full}, {"host": "n2", **bare}, {"host": "n3", **bare}])
    assert texts == [
        "little memory on n[2-3]: 3.0 GiB available for 4 ranks on n2",
        "little shared memory on n[2-3]: 64.0 MiB free in /dev/shm of n2",
    ]


def test_a_thousand_equal_nodes_are_one_small_entry():
    measure = {"address": "", "interface": "ib0", "clock_offset_seconds": 0.0, "clock_bound_seconds": 0.0, "ranks": 8}
    memory = {"available_memory_bytes": 1 << 40, "shared_memory_bytes": 1 << 40}
    many = [[{"python": "3.11"}, {"host": f"n{i:04d}", **measure, **memory}] for i in range(1000)]
    (entry,) = nodes.group(many)
    assert entry["hosts"] == "n[0000-0999]" and entry["num_nodes"] == 1000
    assert len(str(entry)) < 1000
