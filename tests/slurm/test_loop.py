"""Jobs that are stopped, preempted, lose nodes and ranks: each continues by itself and ends with an undisturbed job's bits."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults._jobs import Reference, newest_commit
from tests.run_fixtures import write_config
from tests.slurm import lab, loops
from tests.slurm.loops import SETTINGS, SIGNALS, TWO_BY_TWO, TWO_NODES, Loop

pytestmark = pytest.mark.slurm
IN_CI = ("USR1 to the shell", "TERM to one rank")


@pytest.fixture()
def make(dataset, tmp_path) -> Callable[..., Path]:
    """make("run", **settings) -> YAML of a run on two nodes."""
    return lambda name="run", **more: write_config(dataset, tmp_path, name, **{**SETTINGS, **more})


@pytest.fixture(scope="module")
def reference(cluster, dataset, tmp_path_factory) -> Reference:
    """The undisturbed job of SETTINGS."""
    return loops.straight(write_config(dataset, tmp_path_factory.mktemp("straight"), "straight", **SETTINGS))


def test_a_time_limit_is_met_with_a_commit_and_a_requeue_until_the_run_is_done(cluster, make):
    """The real thing: SLURM's own clock and signal."""
    settings = loops.cut_by_a_limit(make)
    expected = loops.straight(make("straight", **settings))
    options = (*TWO_NODES, "--time=2", "--signal=USR1@60")
    with Loop(make("limited", **settings), options) as loop:
        loop.finish()
        assert loop.broken(expected, lossless=True, requeues=range(1, 10)) == []
        assert {one.exit_code for one in loop.verdicts()[:-1]} == {75}


@pytest.mark.parametrize(
    "kind", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in SIGNALS]
)
def test_a_signal_to_anybody_commits_the_agreed_step_once_and_requeues_once(kind, reference, make):
    with Loop(make()) as loop:
        loop.wait_step(25)
        SIGNALS[kind](loop, random.Random(1))
        assert loop.broken(reference, lossless=True) == []
        assert [one.exit_code for one in loop.verdicts()] == [75, 0]


@pytest.mark.slow
def test_two_ranks_on_each_of_two_nodes_do_the_same(cluster, make):
    expected = loops.straight(make("straight"), TWO_BY_TWO)
    with Loop(make(), TWO_BY_TWO) as loop:
        loop.wait_step(25)
        lab.send(loop.job, "USR1")
        assert loop.broken(expected, lossless=True) == []


def test_a_job_preempted_for_another_is_requeued_once_and_loses_nothing(reference, make, submit, own_cluster, cluster):
    with Loop(make(), (*TWO_NODES, "--partition=spot")) as loop:
        loop.wait_step(25)
        other = submit(
            lab.ROOT / "tests" / "slurm" / "sleep.sbatch", 3, options=[f"--nodes={len(cluster)}", "--exclusive"]
        )
        assert lab.wait(other, 120).state == "COMPLETED"
        assert loop.broken(reference, lossless=True) == []


def test_a_cancelled_job_is_not_requeued_and_the_same_line_continues_it(reference, make):
    with Loop(make()) as loop:
        loop.wait_step(70)
        lab.cancel(loop.job)
        ended = loop.finish()
        assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    assert newest_commit(loop.folder) >= 60
    with Loop(make()) as again:
        assert again.broken(reference, requeues=(0,)) == []


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_costs_a_save_interval_at_most(rank, reference, make):
    with Loop(make()) as loop:
        loop.wait_step(70)
        loops.to_rank(loop, signal.SIGKILL, rank)
        assert loop.broken(reference) == []
        first, last = loop.verdicts()
        assert (first.exit_code, last.exit_code) == (76, 0)
        # SLURM ends what is left of a dead task, its watchdog too, which can be faster than the watchdog's verdict: then
        # srun has seen it.
        assert (first.rank, first.host != "") == (rank, True)


def test_a_node_without_power_costs_a_save_interval_at_most(reference, make, own_cluster):
    with Loop(make()) as loop:
        loop.wait_step(70)
        loops.lose_node(loop, "power")
        assert loop.broken(reference, requeues=loops.NODE_LOSS_REQUEUES) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["power of the batch host", "network"])
def test_what_a_lost_node_still_does_never_counts(kind, reference, make, own_cluster):
    """Behind a pulled cable a rank lives on while the job's next attempt already trains."""
    with Loop(make()) as loop:
        loop.wait_step(70)
        loops.lose_node(loop, kind)
        assert loop.broken(reference, requeues=loops.NODE_LOSS_REQUEUES) == []
