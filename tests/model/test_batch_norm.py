"""Batch norm against torch.nn.BatchNorm1d over the valid tokens, and over ranks against one process holding all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsgpt.config import Dropout, ModelConfig
from dsgpt.config.schema import OptimizerSection
from dsgpt.engine import Engine, construct
from dsgpt.model.batch_norm import BatchNorm, MicroStep
from dsgpt.model.gpt import GPT, PADDING
from dsgpt.model.recompute import apply_activation_checkpointing
from dsgpt.optimizer import build_optimizer
from tests.pool import ranks

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 101, "max_position_embeddings": 16, "dropout": Dropout(),
}  # fmt: skip
BIASED = ModelConfig(**SIZES, norm="batchnorm", bias=True, position_embedding="learned", activation="gelu")
GATED = ModelConfig(**SIZES, norm="batchnorm", tie_word_embeddings=False)
# A bias that only shifts what a batch norm sees has gradient 0; Adam would make whole steps of the rounding.
OPTIMIZER = OptimizerSection(name="sgd", learning_rate=0.2, weight_decay=0.05)
STEPS, ACCUMULATION, MICRO_BATCH, LENGTH = 5, 2, 4, 12


def test_it_computes_what_torch_computes_over_the_valid_tokens_alone():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(6, 1e-5), nn.BatchNorm1d(6, 1e-5)
    with torch.no_grad():
        ours.weight.copy_(torch.rand(6) + 0.5)
        ours.bias.copy_(torch.randn(6))
        theirs.load_state_dict({**ours.state_dict(), "num_batches_tracked": torch.tensor(0)})
    valid = torch.rand(3, 7) < 0.6
    for _ in range(3):
        x = torch.randn(3, 7, 6) * 3 + 40  # a mean far from 0: the one-pass variance would be wrong
        x, y = x.clone().requires_grad_(), x[valid].clone().requires_grad_()
        out, expected = ours(x, MicroStep(valid)), theirs(y)
        weights = torch.randn(expected.shape)
        (out[valid] * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(out[valid], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad[valid], y.grad, rtol=1e-4, atol=1e-5)
        assert not x.grad[~valid].any()
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-5, atol=0)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, MicroStep(valid))[valid], theirs(y), rtol=1e-5, atol=1e-5)


def test_a_gradient_at_padding_flows_as_autograd_says():
    torch.manual_seed(1)
    norm, valid = BatchNorm(4, 1e-5), torch.tensor([[True, True, False], [True, False, False]])
    x = torch.randn(2, 3, 4, requires_grad=True)
    weights = torch.randn(2, 3, 4)
    (norm(x, MicroStep(valid)) * weights).sum().backward()
    ours, x.grad = x.grad, None
    mean, variance = x[valid].mean(0), x[valid].var(0, unbiased=False)
    (((x - mean) * torch.rsqrt(variance + 1e-5)) * weights).sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-4, atol=1e-5)


def micro_batches(step):
    """The step's micro-batches, each (MICRO_BATCH, LENGTH): ids of a small language, rows of uneven length padded."""
    generator = torch.Generator().manual_seed(step)
    result = []
    for _ in range(ACCUMULATION):
        ids = torch.randint(17, (MICRO_BATCH, 1), generator=generator)
        for _ in range(LENGTH):
            ids = torch.cat((ids, (ids[:, -1:] * 3 + torch.randint(2, (MICRO_BATCH, 1), generator=generator)) % 17), 1)
        labels, documents = ids[:, 1:].clone(), torch.zeros(MICRO_BATCH, LENGTH, dtype=torch.int32)
        for row in range(MICRO_BATCH):
            end = LENGTH - (row * 3) % 7  # rank 1's rows are the shorter ones
            labels[row, end:], documents[row, end:] = -100, PADDING
        result.append({"input_ids": ids[:, :-1].contiguous(), "labels": labels, "document_ids": documents})
    return result


def targets(step):
    return float(sum((batch["labels"] != -100).sum() for batch in micro_batches(step)))


def initial_model(config):
    torch.manual_seed(3)
    return GPT(config)


def in_one_process(config):
    """The plain loop, with statistics from torch's own BatchNorm1d over the valid tokens."""
    model = initial_model(config)
    for module in list(model.modules()):
        if isinstance(module, BatchNorm):
            _use_torch(module)
    optimizer = build_optimizer(model, OPTIMIZER)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for batch in micro_batches(step):
            loss = model(**batch) / targets(step)
            loss.backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.learning_rate
        optimizer.step()
        losses.append(total)
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


def _use_torch(norm):
    """Let F.batch_norm do this norm's work: valid tokens only, padding set to 0."""

    def forward(x, micro_step):
        y = torch.zeros_like(x)
        y[micro_step.valid] = nn.functional.batch_norm(
            x[micro_step.valid], norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, norm.eps
        )
        return y

    norm.forward = forward


def build(world, config, stage, dtype="fp32", recompute="none"):
    half = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if dtype == "bf16" else {}
    settings = {
        **half,
        "train_micro_batch_size_per_gpu": MICRO_BATCH // world.size,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,  # left out, DeepSpeed clips to 1
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
    }
    model = construct(lambda: initial_model(config), settings)
    apply_activation_checkpointing(model.blocks, recompute)
    return Engine(model, build_optimizer(model, OPTIMIZER), settings, world)


def share(batch, world):
    rows = MICRO_BATCH // world.size
    return {name: value[world.rank * rows :][:rows].contiguous() for name, value in batch.items()}


def accumulate(world, engine, step):
    """All micro-steps of a step, up to the update; the step's mean loss over all ranks."""
    total = 0.0
    for number, batch in enumerate(micro_batches(step)):
        total += float(engine.forward_backward(share(batch, world), targets(step), number == ACCUMULATION - 1))
    return world.sum(total)[0] / targets(step)


def on_ranks(world, config, stage, recompute):
    engine = build(world, config, stage, recompute=recompute)
    engine.rehearse(share(micro_batches(99)[0], world))
    losses = []
    for step in range(STEPS):
        losses.append(accumulate(world, engine, step))
        engine.step(OPTIMIZER.learning_rate)
    shapes = engine.parameter_shapes()
    parameters = {name: engine.full_parameter(name).view(shape) for name, shape in shapes.items()}
    return losses, parameters | engine.buffers()


@pytest.mark.parametrize(
    "stage, recompute, config",
    [
        pytest.param(0, "none", BIASED, marks=pytest.mark.slow),
        pytest.param(1, "selective", BIASED, marks=pytest.mark.slow),
        (1, "none", GATED),
        pytest.param(2, "full", GATED, marks=pytest.mark.slow),
        (2, "selective", GATED),
        pytest.param(3, "none", BIASED, marks=pytest.mark.slow),
        pytest.param(3, "selective", GATED, marks=pytest.mark.slow),
        (3, "full", BIASED),
    ],
)
def test_two_ranks_measure_what_one_process_measures_once_per_micro_step(stage, recompute, config):
    expected_losses, expected = in_one_process(config)
    losses, state = ranks(2).run(on_ranks, config, stage, recompute)[0]
    assert expected_losses[-1] < expected_losses[0] - 0.1, "nothing was learned, so nothing was compared"
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in state.items():
        error = float((value - expected[name]).norm() / max(1e-2, float(expected[name].norm())))
        assert error < 1e-5, (name, error)


def bad_step_on_ranks(world, stage, dtype):
    engine = build(world, GATED, stage, dtype)
    accumulate(world, engine, 0)
    engine.step(OPTIMIZER.learning_rate)
    before = {name: value.clone() for name, value in engine.buffers().items()}
    accumulate(world, engine, 1)
    moved = any(not torch.equal(value, before[name]) for name, value in engine.buffers().items())
    applied = engine.discard().applied
    kept = all(torch.equal(value, before[name]) for name, value in engine.buffers().items())
    return moved, applied, kept, {value.dtype for value in engine.buffers().values()}


@pytest.mark.parametrize("stage, dtype", [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_a_step_left_out_leaves_the_running_statistics_as_they_were_in_fp32(stage, dtype):
    assert ranks(2).run(bad_step_on_ranks, stage, dtype)[1] == (True, False, True, {torch.float32})
