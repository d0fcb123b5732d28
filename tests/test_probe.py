"""`dsgpt doctor --distributed`: sums are checked, slow and lost hosts are named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dsgpt import probe
from dsgpt.probe import Edge
from dsgpt.process import free_port
from tests.pool import ranks


def measure(world, rank=-1, delay=0.0):
    report = probe.probe(world, 0.1 * (world.size - world.rank), [4096, 100_000], delay if world.rank == rank else 0.0)
    return report.as_dict()


@pytest.mark.slow
def test_healthy_ranks_have_no_problem_and_only_rank_0_has_the_links():
    first, *others = ranks(3).run(measure)
    assert first["ok"] and first["problems"] == [] and first["world_size"] == 3
    assert [one["bytes"] for one in first["all_reduce"]] == [4096, 100_000]
    for one in first["all_reduce"]:
        assert one["bus"] == pytest.approx(one["algorithm"] * 4 / 3)
    assert len(first["edges"]) == 3 and all(edge["wrong"] == 0 for edge in first["edges"])
    assert first["rendezvous"]["last"].startswith("rank 2 on ")
    assert all(other["edges"] == [] for other in others)


@pytest.mark.slow
def test_a_rank_that_is_slow_with_both_neighbours_is_named():
    first, *_ = ranks(3).run(measure, 1, 0.3)
    (problem,) = first["problems"]
    assert problem.startswith("host of rank 1 on ") and " is slow: " in problem


def with_wrong_sums(world):
    import torch.distributed as dist

    original = dist.all_reduce

    def damaged(tensor, *arguments, **named):
        work = original(tensor, *arguments, **named)
        if world.rank == 1 and tensor.numel() == 1024:
            tensor[7] += 1
        return work

    dist.all_reduce = damaged
    try:
        return measure(world)
    finally:
        dist.all_reduce = original


def test_a_wrong_sum_is_found():
    first, *_ = ranks(2).run(with_wrong_sums)
    assert not first["ok"] and "the sum over all ranks is wrong on" in first["problems"][0]
    assert "1 of 1024 values" in first["problems"][0]


@pytest.mark.parametrize("number", [2, 3, 4, 7, 8])
def test_a_ring_is_walked_in_rounds_of_disjoint_pairs(number):
    found = probe.rounds(number)
    assert len(found) <= 3
    for pairs in found:
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends))
    edges = [tuple(sorted(pair)) for pairs in found for pair in pairs]
    assert len(set(edges)) == len(edges) == (number if number > 2 else 1)
    assert {end for edge in edges for end in edge} == set(range(number))


def edges_of(number, slow=(), wrong=()):
    pairs = [(f"n{i}", f"n{(i + 1) % number}") for i in range(number)]
    return [
        Edge(
            one,
            other,
            0.5 if {one, other} & set(slow) or (one, other) in slow else 0.01,
            (one, other) in wrong,
            1 << 22,
        )
        for one, other in pairs
    ]


def test_blame_falls_on_a_host_or_on_a_link():
    assert probe.judge(edges_of(5)) == ([], [])
    (problem,), warnings = probe.judge(edges_of(5, slow=("n3",)))
    assert problem.startswith("host n3 is slow: 8 MB/s, others 419 MB/s") and not warnings
    problems, (warning,) = probe.judge(edges_of(5, slow=(("n1", "n2"),)))
    assert not problems and warning.startswith("the link between n1 and n2 is slow")
    problems, _ = probe.judge(edges_of(5, wrong=(("n0", "n1"), ("n1", "n2"))))
    assert problems == ["host n1 damages data"]
    assert probe.judge([Edge("n0", "n1", 0.5, 0, 1 << 22)])[1][0].startswith(
        "the link between n0 and n1 is slow: 8 MB/s"
    )


def start_doctor(*options, **environment):
    command = [sys.executable, "-m", "dsgpt", "doctor", "--distributed", *options]
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def test_alone_it_starts_ranks_of_this_machine_and_prints_one_object():
    process = start_doctor("--json")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    told = json.loads(output)
    assert told["ok"] and told["world_size"] >= 1 and "starting" in errors


SLOW_TO_MEASURE = """
import sys, time
from dsgpt import probe
probe.ROLL_CALL_SECONDS = 3.0
original = probe._all_reduce
def wait(world, *arguments):
    print("met", flush=True)
    time.sleep(1000 if world.rank == 1 else 0)
    return original(world, *arguments)
probe._all_reduce = wait
from dsgpt.cli import main
sys.argv = ["dsgpt", "doctor", "--distributed"]
main()
"""


def test_a_rank_that_is_lost_on_the_way_is_named_by_roll_call():
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_TO_MEASURE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **common, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        for line in processes[1].stdout:
            if line == "met\n":
                break
        time.sleep(0.5)
        processes[1].send_signal(signal.SIGKILL)
        output, _ = processes[0].communicate(timeout=120)
        assert processes[0].returncode == 76, output
        assert "rank 1 of 2 did not" in output
    finally:
        for process in processes:
            process.kill()
