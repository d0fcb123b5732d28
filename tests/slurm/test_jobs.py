"""Arrays, heterogeneous jobs, sites that refuse a requeue, GPUs asked for in every way, nodes that do not divide."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dsgpt.train.state import read_metrics
from tests.faults._jobs import lines_of
from tests.run_fixtures import write_config
from tests.slurm import lab, loops
from tests.slurm.loops import SETTINGS, TWO_NODES, Loop

pytestmark = pytest.mark.slurm
TRAIN = lab.SCRIPTS / "train.sbatch"
SHORT = {"training.max_steps": 6}


@pytest.fixture()
def make(dataset, tmp_path) -> Callable[..., Path]:
    return lambda name="run", **more: write_config(dataset, tmp_path, name, **{**SETTINGS, **more})


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in lines_of(folder / "metrics.jsonl") if "step" in line]


def has_step(folder: Path, number: int) -> bool:
    return bool(steps_of(folder)) and steps_of(folder)[-1] >= number


def job_told(folder: Path) -> dict[str, object]:
    (path,) = folder.glob("logs/*/job.json")
    return json.loads(path.read_text())


def test_a_task_of_an_array_is_requeued_alone(cluster, make, submit, tmp_path):
    """T610: {task} in an argument is its number."""
    words = ("run.output_dir=" + str(tmp_path / "task-{task}"), "run.seed={task}")
    job = submit(TRAIN, make(), *words, options=("--array=3-4", "--nodes=1", "--ntasks-per-node=1"))
    lab.until(lambda: all(has_step(tmp_path / f"task-{n}", 20) for n in (3, 4)), 300, "step 20 of both tasks")
    lab.send(f"{job}_3", "USR1")
    ended = lab.wait_all(job, 400)
    assert sorted(one.restarts for one in ended) == [0, 1] and {one.state for one in ended} == {"COMPLETED"}
    assert [steps_of(tmp_path / f"task-{n}") == list(range(1, 241)) for n in (3, 4)] == [True, True]


def test_a_heterogeneous_job_is_one_run_over_its_parts_and_is_requeued_whole(cluster, make, tmp_path):
    """T610."""
    with Loop(make(), ("--nodes=1", ":", "--nodes=1")) as loop:
        loop.wait_step(20)
        lab.send(loop.job, "USR1")
        lab.until(lambda: has_step(loop.folder, 240), 400, "the last step")
        told = [json.loads(path.read_text()) for path in sorted(loop.folder.glob("logs/*/job.json"))]
        assert [(len(set(one["hosts"])), one["ranks"], one["restarts"]) for one in told] == [
            (2, [1, 1], n) for n in (0, 1)
        ]
        assert steps_of(loop.folder) == list(range(1, 241)), "no step twice, none left out"


def test_where_a_requeue_is_refused_a_successor_with_the_same_options_goes_on(cluster, make):
    """T611: the real refusal, of a job that may not be requeued."""
    with Loop(make(), (*TWO_NODES, "--no-requeue", "--time=9", "--job-name=odd name")) as loop:
        loop.wait_step(20)
        lab.send(loop.job, "USR1")
        lab.until(lambda: has_step(loop.folder, 240), 400, "the last step")
        (path,) = loop.folder.glob("logs/*/successor")
        successor = path.read_text().strip()
        assert lab.wait(loop.job, 60).state == "COMPLETED" and lab.wait(successor, 120).state == "COMPLETED"
        before, after = lab.record(loop.job), lab.record(successor)
        for name in ("TimeLimit", "NumNodes", "Partition", "JobName", "StdOut", "CPUs/Task"):
            assert after[name] == before[name], name
        assert steps_of(loop.folder) == list(range(1, 241))


GPUS = {
    "gpus-per-node": (("--nodes=2", "--gpus-per-node=2"), [2, 2]),
    "gres and one task": (("--nodes=2", "--gres=gpu:2", "--ntasks-per-node=1"), [2, 2]),
    "gpus-per-task": (("--ntasks=4", "--gpus-per-task=1"), [2, 2]),
    "gpus, unevenly": (("--nodes=2", "--gpus=3"), [2, 1]),
}


@pytest.mark.parametrize("way", GPUS)
def test_one_rank_for_each_gpu_whichever_way_it_was_asked_for(cluster, make, submit, way):
    """Fake GPUs, so the ranks compute on the CPU; where they run is SLURM's."""
    if not re.search(r"gpu:\D*2", lab.call("sinfo", "--noheader", "--format=%G")):
        pytest.skip("the nodes have no two GPUs")
    options, ranks = GPUS[way]
    yaml = make(**SHORT, **{"training.global_batch_size": 12, "training.micro_batch_size_per_gpu": 1})
    assert lab.wait(submit(TRAIN, yaml, options=options), 300).state == "COMPLETED"
    told = job_told(yaml.with_suffix(""))
    assert sorted(told["ranks"], reverse=True) == ranks
    (start,) = (line for line in lines_of(yaml.with_suffix("") / "events.jsonl") if line["event"] == "start")
    assert start["world_size"] == sum(ranks)


def test_nodes_that_do_not_divide_the_batch_idle_and_the_run_goes_on_with_fewer(cluster, make, submit):
    if len(cluster) < 3:
        pytest.skip(f"three nodes are needed, there are {len(cluster)}")
    yaml = make(**SHORT)
    job = submit(TRAIN, yaml, options=("--nodes=3", "--ntasks-per-node=1"))
    assert lab.wait(job, 300).state == "COMPLETED"
    assert job_told(yaml.with_suffix(""))["ranks"] == [1, 1]
    assert "1 of 3 nodes stay idle" in lab.log_of(job, 20000)


@pytest.mark.slow
def test_the_same_folder_on_half_the_nodes_goes_on_with_the_same_samples(cluster, make):
    """4 nodes, then 2: the global batch and the order of samples stay."""
    if len(cluster) < 4:
        pytest.skip(f"four nodes are needed, there are {len(cluster)}")
    settings = {"model.dropout": {"embedding": 0.0, "attention": 0.0, "residual": 0.0}}
    loops.straight(make("straight", **settings))
    expected = read_metrics(make("straight", **settings).with_suffix("") / "metrics.jsonl")
    yaml = make(**settings)
    with Loop(yaml, ("--nodes=4", "--ntasks-per-node=1"), DSGPT_REQUEUE="no") as loop:
        loop.wait_step(30)
        lab.send(loop.job, "USR1")
        assert lab.wait(loop.job, 120).state == "COMPLETED"
    with Loop(yaml, TWO_NODES) as loop:
        assert lab.wait(loop.job, 300).state == "COMPLETED"
        lines = read_metrics(loop.folder / "metrics.jsonl")
    assert [(line["step"], line["consumed_samples"]) for line in lines] == [
        (line["step"], line["consumed_samples"]) for line in expected
    ]
    # The loss is that of these samples: another order is off by percents at once.
    assert max(abs(one["loss"] / other["loss"] - 1) for one, other in zip(lines, expected, strict=True)) < 1e-3
