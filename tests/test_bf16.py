"""bf16 gradients of many micro-steps are summed in fp32: against a sum made here, at stages 1 to 3."""

from __future__ import annotations

import pytest
import torch

from dsgpt.config import Dropout, ModelConfig
from dsgpt.config.schema import OptimizerSection
from dsgpt.engine import Engine, construct
from dsgpt.model.gpt import GPT
from dsgpt.optimizer import build_optimizer
from tests.pool import ranks

MODEL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
    vocab_size=101, max_position_embeddings=16, dropout=Dropout(), tie_word_embeddings=False,
)  # fmt: skip
MICRO_STEPS, MICRO_BATCH, LENGTH = 12, 2, 12
TARGETS = MICRO_STEPS * MICRO_BATCH * LENGTH


def build(world, stage):
    config = {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": MICRO_STEPS,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
    }
    torch.manual_seed(5)
    model = construct(lambda: GPT(MODEL), config)
    return Engine(model, build_optimizer(model, OptimizerSection(learning_rate=1e-3)), config, world)


def micro_batch(number, rank):
    generator = torch.Generator().manual_seed(1000 * rank + number)
    ids = torch.randint(MODEL.vocab_size, (MICRO_BATCH, LENGTH + 1), generator=generator)
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def accumulated(world, stage):
    """This rank's gradients of all micro-steps together, and of each alone, as they lie before the update."""
    engine = build(world, stage)
    alone = []
    for number in range(MICRO_STEPS):
        engine.forward_backward(micro_batch(number, world.rank), TARGETS * world.size, last=True)
        alone.append(flat_gradients(engine))
        assert not engine.discard().applied
    for number in range(MICRO_STEPS):
        engine.forward_backward(micro_batch(number, world.rank), TARGETS * world.size, number == MICRO_STEPS - 1)
    return flat_gradients(engine), alone


def flat_gradients(engine):
    gradients = engine._gradients()
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_gradients_of_many_micro_steps_are_summed_in_fp32(stage):
    together, alone = ranks(2).run(accumulated, stage)[-1]
    in_fp32, in_bf16 = torch.zeros_like(together), torch.zeros_like(together, dtype=torch.bfloat16)
    for gradient in alone:
        in_fp32 += gradient
        in_bf16 += gradient.bfloat16()
    assert (in_bf16 - in_fp32).norm() > 2e-3 * in_fp32.norm(), "summing in bf16 must lose something"
    assert (together - in_fp32).norm() < 1e-6 * in_fp32.norm()


def whole_gradients(world, stage):
    from deepspeed.utils import safe_get_full_grad

    engine = build(world, stage)
    for number in range(MICRO_STEPS):
        engine.forward_backward(micro_batch(number, world.rank), TARGETS * world.size, number == MICRO_STEPS - 1)
    return {name: safe_get_full_grad(p).float().clone() for name, p in engine.parameters()}


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_of_all_ranks_are_summed_in_fp32(stage):
    """Against a plain bf16 model on each rank's batches (at stage 3 the products themselves round differently)."""
    torch.manual_seed(5)
    model = GPT(MODEL).bfloat16()
    expected = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for rank in range(2):
        for number in range(MICRO_STEPS):
            model.zero_grad()
            (model(**micro_batch(number, rank)) / TARGETS).backward()
            for name, p in model.named_parameters():
                expected[name] += p.grad.float() / 2
    found = ranks(2).run(whole_gradients, stage)[1]
    for name, value in expected.items():
        assert (found[name].view_as(value) - value).norm() < 1e-6 * value.norm(), name
