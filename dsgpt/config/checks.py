"""Relations between keys: what contradicts itself is a problem, what has no effect in this run is a warning.

Each finding names the keys it rests on, so that the loader can drop findings about keys that are themselves mistyped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dsgpt.config.model import described_folder
from dsgpt.config.schema import RunConfig, default_min_learning_rate, nearest_divisors
from dsgpt.config.shipped import find_deepspeed_config
from dsgpt.errors import ConfigError, Problem


@dataclass(frozen=True)
class Finding:
    problem: Problem
    keys: tuple[str, ...]


def check(config: RunConfig) -> list[Finding]:
    """Every contradiction between the keys of a config."""
    parts = (_check_model, _check_fine_tuning, _check_length, _check_data, _check_optimizer, _check_run)
    return [finding for part in parts for finding in part(config)]


def _finding(keys: tuple[str, ...], what: str, seen: str, do: str) -> Finding:
    return Finding(Problem(what, seen, do), keys)


def _has_states(folder: Path) -> bool:
    return (folder / "latest").is_file() or any(folder.glob("*_states.pt"))


def _check_model(config: RunConfig) -> Iterator[Finding]:
    model = config.model
    kind, _, name = model.init_from.partition(":")
    if model.init_from != "scratch" and not (kind in ("hf", "checkpoint", "deepspeed", "fork") and name):
        do = "write scratch, hf:<folder or hub name>, checkpoint:<path>, deepspeed:<folder> or fork:<run>@<step>"
        yield _finding(("model.init_from",), "model.init_from is not understood", model.init_from, do)
    # What a run started from may be gone when it continues: a folder that is not there is no finding here.
    written = kind == "deepspeed" and _has_states(Path(name)) and described_folder(Path(name)) is None
    if model.init_from == "scratch" or written:
        needed = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        for key in (key for key in needed if getattr(model, key) is None):
            what = (
                f"model.{key}: required for a model {'whose folder has no config.json' if written else 'from scratch'}"
            )
            do = f"set model.{key}: {type(model).model_fields[key].description}"
            yield _finding((f"model.{key}",), what, "not set", do)
    hidden, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    if hidden and heads and model.head_dim is None and hidden % heads:
        yield _finding(
            ("model.hidden_size", "model.num_attention_heads", "model.head_dim"),
            "model.num_attention_heads must divide model.hidden_size",
            f"{hidden} / {heads} = {hidden / heads:.4g}",
            f"use {nearest_divisors(hidden, heads)} heads, or set model.head_dim",
        )
    if heads and kv_heads and heads % kv_heads:
        yield _finding(
            ("model.num_attention_heads", "model.num_key_value_heads"),
            "model.num_key_value_heads must divide model.num_attention_heads",
            f"{heads} / {kv_heads} = {heads / kv_heads:.4g}",
            f"use {nearest_divisors(heads, kv_heads)}",
        )
    divided = hidden // heads if hidden and heads and hidden % heads == 0 else None
    head_dim = model.head_dim or divided
    if model.position_embedding == "rotary" and head_dim is not None and head_dim % 2:
        yield _finding(
            ("model.head_dim", "model.hidden_size", "model.num_attention_heads", "model.position_embedding"),
            "rotary positions turn pairs of channels: the width of a head must be even",
            f"head width {head_dim}",
            "change the number of heads, or set an even model.head_dim",
        )
    longest = model.max_position_embeddings
    if longest is not None and config.training.seq_length > longest:
        yield _finding(
            ("training.seq_length", "model.max_position_embeddings"),
            "training.seq_length is longer than the model's positions",
            f"{config.training.seq_length} > model.max_position_embeddings = {longest}",
            f"set training.seq_length to at most {longest}, or raise model.max_position_embeddings",
        )


def _check_fine_tuning(config: RunConfig) -> Iterator[Finding]:
    settings, which = config.fine_tuning, "fine_tuning.train"
    if config.model.init_from == "scratch" and settings.train != "all":
        yield _finding(
            ("model.init_from", which),
            "a model from scratch cannot be frozen in part: what is frozen would stay at random",
            f"model.init_from=scratch, fine_tuning.train={settings.train}",
            "model.init_from=hf:<folder> or checkpoint:<run>, or fine_tuning.train=all",
        )
    if settings.train == "patterns" and not settings.patterns:
        do = (
            "fine_tuning.patterns=[NAME, ...] with * for anything; a start prints the model's names where one fits none"
        )
        yield _finding((which, "fine_tuning.patterns"), "patterns are trained, and there are none", "an empty list", do)
    if not settings.unfreeze_at:
        return
    keys = (which, "fine_tuning.unfreeze_at", "fine_tuning.num_last_blocks")
    stages = dict(sorted(settings.unfreeze_at.items()))
    if settings.train in ("all", "lora"):
        what = "fine_tuning.unfreeze_at has nothing to unfreeze"
        if settings.train == "lora":
            what = "fine_tuning.unfreeze_at would train matrices that have adapters"
        do = "fine_tuning.train=last_blocks, or leave unfreeze_at out"
        yield _finding(keys, what, f"fine_tuning.train={settings.train}, unfreeze_at={stages}", do)
        return
    first = settings.num_last_blocks if settings.train == "last_blocks" else 0
    numbers = [math.inf if one == "all" else one for one in (0 if first == "auto" else first, *stages.values())]
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        seen = f"unfreeze_at={stages}" + (f", num_last_blocks={first}" if settings.train == "last_blocks" else "")
        what = "each step of fine_tuning.unfreeze_at must train more blocks than before"
        yield _finding(keys, what, seen, "growing numbers, all at the end: {1000: 4, 2000: all}")


def _check_length(config: RunConfig) -> Iterator[Finding]:
    training, optimizer = config.training, config.optimizer
    names = ("max_steps", "num_epochs", "max_tokens")
    given = {name: getattr(training, name) for name in names if getattr(training, name) is not None}
    keys = tuple(f"training.{name}" for name in names)
    if len(given) != 1:
        seen = ", ".join(f"training.{name}={value}" for name, value in given.items()) or "none of them"
        do = "keep one and set the others to null, e.g. training.max_steps=null" if given else "set one of them"
        what = "the length of a run is exactly one of training.max_steps, training.num_epochs and training.max_tokens"
        yield _finding(keys, what, seen, do)
        return
    if "num_epochs" in given:
        return  # known only with the dataset
    steps = training.num_steps()
    keys = (*keys, "training.seq_length", "training.global_batch_size", "optimizer.warmup_steps")
    if optimizer.warmup_steps >= steps:
        yield _finding(
            keys,
            "the warmup is as long as the run",
            f"optimizer.warmup_steps={optimizer.warmup_steps}, the run has {steps} steps",
            "lower optimizer.warmup_steps or lengthen the run",
        )
        return
    left = steps - optimizer.warmup_steps
    if optimizer.lr_schedule == "warmup_stable_decay" and (optimizer.decay_steps or 0) > left:
        yield _finding(
            (*keys, "optimizer.decay_steps", "optimizer.lr_schedule"),
            "warmup and decay together are longer than the run",
            f"{optimizer.warmup_steps} + {optimizer.decay_steps} > {steps} steps",
            f"set optimizer.decay_steps to at most {left}",
        )


def _check_data(config: RunConfig) -> Iterator[Finding]:
    train, validation = config.data.train, config.data.validation
    length = ("training.num_epochs", "training.max_steps", "training.max_tokens")
    if not train:
        yield _finding(
            ("data.train",), "data.train names no source", "an empty list", "name one or more: [{path: FOLDER}]"
        )
    for key, entries in (("data.train", train), ("data.validation", validation)):
        twice = sorted({str(one.path) for one in entries if [other.path for other in entries].count(one.path) > 1})
        if twice:
            do = "name it once; a larger weight reads it more often" if key == "data.train" else "name it once"
            yield _finding((key,), f"{key} names a source twice", ", ".join(twice), do)
    names = [one.name or one.path.name for one in validation]
    if len(set(names)) < len(names) and len({one.path for one in validation}) == len(validation):
        do = "give them different names: data.validation=[{path: ..., name: ...}, ...]"
        yield _finding(("data.validation",), "validation sets have the same name", ", ".join(names), do)
    seen = ", ".join(f"{one.path.name}: weight {one.weight:g}, epochs {one.epochs}" for one in train)
    if any(one.epochs for one in train):
        if not all(one.epochs and one.weight == 1 for one in train):
            do = "give every source its epochs and none a weight, or the other way round"
            yield _finding(("data.train",), "epochs and weights of sources contradict each other", seen, do)
        elif config.training.num_epochs is None:
            do = "set training.num_epochs (1 = these passes exactly), or give weights instead of epochs"
            what = "epochs of sources need a run whose length is training.num_epochs"
            yield _finding(("data.train", *length), what, seen, do)
        elif config.data.append_sources:
            do = "give weights and training.max_steps"
            what = "sources cannot be appended to a mixture that is made of whole passes"
            yield _finding(("data.train", "data.append_sources"), what, seen, do)
    elif config.training.num_epochs is not None and len(train) > 1:
        do = "give every source its epochs: data.train=[{path: ..., epochs: 1}, ...]; or set training.max_steps or max_tokens"
        what = "training.num_epochs of several sources says nothing about each of them"
        yield _finding(("data.train", *length), what, seen, do)


def _check_optimizer(config: RunConfig) -> Iterator[Finding]:
    optimizer = config.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield _finding(
            ("optimizer.min_learning_rate", "optimizer.learning_rate"),
            "optimizer.min_learning_rate is above optimizer.learning_rate",
            f"{optimizer.min_learning_rate:g} > {optimizer.learning_rate:g}",
            "lower it, or leave it out (learning_rate / 10)",
        )
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        seen = str(list(optimizer.betas))
        yield _finding(
            ("optimizer.betas",), "optimizer.betas must lie in [0, 1)", seen, "the usual pair is [0.9, 0.95]"
        )


def _check_run(config: RunConfig) -> Iterator[Finding]:
    training = config.training
    micro, total = training.micro_batch_size_per_gpu, training.global_batch_size
    if micro != "auto" and total % micro:
        close = [str(value) for value in (total // micro * micro, (total // micro + 1) * micro) if value]
        yield _finding(
            ("training.micro_batch_size_per_gpu", "training.global_batch_size"),
            "global_batch_size = micro_batch_size_per_gpu x GPUs x accumulation steps has no solution",
            f"{total} / {micro} = {total / micro:.4g}",
            f"set training.global_batch_size to {' or '.join(close)}, or choose a micro batch that divides {total}",
        )
    if config.device == "cpu" and training.dtype == "fp16":
        do = "set training.dtype to fp32 (or auto)"
        yield _finding(("device", "training.dtype"), "fp16 training needs a GPU", "device=cpu, training.dtype=fp16", do)
    if config.deepspeed != "auto":
        try:
            find_deepspeed_config(config.deepspeed)
        except ConfigError as error:
            yield from (Finding(problem, ("deepspeed",)) for problem in error.problems)


def ineffective_settings(config: RunConfig, written: set[str]) -> list[str]:
    """One line for each written key that differs from its default and changes nothing in this run."""
    model, optimizer = config.model, config.optimizer
    reasons: dict[str, str] = {}
    if optimizer.name == "adamw":
        reasons["optimizer.momentum"] = "adamw has none (its betas are set with optimizer.betas)"
    else:
        reasons["optimizer.betas"] = reasons["optimizer.eps"] = "only adamw has it"
    if optimizer.lr_schedule != "polynomial":
        reasons["optimizer.power"] = f"the schedule is {optimizer.lr_schedule}, not polynomial"
    if optimizer.lr_schedule != "warmup_stable_decay":
        reasons["optimizer.decay_steps"] = f"the schedule is {optimizer.lr_schedule}, not warmup_stable_decay"
    if optimizer.lr_schedule == "constant":
        reasons["optimizer.min_learning_rate"] = "the schedule is constant"
    if model.position_embedding == "learned":
        reasons["model.rope_theta"] = "positions are learned, not rotary"
    kind, _, name = model.init_from.partition(":")
    if kind not in ("scratch", "deepspeed") or (kind == "deepspeed" and described_folder(Path(name))):
        own = ("init_from", "trust_checkpoint", "dropout", "implementation", "attention")
        for key in (key for key in type(model).model_fields if key not in own):
            reasons[f"model.{key}"] = f"the shape comes from {model.init_from}"
    if kind != "hf" and not (kind == "deepspeed" and described_folder(Path(name))):
        reasons["model.implementation"] = "it is about hf:<folder>; there is one implementation of anything else"
    if kind == "scratch" or model.implementation == "native":
        reasons["model.attention"] = "it is about models of transformers; the native GPT has one way"
    reasons |= _ineffective_fine_tuning(config)
    stop, training = config.run.stop_at_step, config.training
    if stop is not None and training.num_epochs is None and stop >= training.num_steps():
        reasons["run.stop_at_step"] = f"the run has {training.num_steps()} steps"
    if len(config.data.train) == 1:
        reasons["data.train.0.weight"] = "there is only one source of training data"
    changed = written - _defaults_written_out(config)
    return [f"{key} has no effect: {reason}" for key, reason in reasons.items() if key in changed]


def _ineffective_fine_tuning(config: RunConfig) -> dict[str, str]:
    """Dotted key -> why it changes nothing."""
    settings, training = config.fine_tuning, config.training
    reasons: dict[str, str] = {}
    only = {"last_blocks": ("num_last_blocks", "train_embeddings"), "patterns": ("patterns",)}
    for needed, keys in only.items():
        if settings.train != needed:
            told = f"fine_tuning.train is {settings.train}, not {needed}"
            # Blocks that are unfrozen later take the embeddings along where it is set.
            later = settings.train == "patterns" and bool(settings.unfreeze_at)
            reasons |= {f"fine_tuning.{key}": told for key in keys if not (key == "train_embeddings" and later)}
    if settings.train != "lora":
        told = f"fine_tuning.train is {settings.train}, not lora"
        reasons |= {f"fine_tuning.lora.{key}": told for key in type(settings.lora).model_fields}
    length = (training.max_steps, training.max_tokens, training.num_epochs)
    if training.num_epochs is None and sum(one is not None for one in length) == 1:
        steps = training.num_steps()
        late = (step for step in settings.unfreeze_at if step >= steps)
        reasons |= {f"fine_tuning.unfreeze_at.{step}": f"the run has {steps} steps" for step in late}
    return reasons


def _defaults_written_out(config: RunConfig) -> set[str]:
    """Dotted keys of scalar settings whose value is the default anyway (a resolved config spells all of them out)."""
    same = {"data.train.0.weight"} if config.data.train[0].weight == 1 else set()
    sections = {"model": config.model, "optimizer": config.optimizer, "fine_tuning": config.fine_tuning}
    for name, section in {**sections, "fine_tuning.lora": config.fine_tuning.lora}.items():
        for key, field in type(section).model_fields.items():
            if getattr(section, key) == field.default:
                same.add(f"{name}.{key}")
    if config.optimizer.min_learning_rate == default_min_learning_rate(config.optimizer.learning_rate):
        same.add("optimizer.min_learning_rate")
    return same
