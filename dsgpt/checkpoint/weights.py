"""Weights from anywhere: a run folder, one of its checkpoints, or a Hugging Face folder.

MODEL on the command line is a run folder (its newest commit; `RUN@STEP` or `RUN@best` for another), a checkpoint folder, or
a Hugging Face folder such as an export (`hf:FOLDER` says so explicitly, `hf:NAME` is a model in the hub's cache).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.locate import locate_checkpoint, run_of, split_step
from dsgpt.checkpoint.plain import PlainWeights
from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.config import HFModelConfig, ModelConfig, parse_model
from dsgpt.errors import CheckpointError, Problem
from dsgpt.hub import locate_hf
from dsgpt.model.build import build_model, model_shapes
from dsgpt.model.hf_import import open_hf_weights, read_architecture
from dsgpt.model.tensor_reader import GrownReader, TensorReader, refuse_other_shapes

if TYPE_CHECKING:
    from dsgpt.partitioned import Fragment


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # as configs and options name them


@dataclass(frozen=True)
class ModelLocation:
    """Where a MODEL argument leads: a committed checkpoint or a Hugging Face folder, and its tokenizer folder."""

    path: Path
    is_checkpoint: bool
    tokenizer: Path


def find_model(text: str) -> ModelLocation:
    """Resolve a MODEL argument. Raises CheckpointError when nothing usable is there, ConfigError for an unknown hf:NAME."""
    if text.startswith("hf:"):
        folder = locate_hf(text[3:])
        return ModelLocation(folder, False, folder)
    folder, step = split_step(text)
    if not step and (folder / "config.json").exists():
        return ModelLocation(folder, False, folder)
    checkpoint = locate_checkpoint(text)
    return ModelLocation(checkpoint, True, run_of(checkpoint) / "tokenizer")


def require_intact(checkpoint: Path) -> None:
    """Raise CheckpointError when any file differs from the manifest's hash."""
    problems = commit.verify(checkpoint)
    if problems:
        raise CheckpointError(
            problems=[Problem(p.what, p.seen, p.do or "use an older checkpoint: RUN@STEP") for p in problems]
        )


def read_model_config(location: ModelLocation) -> ModelConfig:
    """What model it is, without its weights."""
    if location.is_checkpoint:
        return parse_model(CheckpointReader(location.path).manifest["model"])
    return read_architecture(location.path)


def load_model(
    location: ModelLocation, device: str = "cpu", trust: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model on one device, in evaluation mode, its checkpoint verified first; parameters in `dtype`, buffers in fp32.

    `trust` allows a Hugging Face folder's pytorch_model.bin, which may execute code. In memory are the model and one tensor.
    Raises ConfigError where a model of transformers does not compute what is expected of it.
    """
    tensors: TensorReader
    if location.is_checkpoint:
        require_intact(location.path)
        reader = CheckpointReader(location.path)
        config, tensors = parse_model(reader.manifest["model"]), PlainWeights(reader)
        what = "the checkpoint does not fit its model"
        refuse_other_shapes(what, tensors.shapes, model_shapes(config)[0])
        buffers = reader.buffers()
    else:
        config, buffers = read_architecture(location.path), {}
        tensors = open_hf_weights(location.path, config, trust)
    if isinstance(config, HFModelConfig):
        model = build_model(config)
        _convert(model, dtype)
    else:
        with torch.device("meta"):
            model = build_model(config)
        _convert(model, dtype)
        model.to_empty(device=device)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in (*tensors.shapes, *buffers):
        named[name].data.copy_(buffers[name] if name in buffers else tensors.tensor(name))
    model.to(device).eval()
    if isinstance(config, HFModelConfig):
        from dsgpt.model.hf import check_forward

        check_forward(model, config.vocab_size, torch.device(device), documents=False)
    return model


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: what a model computes beforehand (rotary frequencies) needs fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class InitialWeights:
    """What a new run starts from: `read` is the source for `Engine.load`, `buffers` are the running statistics.

    `bytes_read` tells what this rank has read so far; 0 where nobody counts.
    """

    read: Callable[[Fragment, str], Tensor]
    buffers: dict[str, Tensor]
    bytes_read: Callable[[], int] = lambda: 0


def checkpoint_weights(checkpoint: Path, rows: Mapping[str, int] | None = None) -> InitialWeights:
    """Those of a verified checkpoint; what adapters there add is in the matrices. `rows` as in `GrownReader`."""
    reader = CheckpointReader(checkpoint)
    weights = GrownReader(PlainWeights(reader), rows or {})
    return InitialWeights(
        lambda fragment, kind: weights.read(fragment.name, fragment.start, fragment.numel),
        reader.buffers(),
        lambda: reader.bytes_read,
    )


def hf_weights(
    folder: Path, config: ModelConfig, trust: bool = False, rows: Mapping[str, int] | None = None
) -> InitialWeights:
    """Those of a Hugging Face folder, of the architecture it has; `trust` as in `load_model`, `rows` as in `GrownReader`."""
    reader = GrownReader(open_hf_weights(folder, config, trust), rows or {})
    return InitialWeights(
        lambda fragment, kind: reader.read(fragment.name, fragment.start, fragment.numel),
        {name: reader.tensor(name) for name in model_shapes(config)[1]},
        lambda: reader.bytes_read,
    )
