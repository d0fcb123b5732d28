"""Export to Hugging Face format: safetensors, config.json and tokenizer, checked by reading it back with transformers.

    dsgpt checkpoint export runs/my-run --output my-model

The folder appears by one rename, complete or not at all. Tensors are streamed into files of at most `SHARD_BYTES`, so
memory stays at one file; the final check loads the export once with plain transformers and compares logits.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.weights import ModelLocation, load_model, require_intact
from dsgpt.config import ModelConfig
from dsgpt.errors import CheckpointError
from dsgpt.model.gpt import GPT
from dsgpt.model.hf_format import hf_config, require_architecture, to_hf
from dsgpt.tokenizer.tokenizer import Tokenizer

SHARD_BYTES = 4 << 30
# Two implementations of the same mathematics in fp32 differ by rounding only.
MAX_LOGIT_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class ExportReport:
    """`logit_difference` is the largest between transformers and the checkpoint, None where the check was skipped."""

    path: Path
    architecture: str
    num_parameters: int
    logit_difference: float | None
    logit_std: float | None


def export_checkpoint(location: ModelLocation, output: Path, check: bool = True) -> ExportReport:
    """Write `output`, which must not exist. Raises CheckpointError when the checkpoint is damaged or the check fails."""
    if not location.is_checkpoint:
        raise CheckpointError("this is a Hugging Face folder already", seen=str(location.path))
    if output.exists():
        raise CheckpointError("the output exists", seen=str(output), do="choose another --output, or remove it")
    require_intact(location.path)
    reader = CheckpointReader(location.path)
    config = ModelConfig.model_validate(reader.manifest["model"])
    architecture = require_architecture(config)
    tokenizer = Tokenizer.load(location.tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    tmp = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        num_parameters = _write_tensors(reader, config, tmp)
        settings = hf_config(config, tokenizer.bos_id, tokenizer.eos_id)
        (tmp / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        (tmp / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(tmp)
        difference, std = _compare(load_model(location), tmp) if check else (None, None)
        for file in tmp.iterdir():
            commit.fsync_path(file)
        tmp.rename(output)
        commit.fsync_path(output.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return ExportReport(output, architecture, num_parameters, difference, std)


def _write_tensors(reader: CheckpointReader, config: ModelConfig, folder: Path) -> int:
    """Stream tensors into model-0000i.safetensors and an index, or one model.safetensors; returns the parameter count."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total = 0

    def flush() -> None:
        nonlocal held, held_bytes
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held, held_bytes = {}, 0

    for name, tensor in to_hf(config, reader.tensor):
        if held and held_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor
        held_bytes, total = held_bytes + tensor.nbytes, total + tensor.numel()
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return total
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total * 4}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


@torch.no_grad()
def _compare(model: GPT, folder: Path) -> tuple[float, float]:
    """Largest difference of logits between our model and transformers on the export, and our logits' spread."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    length = min(64, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    ours = model(ids)
    difference = float((ours - theirs(ids).logits).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise CheckpointError(
            "the export does not compute what the checkpoint computes",
            seen=f"largest logit difference {difference}",
            do="please report this with the run's config.yaml",
        )
    return difference, float(ours.std())
