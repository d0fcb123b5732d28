"""Import and export against transformers: the same logits in both directions, unknown settings refused by name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsgpt.errors import ConfigError
from dsgpt.model.gpt import GPT
from dsgpt.model.hf_format import hf_config, to_hf
from dsgpt.model.hf_import import read_hf_config, read_hf_weights
from tests.model.test_gpt import GPT2, KINDS, LLAMA, make

STORIES = Path(__file__).parents[3] / "shared/data/weights/stories260K-hf"


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_export(model, folder):
    state = dict(model.named_parameters())
    save_file(
        {name: tensor.detach() for name, tensor in to_hf(model.config, state.__getitem__)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(hf_config(model.config, 1, 2)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_exported_weights_give_the_same_logits_in_transformers_and_come_back(kind, bias, tmp_path):
    config = KINDS[kind]
    if bias and kind == "llama":
        config = config.model_copy(update={"bias": True, "tie_word_embeddings": False})
    assert config.export_format == kind
    model = make(config).eval()
    write_export(model, tmp_path)
    ids = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = model(ids), transformers_model(tmp_path)(ids).logits
    assert ours.std() > 1
    assert (ours - theirs).abs().max() < 1e-5
    again = read_hf_config(tmp_path)
    assert again == config
    state = read_hf_weights(tmp_path, again)
    for name, value in model.named_parameters():
        assert torch.equal(state[name], value), name


def combinations():
    """Every native combination at a tiny size."""
    axes = {
        "norm": ("rmsnorm", "layernorm", "batchnorm"), "position_embedding": ("rotary", "learned"),
        "activation": ("swiglu", "gelu"), "bias": (False, True), "qk_norm": (False, True),
        "tie_word_embeddings": (False, True), "num_key_value_heads": (2, 4),
    }  # fmt: skip
    for values in itertools.product(*axes.values()):
        yield LLAMA.model_copy(update={"num_attention_heads": 4, **dict(zip(axes, values, strict=True))})


@pytest.mark.parametrize(
    "kind, count", [("llama", 8), ("qwen3", 4), ("gpt2", 1), pytest.param("dsgpt", 179, marks=pytest.mark.slow)]
)
def test_every_native_combination_has_a_format_that_gives_it_back(kind, count, tmp_path):
    """What Hugging Face holds is read by transformers too, with the same logits; the rest by dsgpt alone."""
    ids = torch.randint(LLAMA.vocab_size, (2, 12), generator=torch.Generator().manual_seed(2))
    found = [config for config in combinations() if config.export_format == kind]
    assert len(found) == count
    for config in found:
        model = make(config).eval()
        state = dict(model.state_dict())
        if kind == "dsgpt" and config.tie_word_embeddings:
            del state["lm_head.weight"]
        tensors = dict(to_hf(config, state.__getitem__)) if kind != "dsgpt" else state
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(hf_config(config, 1, 2)))
        assert read_hf_config(tmp_path) == config
        again = read_hf_weights(tmp_path, config)
        assert all(torch.equal(again[name], state[name]) for name in again.keys() | tensors.keys() if name in state)
        if kind != "dsgpt":
            with torch.no_grad():
                ours, theirs = model(ids), transformers_model(tmp_path)(ids).logits
            assert ours.std() > 1
            assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_models_made_by_transformers_import_with_equal_logits(kind, tmp_path):
    import transformers

    common = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "max_position_embeddings": 24}  # fmt: skip
    torch.manual_seed(0)
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=24, initializer_range=0.3, **common
        ),
        "llama": lambda: transformers.LlamaConfig(**sizes, initializer_range=0.3, rope_theta=5e4, **common),
        "qwen3": lambda: transformers.Qwen3Config(**sizes, head_dim=16, initializer_range=0.3, **common),
    }[kind]()  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT(read_hf_config(tmp_path)).eval()
    state = read_hf_weights(tmp_path, ours.config)
    ours.load_state_dict(state, strict=False)
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() >= 1
        assert (ours(ids) - expected).abs().max() < 1e-5


def test_settings_that_are_not_implemented_are_refused_by_name_all_at_once(tmp_path):
    raw = hf_config(LLAMA, 1, 2) | {"rope_scaling": {"type": "yarn"}, "hidden_act": "relu", "surprise": 3}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as caught:
        read_hf_config(tmp_path)
    for key in ("rope_scaling", "hidden_act", "surprise"):
        assert key in str(caught.value)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    model = make(GPT2)
    write_export(model, tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.extra"] = tensors.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"(?s)h.1.mlp.c_fc.weight.*h.0.extra"):
        read_hf_weights(tmp_path, GPT2)


@pytest.mark.skipif(not STORIES.exists(), reason="the pretrained model is not beside the clone")
def test_a_real_pretrained_model_has_transformers_loss():
    config = read_hf_config(STORIES)
    model = GPT(config).eval()
    state = read_hf_weights(STORIES, config)
    model.load_state_dict({**state, "lm_head.weight": state.get("lm_head.weight", state["embed_tokens.weight"])})
    from dsgpt.tokenizer.tokenizer import Tokenizer

    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = torch.tensor([Tokenizer.load(STORIES).encode_document(text)])
    with torch.no_grad():
        expected = transformers_model(STORIES)(ids, labels=ids).loss
        ours = model(ids[:, :-1], labels=ids[:, 1:].contiguous()) / (ids.shape[1] - 1)
    assert float(expected) < 2.5, "a trained model"
    assert float(ours) == pytest.approx(float(expected), abs=1e-5)
