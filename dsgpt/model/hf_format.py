"""The native GPT in Hugging Face's formats: GPT-2, Llama and Qwen3, through one explicit key table.

`ModelConfig.export_format` says which format holds a model. `hf_config` and `to_hf` give config.json and tensors;
`find_parts` says where native tensors lie in them. A combination that none of the three holds has the format "dsgpt": the
same folder layout, with native names, which only dsgpt reads.

Trade-off: tensors are converted one Hugging Face tensor at a time (`to_hf` is a generator), so an export holds one tensor
more than the model, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsgpt.config import ModelConfig
from dsgpt.errors import ConfigError, Problem

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "dsgpt": "GPT",
}
FORMAT_VERSION = 1  # of dsgpt's own format


class Key(NamedTuple):
    """One Hugging Face tensor: its name, the native tensors it holds (joined along rows), whether it is transposed."""

    hf: str
    native: tuple[str, ...]
    transposed: bool = False


def _projection(hf: str, native: tuple[str, ...], bias: bool, transposed: bool = False) -> Iterator[Key]:
    yield Key(f"{hf}.weight", tuple(f"{name}.weight" for name in native), transposed)
    if bias:
        yield Key(f"{hf}.bias", tuple(f"{name}.bias" for name in native))


def key_table(config: ModelConfig) -> list[Key]:
    """Every tensor of the model's Hugging Face format, in layer order."""
    keys: list[Key] = []
    if config.export_format == "gpt2":
        keys += [Key("transformer.wte.weight", ("embed_tokens.weight",))]
        keys += [Key("transformer.wpe.weight", ("embed_positions.weight",))]
        for i in range(config.num_hidden_layers):
            hf, native = f"transformer.h.{i}", f"blocks.{i}"
            keys += _projection(f"{hf}.ln_1", (f"{native}.attention_norm",), True)
            joined = tuple(f"{native}.attention.{name}_proj" for name in "qkv")
            keys += _projection(f"{hf}.attn.c_attn", joined, True, transposed=True)
            keys += _projection(f"{hf}.attn.c_proj", (f"{native}.attention.o_proj",), True, transposed=True)
            keys += _projection(f"{hf}.ln_2", (f"{native}.mlp_norm",), True)
            keys += _projection(f"{hf}.mlp.c_fc", (f"{native}.mlp.up_proj",), True, transposed=True)
            keys += _projection(f"{hf}.mlp.c_proj", (f"{native}.mlp.down_proj",), True, transposed=True)
        return [*keys, *_projection("transformer.ln_f", ("norm",), True)]
    keys += [Key("model.embed_tokens.weight", ("embed_tokens.weight",))]
    for i in range(config.num_hidden_layers):
        hf, native = f"model.layers.{i}", f"blocks.{i}"
        keys += [Key(f"{hf}.input_layernorm.weight", (f"{native}.attention_norm.weight",))]
        for name in "qkvo":
            keys += _projection(f"{hf}.self_attn.{name}_proj", (f"{native}.attention.{name}_proj",), config.bias)
        if config.qk_norm:
            for name in "qk":
                keys += [Key(f"{hf}.self_attn.{name}_norm.weight", (f"{native}.attention.{name}_norm.weight",))]
        keys += [Key(f"{hf}.post_attention_layernorm.weight", (f"{native}.mlp_norm.weight",))]
        for name in ("gate", "up", "down"):
            keys += _projection(f"{hf}.mlp.{name}_proj", (f"{native}.mlp.{name}_proj",), config.bias)
    keys += [Key("model.norm.weight", ("norm.weight",))]
    if not config.tie_word_embeddings:
        keys += [Key("lm_head.weight", ("lm_head.weight",))]
    return keys


def to_hf(config: ModelConfig, tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor), asking `tensor` for one native tensor by name at a time."""
    for key in key_table(config):
        joined = torch.cat([tensor(name) for name in key.native]) if len(key.native) > 1 else tensor(key.native[0])
        yield key.hf, joined.t().contiguous() if key.transposed else joined.contiguous()


def layer_names(config: ModelConfig, layers: Collection[str]) -> dict[str, str]:
    """The Hugging Face name of each native layer, from the key table. Raises ConfigError for what has none of its own."""
    keys = {key.native[0]: key for key in key_table(config) if len(key.native) == 1 and config.export_format != "dsgpt"}
    joined = sorted(layer for layer in layers if f"{layer}.weight" not in keys)
    if joined:
        raise ConfigError(
            f"layers of this model are no layers of their own in the format {config.export_format}",
            seen=f"{', '.join(joined[:3])}{', ...' if len(joined) > 3 else ''}",
            do="export the merged model: leave out --adapter",
        )
    return {layer: keys[f"{layer}.weight"].hf.removesuffix(".weight") for layer in layers}


class Part(NamedTuple):
    """Where a native tensor lies: `rows` rows (None: all) from `row` on of the tensor `source`, transposed before that
    where it says so."""

    source: str
    row: int = 0
    rows: int | None = None
    transposed: bool = False


def find_parts(config: ModelConfig, given: Collection[str]) -> dict[str, Part]:
    """Which of the given Hugging Face tensors holds each native one.

    Missing and unexpected names are all reported at once (ConfigError).
    """
    keys = key_table(config)
    known = {key.hf for key in keys}
    # Written by older releases of transformers: causal masks and rotary frequencies, which are constants.
    constants = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    # GPT-2's hub checkpoints leave out the "transformer." prefix.
    names = {name if name in known else f"transformer.{name}": name for name in given}
    ignored = {"lm_head.weight", "transformer.lm_head.weight"} if config.tie_word_embeddings else set()
    problems = [Problem("tensor missing from the checkpoint", seen=name) for name in sorted(known - set(names))]
    problems += [
        Problem("tensor the model has no place for", seen=source)
        for name, source in sorted(names.items())
        if name not in known | ignored and not source.endswith(constants)
    ]
    if problems:
        raise ConfigError(problems=problems)
    parts: dict[str, Part] = {}
    for key in keys:
        row = 0
        for native, rows in zip(key.native, _row_counts(config, key), strict=True):
            parts[native] = Part(names[key.hf], row, rows, key.transposed)
            row += rows or 0
    return parts


def take_part(value: Tensor, part: Part) -> Tensor:
    """A view of a native tensor in the Hugging Face one that holds it."""
    value = value.t() if part.transposed else value
    return value[part.row :][: part.rows]


def _row_counts(config: ModelConfig, key: Key) -> list[int] | list[None]:
    if len(key.native) == 1:
        return [None]
    kv_rows = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, kv_rows, kv_rows]


def hf_config(config: ModelConfig, bos_id: int | None, eos_id: int | None, dtype: str = "float32") -> dict[str, Any]:
    """config.json of the exported model, whose weights are in `dtype`."""
    architecture = config.export_format
    common = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": config.vocab_size,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if architecture == "dsgpt":
        return common | {"format_version": FORMAT_VERSION, "model": config.model_dump(mode="json")}
    if architecture == "gpt2":
        return common | {
            "n_embd": config.hidden_size,
            "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads,
            "n_inner": config.intermediate_size,
            "n_positions": config.max_position_embeddings,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "embd_pdrop": config.dropout.embedding,
            "attn_pdrop": config.dropout.attention,
            "resid_pdrop": config.dropout.residual,
        }
    rotary = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias,
        "attention_dropout": config.dropout.attention,
    }
    return common | rotary | ({"mlp_bias": config.bias} if architecture == "llama" else {})
