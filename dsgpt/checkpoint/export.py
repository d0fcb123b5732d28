"""Export to Hugging Face format: safetensors, config.json and tokenizer, checked by reading it back with transformers.

    dsgpt checkpoint export runs/my-run --output my-model

A model that no Hugging Face architecture holds is exported in dsgpt's own format, which has the same layout and which
evaluate, generate and `init_from: hf:FOLDER` read. The folder appears by one rename, complete or not at all. Tensors are
streamed into files of at most `SHARD_BYTES`, so memory stays at one tensor; the final check loads the export once and
compares logits, with plain transformers where they can read it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.plain import PlainWeights
from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.weights import ModelLocation, load_model, require_intact
from dsgpt.config import HFModelConfig, ModelConfig, parse_model
from dsgpt.errors import CheckpointError
from dsgpt.model.hf_format import hf_config, to_hf
from dsgpt.model.safetensors_folder import DTYPE_NAMES, INDEX, WHOLE, bytes_of
from dsgpt.model.safetensors_header import lay_out, num_bytes
from dsgpt.planning import parameter_count
from dsgpt.tokenizer.tokenizer import Tokenizer

SHARD_BYTES = 4 << 30
# Two implementations of the same mathematics in fp32 differ by rounding only.
MAX_LOGIT_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class ExportReport:
    """`logit_difference` is the largest between the export, read by `checked_with`, and the checkpoint.

    Both are None where the check was skipped.
    """

    path: Path
    architecture: str
    checked_with: str | None
    num_parameters: int
    logit_difference: float | None
    logit_std: float | None


def export_checkpoint(location: ModelLocation, output: Path, check: bool = True) -> ExportReport:
    """Write `output`, which must not exist. Raises CheckpointError when the checkpoint is damaged or the check fails."""
    if not location.is_checkpoint:
        raise CheckpointError("this is an export already", seen=str(location.path))
    if output.exists():
        raise CheckpointError("the output exists", seen=str(output), do="choose another --output, or remove it")
    require_intact(location.path)
    reader = CheckpointReader(location.path)
    config = parse_model(reader.manifest["model"])
    architecture = config.export_format
    tokenizer = Tokenizer.load(location.tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    tmp = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        _write_tensors(reader, config, tmp)
        if isinstance(config, HFModelConfig):
            settings = {**config.hf, "vocab_size": config.vocab_size, "dtype": "float32"}
            settings.pop("torch_dtype", None)
        else:
            settings = hf_config(config, tokenizer.bos_id, tokenizer.eos_id)
        (tmp / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        (tmp / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(tmp)
        difference, std = _compare(load_model(location), _reference(tmp, architecture)) if check else (None, None)
        for file in tmp.iterdir():
            commit.fsync_path(file)
        tmp.rename(output)
        commit.fsync_path(output.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    reader_name = ("dsgpt" if architecture == "dsgpt" else "transformers") if check else None
    return ExportReport(output, architecture, reader_name, parameter_count(config), difference, std)


def _tensors(
    config: ModelConfig, names: Iterable[str], tensor: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """What the export holds, in its order, made from `tensor(name)` of the model's names, one at a time."""
    if config.export_format not in ("dsgpt", "transformers"):
        return to_hf(config, tensor)
    theirs: dict[str, str] = {}
    if isinstance(config, HFModelConfig):
        from dsgpt.model.hf import names_to_save

        theirs = names_to_save(config)
    return ((theirs.get(name, name), tensor(name)) for name in names)


def _write_tensors(reader: CheckpointReader, config: ModelConfig, folder: Path) -> None:
    """Stream parameters in fp32, and buffers as they are, into model-0000i.safetensors and an index, or one model.safetensors.

    Their shapes, and so the files' headers, are known before the first is read: one is in memory at a time.
    """
    buffers, weights = reader.buffers(), PlainWeights(reader)
    empty = {name: torch.empty(shape, device="meta") for name, shape in weights.shapes.items()}
    empty |= {name: value.to("meta") for name, value in buffers.items()}
    found = _tensors(config, empty, empty.__getitem__)
    shards = _cut([(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in found])
    filled = _tensors(config, empty, lambda name: buffers[name] if name in buffers else weights.tensor(name))
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WHOLE
        header, places = lay_out(shard, {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(header)
            for (name, place), (given, value) in zip(places.items(), filled, strict=False):  # takes none too many
                assert given == name and value.shape == place.shape
                out.write(bytes_of(value))
        weight_map.update(dict.fromkeys(places, file))
    if len(shards) > 1:
        total = sum(num_bytes(dtype, shape) for shard in shards for _, dtype, shape in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cut(tensors: list[tuple[str, str, tuple[int, ...]]]) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """Tensors (name, dtype, shape) in order, divided into files of at most `SHARD_BYTES`, or of one larger tensor."""
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dtype, shape in tensors:
        more = num_bytes(dtype, shape)
        if shards[-1] and size + more > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, dtype, shape))
        size += more
    return shards


def _reference(folder: Path, architecture: str) -> Callable[[Tensor], Tensor]:
    """The exported model as somebody else would load it: ids (B, T) to logits (B, T, V)."""
    if architecture == "dsgpt":
        return load_model(ModelLocation(folder, False, folder))
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model(ids).logits


@torch.no_grad()
def _compare(model: Any, reference: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Largest difference of logits between our model and the export, and our logits' spread."""
    generator = torch.Generator().manual_seed(0)
    length = min(64, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    ours = model(ids)
    difference = float((ours - reference(ids)).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise CheckpointError(
            "the export does not compute what the checkpoint computes",
            seen=f"largest logit difference {difference}",
            do="please report this with the run's config.yaml",
        )
    return difference, float(ours.std())
