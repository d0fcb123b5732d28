"""The noise on embeddings is that of transformers' own hook, in training alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from dsgpt.config import ModelConfig
from dsgpt.model.gpt import GPT
from dsgpt.model.hf import build_hf, hf_model_config
from dsgpt.train.build import _add_noise
from tests.hf_models import hf_config

ALPHA, SHAPE = 5.0, (3, 24)


def native():
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    return GPT(ModelConfig(**sizes, intermediate_size=64, vocab_size=50, max_position_embeddings=24))


def of_transformers(kind):
    model = build_hf(hf_model_config(hf_config(kind, 50).to_dict(), 1, "here"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("make", [native, lambda: of_transformers("opt"), lambda: of_transformers("gpt_neox")])
def test_it_is_transformers_noise_on_the_token_embeddings_in_training_alone(make):
    torch.manual_seed(0)
    model = make()
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model.embed_tokens
    ids = torch.randint(50, SHAPE)
    model.eval()
    plain, logits = embedding(ids), model(ids)
    _add_noise(model, ALPHA)
    assert torch.equal(embedding(ids), plain) and torch.equal(model(ids), logits)
    model.train()
    torch.manual_seed(7)
    noisy = embedding(ids)
    embedding.neftune_noise_alpha = ALPHA
    torch.manual_seed(7)
    theirs = neftune_post_forward_hook(embedding, (), plain)
    torch.testing.assert_close(noisy, theirs, rtol=0, atol=1e-6)  # they take the root in fp32
    noise = (noisy - plain).detach()
    strength = ALPHA / (SHAPE[1] * plain.shape[-1]) ** 0.5
    assert float(noise.abs().max()) <= strength * 1.0001
    assert float(noise.std()) == pytest.approx(strength / 3**0.5, rel=0.05)
    assert not torch.allclose(model(ids), logits)
