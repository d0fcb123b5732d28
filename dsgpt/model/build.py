"""The model of a config, whichever code implements it; parts of it by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from dsgpt.config.model import HFModelConfig, ModelConfig
from dsgpt.errors import ConfigError
from dsgpt.model.gpt import GPT


def build_model(config: ModelConfig) -> nn.Module:
    """The native GPT, or a model of transformers, whose weights must be loaded before it is used."""
    if isinstance(config, HFModelConfig):
        from dsgpt.model.hf import build_hf

        return build_hf(config)
    return GPT(config)


def import_what_builds(config: ModelConfig, adapters: bool) -> None:
    """Before ZeRO-3 replaces torch's constructors: transformers and peft import torch's compiler, which then fails."""
    if adapters:
        import peft  # noqa: F401
    if isinstance(config, HFModelConfig):
        from dsgpt.model.hf import import_architecture

        import_architecture(config)


def model_shapes(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Of a model's parameters, a shared one once under its first name, and of the buffers it saves; makes neither."""
    if isinstance(config, HFModelConfig):
        from dsgpt.model.hf import skeleton

        model: nn.Module = skeleton(config)
    else:
        with torch.device("meta"):
            model = GPT(config)
    saved, shapes = model.state_dict(), dict[str, tuple[int, ...]]
    parameters = shapes((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    return parameters, shapes((name, tuple(buffer.shape)) for name, buffer in model.named_buffers() if name in saved)


def vocabulary_names(config: ModelConfig) -> list[str]:
    """The parameters that have a row for each token: the input embeddings and the head, a shared one once."""
    if not isinstance(config, HFModelConfig):
        return ["embed_tokens.weight"] if config.tie_word_embeddings else ["embed_tokens.weight", "lm_head.weight"]
    from dsgpt.model.hf import skeleton

    model = skeleton(config)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    theirs = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in theirs]


def blocks_prefix(names: Iterable[str], num_blocks: int) -> str:
    """What the names of all blocks' parameters begin with: "blocks." of blocks.0.…, "model.layers." of model.layers.0.…

    Raises ConfigError where no list of so many blocks is there.
    """
    found = Counter(
        (match[1], int(match[2])) for name in names if (match := re.match(r"((?:[^.\d][^.]*\.)+)(\d+)\.", name))
    )
    complete = [
        prefix
        for prefix in {prefix for prefix, _ in found}
        if {number for one, number in found if one == prefix} == set(range(num_blocks))
    ]
    if not complete:
        seen = (
            f"{num_blocks} blocks expected; lists here: {', '.join(sorted({prefix for prefix, _ in found})) or 'none'}"
        )
        raise ConfigError("the model's blocks are not found by their names", seen=seen)
    return max(complete, key=lambda prefix: sum(count for (one, _), count in found.items() if one == prefix))


def block_of(name: str, prefix: str) -> int | None:
    """Which block a parameter belongs to, None outside the blocks."""
    return int(name[len(prefix) :].split(".", 1)[0]) if name.startswith(prefix) else None


def blocks_of(model: nn.Module, prefix: str) -> nn.ModuleList:
    blocks = model.get_submodule(prefix.rstrip("."))
    assert isinstance(blocks, nn.ModuleList)
    return blocks
