"""From a DeepSpeed JSON with "auto" in it to the complete dictionary the engine gets.

The JSON is the only place of ZeRO stage and offload; the run's YAML is the only place of batch, clipping and
precision. Where a JSON states one of the latter, it must agree; every disagreement, typo and wrong type is reported
at once. Torch-free, so a login node can check a config: the price is our own table of keys (`deepspeed_keys.py`).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

from dsgpt.config.deepspeed_keys import CHOICES, OWNED_BY_THE_RUN, TOP_LEVEL, Kind
from dsgpt.config.schema import RunConfig
from dsgpt.config.shipped import find_deepspeed_config, nearest
from dsgpt.errors import ConfigError, Problem

_WORDS = {"bool": "true or false", "int": "a whole number", "number": "a number", "text": "a text", "list": "a list"}

# Elements of a reduce_bucket_size of "auto": a sixteenth of what is trained, between these.
_SMALLEST_BUCKET, _LARGEST_BUCKET = 1_000_000, 50_000_000


def fill_deepspeed(config: RunConfig, world_size: int, num_parameters: int | None = None) -> dict[str, Any]:
    """The DeepSpeed config of this run on `world_size` GPUs (or CPU ranks), with nothing left as "auto".

    `config` must be resolved (no auto in dtype, micro batch and deepspeed). `num_parameters` that are trained keep
    buffers small for small models and small parts of large ones. Raises ConfigError with all problems.
    """
    training = config.training
    for key, chosen in (("deepspeed", config.deepspeed), ("training.dtype", training.dtype)):
        if chosen == "auto":
            raise ConfigError(f"{key} is still auto", do="resolve the config for the hardware first")
    accumulation = training.gradient_accumulation_steps(world_size)
    path = find_deepspeed_config(config.deepspeed)
    raw, problems = _read(path)
    problems += _check_table(raw, TOP_LEVEL, "")
    stage = _stage(raw)
    filled = copy.deepcopy(raw)
    for key, value in {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size_per_gpu,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.max_grad_norm,
        "bf16.enabled": training.dtype == "bf16",
        "fp16.enabled": training.dtype == "fp16",
    }.items():
        problems += _fill(filled, key, value)
    _fill_defaults(filled, training.dtype, stage, num_parameters)
    problems += _check_meaning(filled, world_size, training.dtype, stage)
    if problems:
        named = [Problem(f"{path.name}: {problem.what}", problem.seen, problem.do) for problem in problems]
        raise ConfigError(problems=named)
    _drop_auto(filled)
    return filled


def check_deepspeed(config: RunConfig) -> list[Problem]:
    """Typos and wrong types in the DeepSpeed JSON that a config names; what depends on the hardware is left out."""
    if config.deepspeed == "auto":
        return []
    try:
        path = find_deepspeed_config(config.deepspeed)
    except ConfigError as error:
        return error.problems
    raw, problems = _read(path)
    problems += _check_table(raw, TOP_LEVEL, "")
    return [Problem(f"{path.name}: {problem.what}", problem.seen, problem.do) for problem in problems]


class ZeroKind(NamedTuple):
    """What of a DeepSpeed config decides where the training state lives."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    hpz_partition_size: int


def zero_kind(name_or_path: str) -> ZeroKind:
    """ZeRO stage and offloads of a shipped or own DeepSpeed config. Raises ConfigError where it is not valid."""
    path = find_deepspeed_config(name_or_path)
    raw, problems = _read(path)
    zero = raw.get("zero_optimization", {})
    problems += _check_table({"zero_optimization": zero}, TOP_LEVEL, "")
    if problems:
        raise ConfigError(problems=problems)

    def leaves_gpu(name: str) -> bool:
        return zero.get(name, {}).get("device", "none") in ("cpu", "nvme")

    def number(name: str, default: int) -> int:
        value = zero.get(name, default)
        return default if value == "auto" else int(value)

    offloads = leaves_gpu("offload_optimizer"), leaves_gpu("offload_param")
    return ZeroKind(number("stage", 0), *offloads, number("zero_hpz_partition_size", 1))


def _read(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    problems: list[Problem] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                problems.append(Problem(f"{key}: the key stands here twice", str(value), "keep one of them"))
            result[key] = value
        return result

    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        return {}, [Problem("not readable as JSON", str(error), "correct the file")]
    if not isinstance(raw, dict):
        return {}, [Problem("not a DeepSpeed config", type(raw).__name__, "write one JSON object")]
    return raw, problems


def _check_table(section: dict[str, Any], table: dict[str, Kind], prefix: str) -> list[Problem]:
    problems: list[Problem] = []
    for key, value in section.items():
        here = prefix + key
        kind = table.get(key)
        if kind is None:
            owned = OWNED_BY_THE_RUN.get(here)
            close = nearest(key, table)
            do = owned or (f"did you mean {prefix}{close[0]}?" if close else "remove it")
            what = f"{here}: not for this file" if owned else f"{here}: unknown key"
            problems.append(Problem(what, json.dumps(value)[:200], do))
        elif isinstance(kind, dict):
            if isinstance(value, dict):
                problems += _check_table(value, kind, f"{here}.")
            else:
                problems.append(Problem(f"{here} must be a section", json.dumps(value), "write {...}"))
        elif value == "auto":
            continue
        elif not _has_kind(value, kind):
            problems.append(Problem(f"{here} must be {_WORDS[kind]}", json.dumps(value), "correct the value"))
        elif here in CHOICES and value not in CHOICES[here]:
            choices = ", ".join(json.dumps(choice) for choice in CHOICES[here])
            problems.append(Problem(f"{here} has no such choice", json.dumps(value), f"choose one of {choices}"))
    return problems


def _has_kind(value: Any, kind: str) -> bool:
    if kind in ("int", "number") and isinstance(value, bool):
        return False
    if kind == "int":  # 5e8 is how DeepSpeed's own examples write bucket sizes
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    types: dict[str, tuple[type, ...]] = {"bool": (bool,), "number": (int, float), "text": (str,), "list": (list,)}
    return isinstance(value, types[kind])


def _fill(filled: dict[str, Any], dotted: str, value: Any) -> list[Problem]:
    """Put the run's value where the JSON says auto or nothing; a different value in the JSON is a problem."""
    *sections, key = dotted.split(".")
    target: Any = filled
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            return []  # already reported as a wrong type
    stated = target.get(key, "auto")
    if stated == "auto":
        target[key] = value
        return []
    if stated == value:
        return []
    return [Problem(f"{dotted} disagrees with the run", f"{json.dumps(stated)}, the run says {value}", 'write "auto"')]


def _stage(raw: dict[str, Any]) -> int:
    """The ZeRO stage; one that is not a stage (reported elsewhere) counts as 3, which rules nothing out."""
    zero = raw.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 3
    return stage if stage in (0, 1, 2, 3) else 3


def _fill_defaults(filled: dict[str, Any], dtype: str, stage: int, num_parameters: int | None) -> None:
    filled.setdefault("zero_allow_untested_optimizer", True)  # sgd is not in DeepSpeed's list
    filled.setdefault("zero_force_ds_cpu_optimizer", False)  # dsgpt passes torch's optimizer, also under offload
    types = filled.setdefault("data_types", {})
    # Sums of many micro-batches in 16 bits lose their small terms; stage 0 has no fp32 buffer for them.
    if isinstance(types, dict) and types.get("grad_accum_dtype", "auto") == "auto" and dtype != "fp32" and stage > 0:
        types["grad_accum_dtype"] = "fp32"
    # So does a sum over many ranks; DeepSpeed would round to 16 bits before it adds.
    if dtype != "fp32" and filled.get("communication_data_type", "auto") == "auto":
        filled["communication_data_type"] = "fp32"
    zero = filled.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("reduce_bucket_size") == "auto":
        # DeepSpeed allocates two of them; gradients beyond the bucket are freed while the backward pass still runs.
        share = _LARGEST_BUCKET if num_parameters is None else num_parameters // 16
        zero["reduce_bucket_size"] = min(max(share, _SMALLEST_BUCKET), _LARGEST_BUCKET)
    if stage == 3 and isinstance(zero, dict) and zero.get("memory_efficient_linear", "auto") == "auto":
        zero["memory_efficient_linear"] = False  # its gradients are wrong together with activation checkpointing


def _check_meaning(filled: dict[str, Any], world_size: int, dtype: str, stage: int) -> list[Problem]:
    """What the table cannot say: combinations that DeepSpeed refuses later, or silently reads as something else."""
    problems: list[Problem] = []
    zero = filled.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    if zero.get("stage") == "auto":
        problems.append(Problem("zero_optimization.stage cannot be auto", "auto", "write 0, 1, 2 or 3"))
    for name in ("offload_param", "offload_optimizer"):
        offload = zero.get(name)
        if not isinstance(offload, dict):
            continue
        device, here = offload.get("device", "none"), f"zero_optimization.{name}"
        if device == "auto":
            problems.append(Problem(f"{here}.device cannot be auto", "auto", "write none, cpu or nvme"))
        if device == "nvme" and not offload.get("nvme_path"):
            problems.append(Problem(f"{here}.nvme_path is required", "not set", "name a folder on a local NVMe disk"))
        lowest = 3 if name == "offload_param" or device == "nvme" else 1
        if device in ("cpu", "nvme") and stage < lowest:
            what = f"{here} to {device} needs ZeRO stage {lowest} or more"
            problems.append(Problem(what, f"stage {stage}", "raise the stage or remove the section"))
    types = filled.get("data_types")
    sums = types.get("grad_accum_dtype", "auto") if isinstance(types, dict) else "auto"
    if stage == 0 and dtype != "fp32" and not sums == dtype == "bf16":
        what = f"ZeRO stage 0 would sum gradients in {dtype}"
        do = "deepspeed=zero1 (the same memory on one GPU, sums in fp32), or training.dtype=fp32"
        if dtype == "bf16":
            do += ', or accept it: "data_types": {"grad_accum_dtype": "bf16"} in a copy of the file'
        problems.append(Problem(what, f"training.dtype={dtype}, stage 0", do))
    if stage == 0 and sums not in ("auto", dtype):
        what = "data_types.grad_accum_dtype other than the run's dtype needs ZeRO stage 1 or more"
        problems.append(Problem(what, f"{sums} with {dtype} at stage 0", 'write "auto"'))
    if zero.get("round_robin_gradients") is True and stage in (1, 2):
        # DeepSpeed then divides parameters in another order than it records, so that nobody can save them by name.
        what = "zero_optimization.round_robin_gradients would make checkpoints wrong"
        problems.append(Problem(what, f"true at stage {stage}", "leave it out"))
    group = zero.get("zero_hpz_partition_size", 1)
    if isinstance(group, int) and not isinstance(group, bool) and group > 1 and world_size % group:
        what = "zero_optimization.zero_hpz_partition_size must divide the number of GPUs"
        do = "copy the file and set it to the number of GPUs of a node"
        problems.append(Problem(what, f"{group} with {world_size} GPUs", do))
    return problems


def _drop_auto(section: dict[str, Any]) -> None:
    """What is still auto has a default in DeepSpeed: leaving the key out is how to ask for it."""
    for key in list(section):
        if section[key] == "auto":
            del section[key]
        elif isinstance(section[key], dict):
            _drop_auto(section[key])
            if not section[key]:
                del section[key]
