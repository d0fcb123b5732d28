"""The engine against a plain PyTorch loop, and its partitioned state, at ZeRO stages 0-3 on two real ranks."""

from __future__ import annotations

import pytest
import torch

from dsgpt.config import Dropout, ModelConfig
from dsgpt.config.schema import OptimizerSection
from dsgpt.engine import MASTER, Engine, construct
from dsgpt.model.gpt import GPT
from dsgpt.optimizer import build_optimizer, learning_rate
from tests.pool import ranks

MODEL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
    vocab_size=101, max_position_embeddings=16, dropout=Dropout(),
)  # fmt: skip
OPTIMIZER = {"learning_rate": 3e-2, "warmup_steps": 2, "weight_decay": 0.1}
STEPS, MICRO, ACCUMULATION, WORLD, LENGTH = 6, 2, 2, 2, 12
STAGES = [0, 1, 2, 3]


def deepspeed_config(stage, dtype="fp32"):
    half = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if dtype == "bf16" else {}
    return {
        **half,
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
    }


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


def plain_loop():
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
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, STEPS)
        optimizer.step()
        losses.append(loss)
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def build(world, stage, dtype="fp32"):
    config = deepspeed_config(stage, dtype)
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


def train_on_ranks(world, stage):
    engine = build(world, stage)
    before = {name: engine.full_parameter(name).clone() for name in engine.parameter_shapes()}
    rehearse(engine)
    same = all(torch.equal(engine.full_parameter(name), value) for name, value in before.items())
    losses, norms = run_steps(engine, world, range(STEPS))
    return same, losses, norms, {name: engine.full_parameter(name) for name in engine.parameter_shapes()}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_computes_what_a_plain_loop_computes_after_an_undone_rehearsal(stage):
    same, losses, norms, parameters = ranks(WORLD).run(train_on_ranks, stage)[0]
    expected_losses, expected_norms, expected = plain_loop()
    assert same, "the rehearsal changed the weights"
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert expected_losses[-1] < expected_losses[0] - 0.1, "nothing was learned, so nothing was tested"
    for name, value in expected.items():
        if name in parameters:
            error = (parameters[name].view_as(value) - value).norm() / value.norm()
            assert error < 1e-5, (name, error)


def read_all(engine):
    return {(f, kind): engine.read(f, kind).clone() for f in engine.fragments() for kind in engine.state_kinds}


def resume_on_ranks(world, stage, dtype):
    straight = build(world, stage, dtype)
    rehearse(straight)
    run_steps(straight, world, range(3))
    state = read_all(straight)
    whole = {}
    if stage == 0:
        for name, p in straight.parameters():
            whole[(name, MASTER)] = p.detach().flatten().clone()
            for kind in straight.state_kinds[1:]:
                whole[(name, kind)] = straight._optimizer.state[p][kind].flatten().clone()
    expected = run_steps(straight, world, range(3, STEPS))
    resumed = build(world, stage, dtype)
    rehearse(resumed)
    source = (lambda f, kind: whole[(f.name, kind)]) if stage == 0 else (lambda f, kind: state[(f, kind)])
    resumed.load(source, resumed.state_kinds, optimizer_steps=3)
    restored = read_all(resumed)
    assert all(torch.equal(restored[key], value) for key, value in state.items())
    owned = {f.name: 0 for f in straight.fragments()}
    for f in straight.fragments():
        owned[f.name] += f.numel
    return expected, run_steps(resumed, world, range(3, STEPS)), owned


@pytest.mark.parametrize(
    "stage, dtype", [*((stage, "fp32") for stage in STAGES), *((stage, "bf16") for stage in (1, 2, 3))]
)
def test_state_read_and_loaded_back_continues_bit_for_bit(stage, dtype):
    results = ranks(WORLD).run(resume_on_ranks, stage, dtype)
    for expected, resumed, _ in results:
        assert resumed == expected
    shapes = {name: p.numel() for name, p in GPT(MODEL).named_parameters()}
    total = {name: sum(owned.get(name, 0) for _, _, owned in results) for name in shapes}
    assert total == shapes, "all ranks together own every element exactly once"


def poison_on_ranks(world, stage, dtype, discard):
    engine = build(world, stage, dtype)
    rehearse(engine)
    run_steps(engine, world, range(2))
    before = read_all(engine)
    handles = []
    if world.rank == WORLD - 1 and not discard:
        parameter = dict(engine.module.named_parameters())["blocks.0.mlp.up_proj.weight"]
        handles.append(parameter.register_hook(lambda gradient: gradient * float("nan")))
    for micro_step, row in enumerate(batches(2)):
        engine.forward_backward(row[world.rank], targets_of(2), micro_step == ACCUMULATION - 1)
    result = engine.discard() if discard else engine.step(1e-2)
    for handle in handles:
        handle.remove()
    unchanged = all(torch.equal(value, before[key]) for key, value in read_all(engine).items())
    losses, _ = run_steps(engine, world, range(3, 5))
    return result.applied, unchanged, losses


@pytest.mark.parametrize(
    "stage, dtype", [*((stage, "fp32") for stage in STAGES), *((stage, "bf16") for stage in (1, 2, 3))]
)
@pytest.mark.parametrize("discard", [False, True], ids=["nan gradient on one rank", "discarded for its loss"])
def test_a_bad_step_leaves_weights_and_moments_untouched_on_all_ranks(stage, dtype, discard):
    for applied, unchanged, losses in ranks(WORLD).run(poison_on_ranks, stage, dtype, discard):
        assert not applied
        assert unchanged
        assert all(0 < loss < 10 for loss in losses), "and the next steps are good again"
