"""Adapters that could not come out again are refused before they are trained."""

from __future__ import annotations

import pytest

from dsgpt.config import LoraSection
from dsgpt.errors import ConfigError
from dsgpt.model.lora import add_adapters
from tests.hf_models import hf_config


def test_an_adapter_beside_a_tied_head_is_refused_and_beside_one_of_its_own_is_not():
    from transformers import AutoModelForCausalLM

    settings, models = LoraSection(target_modules=("lm_head", "layers.0.self_attn.q_proj")), {}
    for tied in (True, False):
        config = hf_config("mistral", 97)
        config.tie_word_embeddings = tied
        models[tied] = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"another layer shares(.|\n)*seen: lm_head"):
        add_adapters(models[True], settings, "model.layers.")
    chosen = add_adapters(models[False], settings, "model.layers.")
    assert chosen == ["model.layers.0.self_attn.q_proj", "lm_head"]
