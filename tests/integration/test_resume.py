"""Resume on the same topology is bit-identical: losses, learning rates, data, weights and moments, in real ranks."""

from __future__ import annotations

import json
import resource

import pytest
import torch

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.config import load_config
from dsgpt.errors import DsgptError, Preempted
from dsgpt.process import StopRequest
from dsgpt.train.resolve import resolve_run
from tests.pool import ranks


class StopAt(StopRequest):
    """Asks to stop on one rank only, at a given poll: the others learn of it from the agreement."""

    def __init__(self, rank, wanted_rank, polls):
        super().__init__()
        self.left = polls if rank == wanted_rank else -1

    def poll(self):
        self.left -= 1
        return self.left == 0


def train_here(world, yaml, overrides, stop_after, attempt):
    from dsgpt.train.loop import train

    world.attempt = attempt
    plan = resolve_run(load_config([yaml], overrides).config, world_size=world.size, device="cpu")
    try:
        return train(plan, world, StopAt(world.rank, world.size - 1, stop_after)).step
    except Preempted as error:
        return str(error)
    except DsgptError as error:
        return f"{type(error).__name__}: {error}"


def metrics(folder):
    """step -> what must repeat exactly; a step logged twice (before and after a stop) keeps the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "learning_rate", "gradient_norm", "data_crc", "consumed_samples")
    return {line["step"]: [float(line[key]).hex() for key in keys] for line in lines if "step" in line}


def stop_changes_nothing(straight, stopped, after, steps):
    """Train one run straight and its twin stopped once: the numbers of every step and the last bits are the same.

    Returns the losses by step.
    """
    pool = ranks(2)
    assert pool.run(train_here, straight, [], 0, "a") == [steps, steps]
    assert f"stopped at step {after}" in pool.run(train_here, stopped, [], after, "b")[0]
    assert pool.run(train_here, stopped, [], 0, "c") == [steps, steps]
    one, two = (yaml.parent / yaml.stem for yaml in (straight, stopped))
    assert metrics(two) == metrics(one)
    last = f"checkpoints/step-{steps:08d}"
    assert hashes(two / last) == hashes(one / last)
    return [float.fromhex(numbers[0]) for _, numbers in sorted(metrics(one).items())]


def hashes(checkpoint):
    return {name: entry["sha256"] for name, entry in commit.read_manifest(checkpoint)["files"].items()}


@pytest.mark.parametrize("stage", ["zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_run_stopped_twice_equals_an_uninterrupted_one_bit_for_bit(write_run, tmp_path, dataset, stage):
    steps, pool = 30, ranks(2)
    straight = write_run("straight", **{"training.max_steps": steps, "deepspeed": stage})
    stopped = write_run("stopped", **{"training.max_steps": steps, "deepspeed": stage})
    plan = resolve_run(load_config([straight]).config, world_size=2, device="cpu")
    assert plan.gradient_accumulation_steps == 2
    assert plan.data.samples_per_epoch % 16 and plan.data.samples_per_epoch / 16 < 13, (
        "every part must cross the edge of an epoch, inside a step"
    )

    assert pool.run(train_here, straight, [], 0, "a1") == [steps, steps]
    first = pool.run(train_here, stopped, [], 7, "b1")
    second = pool.run(train_here, stopped, [], 6, "b2")
    assert "stopped at step 7 of 30" in first[0] and "stopped at step 7 of 30" in first[1]
    assert "stopped at step 13 of 30" in second[0]
    assert pool.run(train_here, stopped, [], 0, "b3") == [steps, steps]

    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    last = f"checkpoints/step-{steps:08d}"
    assert hashes(tmp_path / "stopped" / last) == hashes(tmp_path / "straight" / last)
    losses = [float.fromhex(values[0]) for _, values in sorted(metrics(tmp_path / "straight").items())]
    assert losses[-1] < losses[0] - 0.3, "nothing was learned, so nothing was tested"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_a_run_without_a_good_one_ends(write_run, tmp_path):
    yaml = write_run("damaged", **{"training.max_steps": 6, "checkpoint.save_interval": 2})
    pool = ranks(2)
    pool.run(train_here, yaml, [], 0, "a")
    newest = tmp_path / "damaged/checkpoints/step-00000006/rank-00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    assert pool.run(train_here, yaml, ["training.max_steps=8"], 0, "b") == [8, 8]
    events = [json.loads(line) for line in (tmp_path / "damaged/events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] in ("checkpoint_rejected", "resumed")] == [
        "checkpoint_rejected",
        "resumed",
    ]
    assert next(e["step"] for e in events if e["event"] == "resumed") == 4
    for _, path in commit.list_committed(tmp_path / "damaged/checkpoints"):
        (path / "rank-00000.safetensors").write_bytes(b"")
    result = pool.run(train_here, yaml, ["training.max_steps=9"], 0, "c")
    assert all("no committed checkpoint is intact" in text for text in result)


def test_a_folder_with_another_run_or_other_data_is_refused_and_left_as_it_is(write_run, tmp_path):
    pool = ranks(2)
    yaml = write_run("one", **{"training.max_steps": 2, "optimizer.warmup_steps": 0})
    pool.run(train_here, yaml, [], 0, "a")
    before = hashes(tmp_path / "one/checkpoints/step-00000002")
    result = pool.run(train_here, yaml, ["model.hidden_size=64", "training.max_steps=4"], 0, "b")
    assert "holds another run: model.hidden_size differs" in result[0] and "there 32, now 64" in result[0]
    result = pool.run(train_here, yaml, ["resume=fresh"], 0, "c")
    assert "resume=fresh, but the folder holds committed work" in result[0]
    assert hashes(tmp_path / "one/checkpoints/step-00000002") == before


def test_another_number_of_ranks_and_another_stage_read_the_same_state(write_run, tmp_path):
    yaml = write_run("moved", **{"training.max_steps": 4})
    ranks(2).run(train_here, yaml, [], 0, "a")
    saved = CheckpointReader(tmp_path / "moved/checkpoints/step-00000004")
    whole = {
        (name, kind): saved.tensor(name, kind)
        for name in saved.parameters
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }
    # A learning rate of 0 for one step changes no master; moments move on, so only masters are compared.
    overrides = [
        "training.max_steps=5",
        "deepspeed=zero3",
        "optimizer.learning_rate=1e-30",
        "optimizer.min_learning_rate=0",
    ]
    assert ranks(1).run(train_here, yaml, overrides, 0, "b") == [5]
    moved = CheckpointReader(tmp_path / "moved/checkpoints/step-00000005")
    assert moved.manifest["world_size"] == 1 and moved.manifest["zero_stage"] == 3
    for (name, kind), value in whole.items():
        if kind == "master":
            assert torch.equal(moved.tensor(name), value), name


class FullDisk(StopRequest):
    """Rank 1 may not write more than 4 KiB to a file during some steps: a real error from the kernel, on one rank only."""

    def __init__(self, rank, steps):
        super().__init__()
        self.step, self.steps = 0, steps if rank == 1 else ()

    def poll(self):
        self.step += 1
        limit = 4096 if self.step in self.steps else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return False


def train_with_full_disk(world, yaml, steps, attempt):
    from dsgpt.train.loop import train

    world.attempt = attempt
    plan = resolve_run(load_config([yaml]).config, world_size=world.size, device="cpu")
    try:
        return train(plan, world, FullDisk(world.rank, steps)).step
    except DsgptError as error:
        return int(error.exit_code), str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_save_that_fails_on_one_rank_is_reported_and_training_goes_on(write_run, tmp_path):
    yaml = write_run("full", **{"training.max_steps": 6, "checkpoint.save_interval": 2})
    assert ranks(2).run(train_with_full_disk, yaml, (2,), "a") == [6, 6]
    assert [step for step, _ in commit.list_committed(tmp_path / "full/checkpoints")] == [4, 6]
    events = [json.loads(line) for line in (tmp_path / "full/events.jsonl").read_text().splitlines()]
    (failed,) = [event for event in events if event["event"] == "save_failed"]
    assert failed["step"] == 2 and "rank 1" in failed["text"]
    assert not list((tmp_path / "full/checkpoints").glob(".tmp*"))


def test_three_failed_saves_in_a_row_end_the_run_on_all_ranks_with_76(write_run, tmp_path):
    yaml = write_run("fuller", **{"training.max_steps": 20, "checkpoint.save_interval": 2})
    for code, text in ranks(2).run(train_with_full_disk, yaml, range(3, 20), "a"):
        assert code == 76 and "the checkpoint of step 8 was not written" in text
    ((step, path),) = commit.list_committed(tmp_path / "fuller/checkpoints")
    assert step == 2 and commit.verify(path) == []
