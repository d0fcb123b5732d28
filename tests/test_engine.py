"""The engine against a plain PyTorch loop, and its partitioned state, with every shipped DeepSpeed config that two CPU
ranks can run: ZeRO stages 0-3, optimizer and weights in host memory or not."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.utils.cpp_extension

from dsgpt.config import Dropout, ModelConfig, fill_deepspeed, load_config
from dsgpt.config.deepspeed import find_deepspeed_config
from dsgpt.config.schema import OptimizerSection
from dsgpt.engine import Engine, construct
from dsgpt.model.gpt import GPT
from dsgpt.optimizer import build_optimizer, learning_rate
from tests.pool import ranks

MODEL = ModelConfig(
    hidden_size=33, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=49,
    vocab_size=101, max_position_embeddings=16, dropout=Dropout(),
)  # fmt: skip
OPTIMIZER = {"learning_rate": 3e-2, "warmup_steps": 2, "weight_decay": 0.1}
STEPS, MICRO, ACCUMULATION, WORLD, LENGTH = 6, 2, 2, 2, 12
# Beside shipped ones two that people write themselves: a shipped one and what is added to it.
OWN = {
    "zero1_offload": ("zero1", {"offload_optimizer": {"device": "cpu"}}),
    "zero3_hpz2": ("zero3", {"zero_hpz_partition_size": 2}),  # zero3_hpz for nodes of two
}
SHIPPED = ["zero0", "zero1", "zero2", "zero3", "zero2_offload_optimizer", "zero3_offload"]
CONFIGS = [*SHIPPED, *OWN]
BF16_SUMS = "zero0_bf16"  # stage 0 has no fp32 sums, which one has to accept in the file
CASES = [(BF16_SUMS, "bf16"), *((name, "fp32") for name in SHIPPED), *((name, "bf16") for name in CONFIGS[1:])]
# One of a kind each; the others are left to the slow tier.
DEFAULT_CONFIGS = ("zero1", "zero3", "zero3_offload")
DEFAULT_CASES = (("zero0", "fp32"), ("zero1", "bf16"), ("zero2_offload_optimizer", "fp32"), ("zero3", "bf16"))


def deepspeed_config(name, dtype="fp32"):
    """A DeepSpeed config as a run fills it in."""
    shipped, added = OWN.get(name, (name, {}))
    if name == BF16_SUMS:
        shipped = Path(tempfile.gettempdir()) / f"{name}-{os.getpid()}.json"
        own = json.loads(Path(find_deepspeed_config("zero0")).read_text()) | {
            "data_types": {"grad_accum_dtype": "bf16"}
        }
        shipped.write_text(json.dumps(own))
    overrides = [f"training.dtype={dtype}", "training.max_grad_norm=0.5", f"training.micro_batch_size_per_gpu={MICRO}"]
    overrides += [f"training.global_batch_size={MICRO * ACCUMULATION * WORLD}", f"deepspeed={shipped}"]
    config = fill_deepspeed(load_config(["quickstart"], overrides).config, WORLD)
    zero = config["zero_optimization"]
    zero |= added
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 1000  # some are gathered for each layer, some stay whole
    if zero["stage"]:
        zero["reduce_bucket_size"] = 5000  # several a step, as in a real model
    return config


def batches(step):
    """All micro-batches of a step, [micro-step][rank]; masked unevenly, so averaging by micro-batch would be wrong."""
    generator = torch.Generator().manual_seed(step % 2)
    result = []
    for micro_step in range(ACCUMULATION):
        row = []
        for rank in range(WORLD):
            ids = torch.randint(MODEL.vocab_size, (MICRO, LENGTH + 1), generator=generator)
            labels = ids[:, 1:].clone()
            labels[:, : 3 * rank + 2 * micro_step] = -100
            row.append({"input_ids": ids[:, :-1].contiguous(), "labels": labels})
        result.append(row)
    return result


def targets_of(step):
    return sum(int((batch["labels"] != -100).sum()) for row in batches(step) for batch in row)


def plain_loop(max_norm=0.5):
    torch.manual_seed(7)
    model = GPT(MODEL)
    config = OptimizerSection(**OPTIMIZER)
    optimizer = build_optimizer(model, config)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = 0.0
        for row in batches(step):
            for batch in row:
                hidden = model(**batch) / targets_of(step)
                hidden.backward()
                loss += float(hidden.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, STEPS)
        optimizer.step()
        losses.append(loss)
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


compile_extension = torch.utils.cpp_extension.load


def no_build(*arguments, **keywords):
    raise AssertionError("DeepSpeed compiles a C++ extension")


def build(world, name, dtype="fp32", **keys):
    torch.utils.cpp_extension.load = compile_extension if name == "zero3_nvme" else no_build
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ allows one engine a process
    config = deepspeed_config(name, dtype) | keys
    torch.manual_seed(7)
    model = construct(lambda: GPT(MODEL), config)
    return Engine(model, build_optimizer(model, OptimizerSection(**OPTIMIZER)), config, world)


def run_steps(engine, world, steps):
    losses, norms = [], []
    for step in steps:
        total = 0.0
        for micro_step, row in enumerate(batches(step)):
            last = micro_step == ACCUMULATION - 1
            total += float(engine.forward_backward(row[world.rank], targets_of(step), last))
        losses.append(world.sum(total)[0] / targets_of(step))
        result = engine.step(learning_rate(OptimizerSection(**OPTIMIZER), step, STEPS))
        assert result.applied
        norms.append(result.gradient_norm)
    return losses, norms


def rehearse(engine):
    engine.rehearse(batches(99)[0][0])


def accumulate(engine, world, step):
    for micro_step, row in enumerate(batches(step)):
        engine.forward_backward(row[world.rank], targets_of(step), micro_step == ACCUMULATION - 1)


def gradient_norm(engine, world):
    squares = sum(float(gradient.float().norm()) ** 2 for gradient in engine._gradients())
    return (squares if engine.stage == 0 else world.sum(squares)[0]) ** 0.5


def train_on_ranks(world, name, dtype="fp32"):
    engine = build(world, name, dtype)
    before = {name: engine.full_parameter(name).clone() for name in engine.parameter_shapes()}
    rehearse(engine)
    same = all(torch.equal(engine.full_parameter(name), value) for name, value in before.items())
    accumulate(engine, world, 0)
    held = gradient_norm(engine, world)
    engine.discard()
    losses, norms = run_steps(engine, world, range(STEPS))
    assert held == pytest.approx(norms[0], rel=1e-5)
    return same, losses, norms, {name: engine.full_parameter(name) for name in engine.parameter_shapes()}


def relative_error(value, expected):
    return float((value.view_as(expected) - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT_CONFIGS else pytest.mark.slow) for name in CONFIGS]
)
def test_every_config_computes_what_a_plain_loop_computes_after_an_undone_rehearsal(name):
    same, losses, norms, parameters = ranks(WORLD).run(train_on_ranks, name)[0]
    expected_losses, expected_norms, expected = plain_loop()
    assert same, "the rehearsal changed the weights"
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert expected_losses[-1] < expected_losses[0] - 0.1, "nothing was learned, so nothing was tested"
    for key, value in expected.items():
        if key in parameters:
            assert relative_error(parameters[key], value) < 1e-5, key


@pytest.mark.parametrize(
    "name, offloaded",
    [("zero2", "zero2_offload_optimizer"), pytest.param("zero3", "zero3_offload", marks=pytest.mark.slow)],
)
def test_in_bf16_offloading_changes_only_where_the_step_is_computed(name, offloaded):
    _, losses, norms, parameters = ranks(WORLD).run(train_on_ranks, name, "bf16")[0]
    same, *there = ranks(WORLD).run(train_on_ranks, offloaded, "bf16")[0]
    assert same, "the rehearsal changed the weights"
    assert there[1][0] == pytest.approx(norms[0], rel=1e-5)
    # From then on a norm that differs in its last bit makes weights differ in bf16's last bit: 4e-3 of them.
    assert there[0] == pytest.approx(losses, rel=1e-3)
    assert all(relative_error(there[2][key], value) < 1e-2 for key, value in parameters.items())


def cases():
    for case in CASES:
        yield pytest.param(*case, marks=() if case in DEFAULT_CASES else pytest.mark.slow)


def read_all(engine):
    """All of this rank's state by fragment and kind; at stage 0 whole parameters, because each rank must load them."""
    fragments = engine.fragments() if engine.stage else engine._whole(engine._parameters)
    return {(f, kind): engine.read(f, kind).clone() for f in fragments for kind in engine.state_kinds}


def restore(engine, state, optimizer_steps):
    engine.load(lambda fragment, kind: state[(fragment, kind)], engine.state_kinds, optimizer_steps)


def resume_on_ranks(world, name, dtype):
    straight = build(world, name, dtype)
    rehearse(straight)
    run_steps(straight, world, range(3))
    state = read_all(straight)
    expected = run_steps(straight, world, range(3, STEPS))
    resumed = build(world, name, dtype)
    rehearse(resumed)
    restore(resumed, state, optimizer_steps=3)
    restored = read_all(resumed)
    assert all(torch.equal(restored[key], value) for key, value in state.items())
    owned = {f.name: 0 for f in straight.fragments()}
    for f in straight.fragments():
        owned[f.name] += f.numel
    return expected, run_steps(resumed, world, range(3, STEPS)), owned


@pytest.mark.parametrize("name, dtype", cases())
def test_state_read_and_loaded_back_continues_bit_for_bit(name, dtype):
    results = ranks(WORLD).run(resume_on_ranks, name, dtype)
    for expected, resumed, _ in results:
        assert resumed == expected
    shapes = {name: p.numel() for name, p in GPT(MODEL).named_parameters()}
    total = {name: sum(owned.get(name, 0) for _, _, owned in results) for name in shapes}
    assert total == shapes, "all ranks together own every element exactly once"


def poison_on_ranks(world, name, dtype):
    """Steps 3 and 4 from the same state three times: after a bad gradient on one rank, after a discarded step, after
    nothing. Returns for each whether the step was applied, whether it left the state as it was, and the two steps."""
    engine = build(world, name, dtype)
    rehearse(engine)
    run_steps(engine, world, range(2))
    before, results = read_all(engine), []
    for kind in ("gradient", "discard", "nothing"):
        applied = False
        if kind != "nothing":
            parameter = dict(engine.module.named_parameters())["blocks.0.mlp.up_proj.weight"]
            poison = float("nan") if kind == "gradient" and world.rank == WORLD - 1 else 1.0
            handle = parameter.register_hook(lambda gradient, factor=poison: gradient * factor)
            accumulate(engine, world, 2)
            handle.remove()
            applied = (engine.step(1e-2) if kind == "gradient" else engine.discard()).applied
        unchanged = all(torch.equal(value, before[key]) for key, value in read_all(engine).items())
        results.append((applied, unchanged, run_steps(engine, world, range(3, 5))))
        restore(engine, before, optimizer_steps=2)
    return results


@pytest.mark.parametrize("name, dtype", cases())
def test_a_bad_step_leaves_weights_and_moments_untouched_on_all_ranks(name, dtype):
    for results in ranks(WORLD).run(poison_on_ranks, name, dtype):
        assert [(applied, unchanged) for applied, unchanged, _ in results] == [(False, True)] * 3
        after_gradient, after_discard, after_nothing = (steps for _, _, steps in results)
        assert after_gradient == after_discard == after_nothing, "and nothing of it is in the next steps"
