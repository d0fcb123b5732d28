"""Export to Hugging Face format: safetensors, configs, tokenizer and model card, checked by reading it back with transformers.

    dsgpt checkpoint export runs/my-run --output my-model

A model that no Hugging Face architecture holds is exported in dsgpt's own format, which has the same layout and which
evaluate, generate and `init_from: hf:FOLDER` read. The folder appears by one rename, complete or not at all. Tensors are
streamed into files of at most `SHARD_BYTES`, so memory stays at one tensor; the final check loads the export once and
compares logits, with plain transformers where they can read it.

Trade-off: fp32 unless asked otherwise, because masters are fp32: whoever goes on from an export loses nothing. In 16 bits
it is half the size; it is checked against the checkpoint's weights rounded the same way.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.model_card import Facts, model_card
from dsgpt.checkpoint.plain import PlainWeights
from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.weights import DTYPES, ModelLocation, load_model, require_intact
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
    """`logit_difference` is the largest between the export, read by `checked_with`, and the checkpoint in `dtype`.

    Both are None where the check was skipped. `license` is that of the model card.
    """

    path: Path
    architecture: str
    checked_with: str | None
    num_parameters: int
    logit_difference: float | None
    logit_std: float | None
    dtype: str
    license: str


def export_checkpoint(
    location: ModelLocation, output: Path, check: bool = True, dtype: str = "fp32", license: str | None = None
) -> ExportReport:
    """Write `output`, which must not exist. `dtype` is fp32, bf16 or fp16, `license` goes before the base model's.

    Raises CheckpointError when the checkpoint is damaged, does not fit `dtype`, or the check fails.
    """
    reader = open_checkpoint(location, output)
    config, facts = parse_model(reader.manifest["model"]), Facts.of(location.path, reader.manifest)
    architecture, precision = config.export_format, DTYPES[dtype]
    with new_folder(output) as tmp:
        _write_tensors(reader, config, tmp, precision)
        tokenizer = Tokenizer.load(location.tokenizer)
        _write_json(tmp / "config.json", _config(config, tokenizer, precision))
        _write_json(tmp / "generation_config.json", _generation_config(facts, tokenizer))
        library = "dsgpt" if architecture == "dsgpt" else "transformers"
        chosen = write_about(tmp, facts, tokenizer, library, license, dtype)
        difference, std = None, None
        if check:
            difference, std = compare_logits(load_model(location), _reference(tmp, architecture), precision)
    return ExportReport(
        output, architecture, library if check else None, parameter_count(config), difference, std, dtype, chosen
    )


def open_checkpoint(location: ModelLocation, output: Path) -> CheckpointReader:
    """The checkpoint to export. Raises CheckpointError where it is damaged or none, or `output` exists."""
    if not location.is_checkpoint:
        raise CheckpointError("this is an export already", seen=str(location.path))
    if output.exists():
        raise CheckpointError("the output exists", seen=str(output), do="choose another --output, or remove it")
    require_intact(location.path)
    return CheckpointReader(location.path)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` by one rename, or is gone where filling it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    tmp = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
        for file in tmp.iterdir():
            commit.fsync_path(file)
        tmp.rename(output)
        commit.fsync_path(output.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_about(folder: Path, facts: Facts, tokenizer: Tokenizer, library: str, license: str | None, dtype: str) -> str:
    """Write what stands beside weights: tokenizer and chat template, model card, the base model's licence. Returns the
    licence of the model card."""
    tokenizer.save(folder)
    for file in facts.base.licence_files() if facts.base else ():
        shutil.copyfile(file, folder / file.name)
    chosen = facts.licence(license)
    (folder / "README.md").write_text(model_card(facts, library, chosen, dtype), encoding="utf-8")
    return chosen["license"]


def _config(config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    if not isinstance(config, HFModelConfig):
        return hf_config(config, tokenizer.bos_id, tokenizer.eos_id, name)
    theirs = {key: value for key, value in config.hf.items() if key != "torch_dtype"}
    return {**theirs, "vocab_size": config.vocab_size, "dtype": name}


def _generation_config(facts: Facts, tokenizer: Tokenizer) -> dict[str, Any]:
    """The base model's own, with the end token of this tokenizer, which may be that of a chat; else just the tokenizer's."""
    ours = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    theirs: dict[str, Any] = {}
    if facts.base:  # where there is none, config.json says what ends a text
        ends = facts.base.read("config.json").get("eos_token_id")
        theirs = facts.base.read("generation_config.json") or ({} if ends is None else {"eos_token_id": ends})
    ends = theirs.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if ends and tokenizer.eos_id is not None and tokenizer.eos_id not in ends:
        theirs["eos_token_id"] = [*ends, tokenizer.eos_id]
    return ours | theirs


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _write_tensors(reader: CheckpointReader, config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    """Stream parameters in `dtype`, and buffers as they are, into model-0000i.safetensors and an index, or one
    model.safetensors.

    Their shapes, and so the files' headers, are known before the first is read: one is in memory at a time.
    """
    buffers, weights = reader.buffers(), PlainWeights(reader)
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in weights.shapes.items()}
    empty |= {name: value.to("meta") for name, value in buffers.items()}

    def full(name: str) -> Tensor:
        return buffers[name] if name in buffers else in_precision(name, weights.tensor(name), dtype)

    laid = _tensors(config, empty, empty.__getitem__)
    shards = _cut([(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in laid])
    filled = _tensors(config, empty, full)
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


def in_precision(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`. Raises CheckpointError where it is too large for that."""
    rounded = value.to(dtype)
    if dtype != torch.float32 and not torch.isfinite(rounded).all() and torch.isfinite(value).all():
        seen = f"{name}: up to {float(value.abs().max()):.3g}, {dtype} holds {torch.finfo(dtype).max:.3g}"
        raise CheckpointError("a weight is too large for this precision", seen=seen, do="--dtype bf16 or fp32")
    return rounded


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
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(names) for kind, names in told.items() if names}
    if wrong:
        raise CheckpointError("transformers does not find the tensors it needs in the export", seen=str(wrong)[:500])
    model.eval()
    return lambda ids: model(ids).logits


@torch.no_grad()
def compare_logits(
    model: Any, reference: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Largest difference of logits between our model, its weights rounded to `dtype`, and the export; our logits' spread.

    Raises CheckpointError where they differ by more than rounding.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
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
