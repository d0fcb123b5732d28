"""fp16's loss scale on real ranks: DeepSpeed's own scaler in fp32 engines, where scaling must change nothing, and real fp16.

CPUs without fast kernels for fp16 compute in it too; only DeepSpeed asks for them, and is told here that they are there.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from dsgpt.config import fill_deepspeed, load_config
from dsgpt.errors import ConfigError, DsgptError, NumericalError
from dsgpt.loss_scale import LossScale
from dsgpt.model.gpt import GPT
from dsgpt.partitioned import MASTER
from dsgpt.process import StopRequest
from dsgpt.train.left_out import LeftOutSteps
from dsgpt.train.resolve import resolve_run
from dsgpt.train.state import RunLog
from dsgpt.train.step import StepReport
from tests import test_engine as plain
from tests.pool import ranks

# Cutting a gradient to a norm also repairs a wrong factor in it.
NO_CLIPPING = 100.0
IN_DEFAULT_TIER = ("zero1", "zero3")
CONFIGS = [
    pytest.param(name, marks=() if name in IN_DEFAULT_TIER else pytest.mark.slow)
    for name in ("zero1", "zero2", "zero3", "zero2_offload_optimizer", "zero3_offload")
]


def use_scaler(engine, power, *, window=1000, hysteresis=1, minimum=1.0):
    scaler = DynamicLossScaler(2.0**power, window, minimum, hysteresis, False, dtype=torch.half)
    engine._optimizer.loss_scaler, engine._loss_scale = scaler, LossScale(scaler)


def scale_of(engine):
    return math.log2(engine.loss_scale["cur_scale"])


def train_scaled(world, name):
    engine = plain.build(world, name, gradient_clipping=NO_CLIPPING)
    use_scaler(engine, 120)  # the rehearsal would overflow, also in fp32
    before = engine.loss_scale
    plain.rehearse(engine)
    unchanged = engine.loss_scale == before
    use_scaler(engine, 16, window=3)
    losses, norms = plain.run_steps(engine, world, range(plain.STEPS))
    return unchanged, scale_of(engine), losses, norms, {n: engine.full_parameter(n) for n in engine.parameter_shapes()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_scaled_loss_trains_as_an_unscaled_one_also_in_the_step_in_which_the_scale_grows(name):
    unchanged, power, losses, norms, parameters = ranks(plain.WORLD).run(train_scaled, name)[0]
    expected_losses, expected_norms, expected = plain.plain_loop(NO_CLIPPING)
    assert unchanged, "the rehearsal changed the scaler's numbers"
    assert power == 17, (
        "doubled after step 3 and not after step 6: iterations count from 0, an overflow counts as before 0"
    )
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert all(
        plain.relative_error(parameters[key], value) < 1e-5 for key, value in expected.items() if key in parameters
    )


def overflow_once(engine, world, poison=math.inf):
    """One micro-batch on one rank has one gradient that is not finite."""
    parameter = dict(engine.module.named_parameters())["blocks.0.mlp.up_proj.weight"]
    for micro_step, row in enumerate(plain.batches(2)):
        factor = poison if world.rank == plain.WORLD - 1 and micro_step == 0 else 1.0
        handle = parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
        engine.forward_backward(row[world.rank], plain.targets_of(2), micro_step == plain.ACCUMULATION - 1)
        handle.remove()


def overflow_on_ranks(world, name):
    engine = plain.build(world, name)
    plain.rehearse(engine)
    use_scaler(engine, 16, window=2, hysteresis=2, minimum=2.0**14)
    plain.run_steps(engine, world, range(2))
    state, results = plain.read_all(engine), []
    for _ in range(5):
        overflow_once(engine, world)
        result = engine.step(1e-2)
        same = all(torch.equal(value, state[key]) for key, value in plain.read_all(engine).items())
        results.append((result.applied, result.overflow, math.log2(result.loss_scale), scale_of(engine), same))
    before = engine.loss_scale
    plain.accumulate(engine, world, 2)
    discarded = engine.discard()
    kept = engine.loss_scale == before and not discarded.applied and not discarded.overflow
    straight = plain.run_steps(engine, world, range(2, 6)), engine.loss_scale
    use_scaler(engine, 16, window=2, hysteresis=2, minimum=2.0**14)
    plain.restore(engine, state, optimizer_steps=2)
    engine.loss_scale = json.loads(json.dumps(before))
    return results, kept, straight, (plain.run_steps(engine, world, range(2, 6)), engine.loss_scale)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_overflow_on_one_rank_is_left_out_on_all_and_lowers_the_scale_down_to_its_minimum(name):
    for results, kept, straight, resumed in ranks(plain.WORLD).run(overflow_on_ranks, name):
        assert results == [  # applied, overflow, scale of the step, scale after it, state unchanged
            (False, True, 16, 16, True),  # hysteresis 2 lets one pass
            (False, True, 16, 15, True),
            (False, True, 15, 14, True),
            (False, False, 14, 14, True),  # nothing left to lower: a bad step
            (False, False, 14, 14, True),
        ]
        assert kept, "a loss that is not finite says nothing about the scale"
        assert straight[1]["cur_scale"] == 2.0**15, "two steps without an overflow, and the scale grew again"
        assert resumed == straight, "the numbers saved and restored continue as if nothing had been in between"


def train_in_fp16(world, name):
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    engine = plain.build(world, name, "fp16", fp16={"enabled": True, "initial_scale_power": 30, "hysteresis": 1})
    before = engine.loss_scale
    plain.rehearse(engine)
    unchanged, search = engine.loss_scale == before, []
    while not search or search[-1].overflow:
        plain.accumulate(engine, world, 0)
        search.append(engine.step(0.0))
    found = scale_of(engine)
    plain.rehearse(engine)  # no moments again
    torch.manual_seed(7)  # at stage 3 the weights were drawn in fp16, with other numbers
    weights = {name: p.detach().flatten() for name, p in GPT(plain.MODEL).named_parameters()}
    engine.load(lambda f, kind: weights[f.name][f.start : f.start + f.numel], (MASTER,), 0)
    engine.loss_scale = engine.loss_scale | {"cur_scale": 2.0**10}  # away from the edge
    plain.accumulate(engine, world, 1)
    assert not engine.discard().applied and scale_of(engine) == 10
    losses, norms = plain.run_steps(engine, world, range(plain.STEPS))
    return unchanged, len(search) - 1, found, losses, norms, engine._optimizer.gradient_accumulation_dtype


@pytest.mark.parametrize("name", CONFIGS)
def test_fp16_itself_finds_its_scale_and_learns_what_fp32_learns(name):
    unchanged, lowered, power, losses, norms, sums = ranks(plain.WORLD).run(train_in_fp16, name)[0]
    expected_losses, expected_norms, _ = plain.plain_loop()
    assert unchanged, "the rehearsal changed the scaler's numbers"
    assert lowered > 5 and power == 30 - lowered
    assert losses == pytest.approx(expected_losses, rel=1e-2)
    assert norms[0] == pytest.approx(expected_norms[0], rel=2e-3)
    assert sums is torch.float32, "micro-batches are summed in fp32"


class StopAfter(StopRequest):
    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def poll(self):
        self.left -= 1
        return self.left == 0


def train_run(world, yaml, keys, stop_after, attempt):
    """`dsgpt train` on these ranks; with `keys` in fp16, which no run on a CPU resolves to."""
    from dsgpt.train.loop import train

    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    world.attempt = attempt
    plan = resolve_run(load_config([yaml]).config, world_size=world.size, device="cpu")
    if keys:
        training = plan.config.training.model_copy(update={"dtype": "fp16"})
        config = plan.config.model_copy(update={"training": training})
        filled = fill_deepspeed(config, world.size)
        plan = replace(plan, config=config, deepspeed=filled | {"fp16": {"enabled": True, **keys}})
    try:
        return train(plan, world, StopAfter(stop_after)).skipped_steps
    except DsgptError as error:
        return int(error.exit_code), str(error)


def lines(folder, name, event=""):
    rows = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return [row for row in rows if not event or row["event"] == event]


def metrics(folder):
    keys = ("loss", "learning_rate", "gradient_norm", "loss_scale", "data_crc")
    return {line["step"]: [line[key] for key in keys] for line in lines(folder, "metrics") if "step" in line}


def test_a_run_in_fp16_stopped_and_resumed_has_the_losses_and_scales_of_an_uninterrupted_one(write_run, tmp_path):
    keys = {"initial_scale_power": 22, "loss_scale_window": 2, "hysteresis": 2}
    pool, length = ranks(2), {"training.max_steps": 16}
    straight, stopped = write_run("straight", **length), write_run("stopped", **length)
    assert pool.run(train_run, straight, keys, 0, "a")[0] > 2
    assert "stopped at step 5" in pool.run(train_run, stopped, keys, 5, "b")[0][1]
    assert "stopped at step 9" in pool.run(train_run, stopped, keys, 4, "c")[0][1]
    pool.run(train_run, stopped, keys, 0, "d")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    lowered = lines(tmp_path / "straight", "events", "loss_scale_lowered")
    assert (lowered[0]["step"], lowered[0]["old"], lowered[0]["new"]) == (1, 2.0**22, 2.0**22)
    assert (lowered[1]["step"], lowered[1]["old"], lowered[1]["new"]) == (2, 2.0**22, 2.0**21)
    assert not lines(tmp_path / "straight", "events", "bad_step")


def test_a_checkpoint_without_a_loss_scale_continues_in_fp16_with_the_initial_one_and_says_so(write_run, tmp_path):
    yaml = write_run("switched", **{"training.max_steps": 4})
    assert "stopped at step 2" in ranks(2).run(train_run, yaml, {}, 2, "a")[0][1]
    assert ranks(2).run(train_run, yaml, {"initial_scale_power": 8}, 0, "b") == [0, 0]
    (event,) = lines(tmp_path / "switched", "events", "loss_scale_reset")
    assert event["new"] == 256 and "fp32" in event["text"]
    assert [line.get("loss_scale") for line in lines(tmp_path / "switched", "metrics") if "step" in line] == [
        None,
        None,
        256,
        256,
    ]


def test_five_overflows_at_the_smallest_scale_end_the_run_with_79_and_without_a_foreign_error(write_run, tmp_path):
    yaml = write_run("floor", **{"training.max_steps": 20})
    keys = {"initial_scale_power": 32, "min_loss_scale": 2**30, "hysteresis": 1}
    for code, text in ranks(2).run(train_run, yaml, keys, 0, "a"):
        assert code == 79 and "5 steps in a row" in text and "loss scale" in text
    assert len(lines(tmp_path / "floor", "events", "loss_scale_lowered")) == 2
    assert len(lines(tmp_path / "floor", "events", "bad_step")) == 5


@pytest.mark.gpu
def test_gpus_train_in_fp16_and_resume(write_run, tmp_path):
    yaml = write_run("gpu", **{"device": "cuda", "training.dtype": "fp16", "training.micro_batch_size_per_gpu": 1})
    for steps in (6, 12):
        command = [sys.executable, "-m", "dsgpt", "train", str(yaml), f"training.max_steps={steps}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = lines(tmp_path / "gpu", "metrics")
    assert [row["step"] for row in rows] == list(range(1, 13)) and all(row["loss_scale"] > 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not lines(tmp_path / "gpu", "events", "loss_scale_reset")


def report(applied=True, overflow=False, loss=1.0):
    return StepReport(loss, 1.0, 1, applied, False, 0, loss_scale=4.0, overflow=overflow)


def test_a_lowered_scale_neither_counts_as_a_bad_step_nor_makes_up_for_one(tmp_path):
    steps = LeftOutSteps(RunLog(tmp_path, "a", enabled=True))
    bad, lowered, good = report(applied=False), report(applied=False, overflow=True), report()
    for one in (bad, bad, bad, bad, good, *[lowered] * 9, bad, bad, lowered, bad, bad):
        steps.check(one, 1, 0, 2.0)
    with pytest.raises(NumericalError, match="5 steps in a row"):
        steps.check(report(applied=True, loss=math.nan), 1, 0, 2.0)


def test_fp16_on_a_cpu_is_refused(write_run):
    with pytest.raises(ConfigError, match="fp16 training needs a GPU"):
        resolve_run(load_config([write_run()], ["training.dtype=fp16"]).config, world_size=2, device="cpu")
