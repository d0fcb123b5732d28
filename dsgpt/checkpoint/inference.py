"""A MODEL on the device that is here, to be used: evaluated, asked, served.

loaded = load_for_use("runs/mine")          # .model, .tokenizer, .location
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from dsgpt.checkpoint.base_model import read_base
from dsgpt.checkpoint.locate import run_of
from dsgpt.checkpoint.weights import DTYPES, ModelLocation, find_model, load_model, read_model_config
from dsgpt.device import choose_device
from dsgpt.errors import CheckpointError, OutOfMemoryError
from dsgpt.launch.hardware import available_memory_bytes
from dsgpt.model.build import model_shapes
from dsgpt.tokenizer.tokenizer import Tokenizer
from dsgpt.units import format_bytes


@dataclass(frozen=True)
class Loaded:
    """The model is in evaluation mode. `dtype` as in a config: "fp32", "bf16" or "fp16"."""

    location: ModelLocation
    model: Any
    tokenizer: Tokenizer
    device: str
    dtype: str


def load_for_use(text: str, device: str = "auto", dtype: str = "auto", trust: bool = False) -> Loaded:
    """Find, check and load a MODEL. `dtype` auto is bf16 on a GPU that has it, else fp32.

    Raises OutOfMemoryError before loading where it cannot fit; CheckpointError and ConfigError as `find_model`, `load_model`.
    """
    location = find_model(text)
    found = choose_device(device)
    dtype = found.dtype(dtype)
    _refuse_too_large(location, found.kind, DTYPES[dtype])
    tokenizer = load_tokenizer(location)  # first, because it is read at once where it can be
    model = load_model(location, found.kind, trust, DTYPES[dtype])
    return Loaded(location, model, tokenizer, found.kind, dtype)


def load_tokenizer(location: ModelLocation) -> Tokenizer:
    """The model's tokenizer, which knows what else ends a text of this model."""
    tokenizer = Tokenizer.load(location.tokenizer)
    tokenizer.end_ids = tuple(dict.fromkeys([*tokenizer.end_ids, *_end_ids(location)]))
    return tokenizer


def _end_ids(location: ModelLocation) -> list[int]:
    """What else ends a text: `eos_token_id` of generation_config.json, or where there is none of config.json, as with
    generate() of transformers. Instruction models name several. Of a run, those of the model that it began with."""
    folder = location.path
    if location.is_checkpoint:
        if (base := read_base(run_of(location.path))) is None:
            return []
        folder = base.folder
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text("utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError("a file of the model cannot be read", seen=f"{folder / name}: {error}") from error
        ends = found.get("eos_token_id") if isinstance(found, dict) else None
        return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]
    return []


def _refuse_too_large(location: ModelLocation, device: str, dtype: torch.dtype) -> None:
    needed = sum(math.prod(shape) for shape in model_shapes(read_model_config(location))[0].values()) * dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory_bytes()
    if free and needed > free:
        export = f"dsgpt checkpoint export {location.path} --output DIR, and then" if location.is_checkpoint else "use"
        raise OutOfMemoryError(
            "the model does not fit on one device",
            seen=f"{format_bytes(needed)} of weights, {format_bytes(free)} free",
            do=f"evaluate it over several: dsgpt evaluate {location.path} --num-processes N; to generate, {export} "
            "a server that divides models over GPUs",
        )
