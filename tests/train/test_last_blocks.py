"""The rule behind fine_tuning.num_last_blocks: auto, in its four cases and without a second validation set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dsgpt.config import Dropout, ModelConfig
from dsgpt.train.last_blocks import block_parameters, choose

MODEL = ModelConfig(
    hidden_size=32, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4, head_dim=8, intermediate_size=64,
    vocab_size=100, max_position_embeddings=64, dropout=Dropout(),
)  # fmt: skip
BLOCK = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32  # attention, SwiGLU, two norms


def run(tokens):
    sources = (SimpleNamespace(num_samples=tokens // 64),)
    return SimpleNamespace(
        data=SimpleNamespace(train=sources),
        config=SimpleNamespace(training=SimpleNamespace(seq_length=64)),
        model=MODEL,
    )


def test_a_block_is_counted_without_embeddings_and_head():
    assert BLOCK <= block_parameters(MODEL) <= BLOCK + 32  # the final norm is shared out


@pytest.mark.parametrize(
    ("tokens", "losses", "number"),
    [
        (BLOCK // 2, {"domain": 2.0, "general": 2.0}, 1),
        (BLOCK // 2, {"domain": 3.0, "general": 2.0}, 2),
        (BLOCK * 2, {"domain": 2.0, "general": 2.0}, 4),
        (BLOCK * 2, {"domain": 3.0, "general": 2.0}, 8),
        (BLOCK * 2, {"general": 2.0, "domain": 2.2}, 4),  # by its name, wherever it stands
        (BLOCK * 2, {"support": 3.0, "web": 2.0}, 8),  # else the second is general text
        (BLOCK // 2, {"domain": 3.0}, 2),
        (BLOCK // 2, {}, 2),
    ],
)
def test_the_four_cases(tokens, losses, number):
    choice = choose(run(tokens), losses)
    assert choice.num_last_blocks == number
    assert f"num_last_blocks = {number} of 8" in choice.text
