"""Reading Hugging Face folders, and dsgpt's own of the same layout: config.json into a `ModelConfig`, safetensors as
native tensors, any range of which can be read.

Every key of config.json is either used, known to change nothing, or at its harmless value; anything else is refused by
name, so an import never computes something else silently. Weights are safetensors, in which nothing can execute.
pytorch_model.bin can: it is read only where a person trusts the folder (`--trust-checkpoint`), whole into memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dsgpt.config import HFModelConfig, ModelConfig
from dsgpt.errors import ConfigError, Problem
from dsgpt.model.build import model_shapes
from dsgpt.model.hf_format import ARCHITECTURES, FORMAT_VERSION, Part, find_parts
from dsgpt.model.safetensors_folder import SafetensorsFolder
from dsgpt.model.tensor_reader import PartReader, TensorReader, refuse_other_shapes

# Describe the file, its tokenizer, its writer or generation, not the mathematics of training.
_NEUTRAL = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range", "label2id",
    "max_window_layers", "model_type", "n_ctx", "pad_token_id", "pretraining_tp", "task_specific_params", "torch_dtype",
    "transformers_version", "use_cache", "unk_token_id", "_name_or_path", "gradient_checkpointing", "n_layer",
}  # fmt: skip
# Keys that ask a reader to run code which lies in the folder, or to switch it to another implementation.
_CODE = {"auto_map", "custom_pipelines", "trust_remote_code", "_attn_implementation_internal"}
# Keys that would change the mathematics, with the only values that are implemented.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "add_cross_attention": (False,),
    "attention_multiplier": (1.0,),
    "hidden_act": ("silu",),
    "layer_types": (None,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),  # any other is refused before
    "reorder_and_upcast_attn": (False,),
    "rope_scaling": (None,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
}
_USED = {
    "llama": {
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
        "vocab_size", "max_position_embeddings", "rope_theta", "rope_parameters", "rms_norm_eps", "attention_bias",
        "mlp_bias", "attention_dropout", "tie_word_embeddings",
    },
    "gpt2": {
        "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "vocab_size", "layer_norm_epsilon", "embd_pdrop",
        "attn_pdrop", "resid_pdrop", "tie_word_embeddings",
    },
}  # fmt: skip
_USED["qwen3"] = _USED["llama"]


def read_hf_config(folder: str | Path) -> ModelConfig:
    """The architecture in folder/config.json. Raises ConfigError naming every key that is not implemented."""
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            "this architecture is not implemented", seen=f"model_type={kind!r}", do=f"one of {', '.join(ARCHITECTURES)}"
        )
    if kind == "dsgpt":
        return _own(raw, path)
    problems = []
    for key, value in raw.items():
        if key in _NEUTRAL or key in _USED[kind] or key.startswith("summary_"):
            continue
        if key == "layer_types" and set(value or ()) <= {"full_attention"}:
            continue
        if value not in _HARMLESS.get(key, ()) and not (key == "sliding_window" and not raw.get("use_sliding_window")):
            problems.append(Problem(f"config.json: {key} is not implemented", seen=f"{key}={value!r}"))
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        problems.append(Problem("config.json: only default rotary positions are implemented", seen=f"{rope}"))
    if kind == "llama" and raw.get("attention_bias", False) != raw.get("mlp_bias", False):
        problems.append(Problem("config.json: attention_bias and mlp_bias must agree", seen=f"{path}"))
    if problems:
        raise ConfigError(problems=problems)
    try:
        return _gpt2(raw) if kind == "gpt2" else _llama(raw, qk_norm=kind == "qwen3")
    except (KeyError, TypeError, ArithmeticError, ValidationError) as error:
        raise ConfigError("config.json is incomplete or damaged", seen=f"{path}: {error!r}") from error


def read_architecture(folder: str | Path, implementation: str = "auto") -> ModelConfig:
    """As `read_hf_config`, but with `implementation` "auto" an architecture that the native GPT does not hold exactly is
    left to transformers, and with "transformers" any is. Raises ConfigError where neither has it.
    """
    if implementation == "native":
        return read_hf_config(folder)
    raw = _read_json(Path(folder) / "config.json")
    if implementation == "auto" or raw.get("model_type") == "dsgpt":
        try:
            return read_hf_config(folder)
        except ConfigError:
            if raw.get("model_type") == "dsgpt":
                raise
    from dsgpt.model.hf import hf_model_config

    return hf_model_config(raw, _count_parameters(Path(folder), raw), folder)


def _count_parameters(folder: Path, raw: Mapping[str, Any]) -> int:
    """The elements of the folder's tensors, from the files' headers; a tied head that is saved as well counts once."""
    if not any(folder.glob("*.safetensors")):
        return 1  # pickle, which is read only where it is trusted: not known yet
    tied = raw.get("tie_word_embeddings", False)
    shapes = SafetensorsFolder(folder).shapes
    return max(1, sum(prod(shape) for name, shape in shapes.items() if not (tied and name.endswith("lm_head.weight"))))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text("utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            "no readable Hugging Face model here",
            seen=f"{path}: {error}",
            do="hf:<folder> with config.json and safetensors; download it there first",
        ) from error
    _refuse_code(raw, path)
    if raw.get("quantization_config") is not None:
        raise ConfigError(
            "the weights are quantised, and training needs them in 16 or 32 bits",
            seen=f"{path}: quantization_config={raw['quantization_config']!r}",
            do="take the model from which this one was quantised, or save it dequantised",
        )
    return raw


def _refuse_code(raw: Mapping[str, Any], path: Path) -> None:
    problems = [
        Problem(
            f"config.json: {key} asks for code to be run, and dsgpt runs none that comes with a model",
            seen=f"{path}: {key}={raw[key]!r}",
            do="remove the key if the model is a plain one of its model_type",
        )
        for key in raw
        if key in _CODE
    ]
    if problems:
        raise ConfigError(problems=problems)


def _own(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    if raw.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            "this export is of another version of dsgpt's format",
            seen=f"{path}: format_version={raw.get('format_version')!r}, this dsgpt reads {FORMAT_VERSION}",
            do="install the dsgpt that wrote it, or export the checkpoint again",
        )
    try:
        return ModelConfig.model_validate(raw.get("model"))
    except ValidationError as error:
        raise ConfigError("the export's config.json is damaged", seen=f"{path}: {error}") from error


def _gpt2(raw: Mapping[str, Any]) -> ModelConfig:
    heads = raw["n_head"]
    dropout = {"embedding": "embd_pdrop", "attention": "attn_pdrop", "residual": "resid_pdrop"}
    return ModelConfig.model_validate(
        {
            "norm": "layernorm",
            "position_embedding": "learned",
            "activation": "gelu",
            "bias": True,
            "tie_word_embeddings": raw.get("tie_word_embeddings", True),
            "hidden_size": raw["n_embd"],
            "num_hidden_layers": raw["n_layer"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": raw["n_embd"] // heads,
            "intermediate_size": raw.get("n_inner") or 4 * raw["n_embd"],
            "vocab_size": raw["vocab_size"],
            "max_position_embeddings": raw["n_positions"],
            "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
            "dropout": {ours: raw.get(theirs, 0.1) for ours, theirs in dropout.items()},
        }
    )


def _llama(raw: Mapping[str, Any], qk_norm: bool) -> ModelConfig:
    heads = raw["num_attention_heads"]
    rope = raw.get("rope_parameters") or {}
    default_head_dim = 128 if qk_norm else raw["hidden_size"] // heads
    return ModelConfig.model_validate(
        {
            "bias": raw.get("attention_bias", False),
            "qk_norm": qk_norm,
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            "hidden_size": raw["hidden_size"],
            "num_hidden_layers": raw["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": raw.get("head_dim") or default_head_dim,
            "intermediate_size": raw["intermediate_size"],
            "vocab_size": raw["vocab_size"],
            "max_position_embeddings": raw.get("max_position_embeddings", 2048),
            "rope_theta": raw.get("rope_theta", rope.get("rope_theta", 10000.0)),
            "norm_eps": raw.get("rms_norm_eps", 1e-6),
            "dropout": {"attention": raw.get("attention_dropout", 0.0)},
        }
    )


def open_hf_weights(folder: str | Path, config: ModelConfig, trust: bool = False) -> TensorReader:
    """A reader of the folder's tensors under native names, shared ones under their first; of dsgpt's own format, running
    statistics too. Raises ConfigError naming every tensor that is not right.
    """
    files = open_weights(Path(folder), trust)
    own = config.export_format == "dsgpt"
    if isinstance(config, HFModelConfig):
        from dsgpt.model.hf import names_in_folder

        parts = {name: Part(theirs) for name, theirs in names_in_folder(config, files.shapes).items()}
    else:
        parts = {name: Part(name) for name in files.shapes} if own else find_parts(config, files.shapes)
    parameters, buffers = model_shapes(config)
    whole_numbers = [
        Problem(f"not a weight of a model that can be trained: {part.source}", seen=f"{files.dtypes[part.source]}")
        for name, part in parts.items()
        if name in parameters and not files.dtypes[part.source].is_floating_point
    ]
    if whole_numbers:
        raise ConfigError(problems=whole_numbers)
    reader = PartReader(files, parts)
    refuse_other_shapes("the weights do not fit their config.json", reader.shapes, parameters | buffers)
    return reader


def read_hf_weights(folder: str | Path, config: ModelConfig, trust: bool = False) -> dict[str, Tensor]:
    """All native tensors of `open_hf_weights` whole, fp32: for small models."""
    reader = open_hf_weights(folder, config, trust)
    return {name: reader.tensor(name) for name in reader.shapes}


def require_weights(folder: Path, trust: bool = False) -> None:
    """Raise ConfigError where a folder has no weights that may be read; they are not looked into."""
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("pytorch_model*.bin")):
        if not trust:
            open_weights(folder)
        return
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise ConfigError(
        "the folder has no weights", seen=f"{folder} holds {there}", do="fetch the model whole: dsgpt fetch hf:NAME"
    )


def open_weights(folder: Path, trust: bool = False) -> SafetensorsFolder | PickledFolder:
    """The folder's tensors under their names in the files: safetensors, else pytorch_model*.bin if `trust`.

    Raises ConfigError.
    """
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled or any(folder.glob("*.safetensors")):
        return SafetensorsFolder(folder)
    if not trust:
        raise ConfigError(
            "the weights are here only as pickle, which can execute code when it is read",
            seen=", ".join(map(str, pickled)),
            do="get the model as safetensors; if you trust who made these files: --trust-checkpoint",
        )
    return PickledFolder(pickled)


class PickledFolder(TensorReader):
    """The tensors of trusted .bin files, whole in memory on every rank: such a file cannot be read by ranges."""

    def __init__(self, files: list[Path]):
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            found = _read_pickled(file)
            if twice := self._tensors.keys() & found.keys():
                seen = f"{min(twice)}, also in {file}"
                raise ConfigError("a tensor lies in two files", seen, "remove what does not belong to the model")
            self._tensors |= found
        self._bytes_read = sum(file.stat().st_size for file in files)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def read(self, name: str, start: int, numel: int) -> Tensor:
        return self._tensors[name].flatten()[start:][:numel].float()


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a trusted .bin: without executing anything wherever torch's list of harmless objects is enough."""
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":  # damaged, not refused
                raise
            content = execute_pickled(file)
    except Exception as error:  # whatever the file's own code raises
        raise ConfigError("a file of weights cannot be read", seen=f"{file}: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError("not a file of weights: it holds something else than tensors by name", seen=str(file))
    return content


def execute_pickled(file: Path, mmap: bool = False) -> Any:
    """The one place where a file may execute: tests/architecture.py lists it."""
    print(f"warning: {file} holds more than tensors: executing it, as a person allowed", file=sys.stderr)
    return torch.load(file, map_location="cpu", weights_only=False, mmap=mmap)
