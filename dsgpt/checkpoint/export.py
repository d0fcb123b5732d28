"""Export to Hugging Face format: safetensors, config.json and tokenizer, checked by reading it back with transformers.

    dsgpt checkpoint export runs/my-run --output my-model

A model that no Hugging Face architecture holds is exported in dsgpt's own format, which has the same layout and which
evaluate, generate and `init_from: hf:FOLDER` read. The folder appears by one rename, complete or not at all. Tensors are
streamed into files of at most `SHARD_BYTES`, so memory stays at one file; the final check loads the export once and
compares logits, with plain transformers where they can read it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.plain import PlainWeights
from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.weights import ModelLocation, load_model, require_intact
from dsgpt.config import HFModelConfig, ModelConfig, parse_model
from dsgpt.errors import CheckpointError
from dsgpt.model.hf_format import hf_config, to_hf
from dsgpt.planning import parameter_count
from dsgpt.process import give_default_mode
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


def _tensors(weights: PlainWeights, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name in the export, value), one at a time."""
    if config.export_format not in ("dsgpt", "transformers"):
        yield from to_hf(config, weights.tensor)
        return
    names: dict[str, str] = {}
    if isinstance(config, HFModelConfig):
        from dsgpt.model.hf import names_to_save

        names = names_to_save(config)
    for name in weights.shapes:
        yield names.get(name, name), weights.tensor(name)
    for name, value in weights.reader.buffers().items():
        yield names.get(name, name), value


def _write_tensors(reader: CheckpointReader, config: ModelConfig, folder: Path) -> None:
    """Stream tensors into model-0000i.safetensors and an index, or one model.safetensors."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total = 0

    def flush() -> None:
        nonlocal held, held_bytes
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        give_default_mode(folder / f"shard-{len(shards)}")
        shards.append(list(held))
        held, held_bytes = {}, 0

    for name, tensor in _tensors(PlainWeights(reader), config):
        if held and held_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor
        held_bytes, total = held_bytes + tensor.nbytes, total + tensor.numel()
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total * 4}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
