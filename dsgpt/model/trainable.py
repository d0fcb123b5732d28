"""Which parameters are trained, from when on, and at which share of the learning rate.

    plan = plan_training(names, fine_tuning, Parts.of(model, num_blocks), num_last_blocks=2, step=0)
    plan["blocks.5.mlp.up_proj.weight"]           # Trained(stage=0, scale=0.9); None of a frozen one

Names alone decide, so all ranks and all ZeRO stages come to the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from dsgpt.config.fine_tuning import FineTuningSection, Trained
from dsgpt.errors import ConfigError, Problem
from dsgpt.model.build import block_of, blocks_prefix
from dsgpt.model.lora import is_adapter
from dsgpt.units import format_count

_SHOWN_NAMES = 40
_BEFORE = ("word_embeddings_layernorm.", "project_in.")  # stand between the embeddings and the blocks


@dataclass(frozen=True)
class Parts:
    """What names mean in a model: the beginning of its blocks' names, and the names of what stands before the blocks.

    A head that shares its matrix with an embedding has the embedding's name, and is one of them.
    """

    prefix: str
    num_blocks: int
    embeddings: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, num_blocks: int) -> Parts:
        names = [name for name, _ in model.named_parameters()]
        prefix = blocks_prefix(names, num_blocks)
        embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
        found = {name for name, parameter in model.named_parameters() if id(parameter) in embeddings}
        return cls(prefix, num_blocks, frozenset(found | {name for name in names if any(p in name for p in _BEFORE)}))


def plan_training(
    names: Sequence[str], settings: FineTuningSection, parts: Parts, num_last_blocks: int, step: int
) -> dict[str, Trained | None]:
    """For each parameter how it is trained in optimizer step `step` (counted from 0); None of a frozen one.

    `num_last_blocks` is settings.num_last_blocks, measured where that is "auto". Raises ConfigError for patterns that fit
    nothing, and where nothing is left to train.
    """
    _check_patterns(names, settings)
    plan: dict[str, Trained | None] = {}
    for name in names:
        stage = _first_stage(name, settings, parts, num_last_blocks)
        trained = stage is not None and stage <= settings.stage_at(step)
        plan[name] = Trained(stage or 0, _scale(name, settings, parts)) if trained else None
    if not any(plan.values()):
        raise ConfigError("nothing is left to train", seen=f"fine_tuning.train={settings.train}")
    return plan


def _first_stage(name: str, settings: FineTuningSection, parts: Parts, num_last_blocks: int) -> int | None:
    """How many unfreezings must be behind for this parameter to be trained; None: it never is."""
    if settings.train == "all":
        return 0
    if settings.train == "lora":
        return 0 if is_adapter(name) else None
    if settings.train == "patterns":
        if any(fnmatchcase(name, pattern) for pattern in settings.patterns):
            return 0
    elif _in_last(name, num_last_blocks, settings.train_embeddings, parts):
        return 0
    for stage, (_, blocks) in enumerate(sorted(settings.unfreeze_at.items()), start=1):
        if blocks == "all" or _in_last(name, blocks, settings.train_embeddings, parts):
            return stage
    return None


def _in_last(name: str, num_last_blocks: int, train_embeddings: bool, parts: Parts) -> bool:
    block = block_of(name, parts.prefix)
    if block is not None:
        return block >= parts.num_blocks - num_last_blocks
    return train_embeddings or name not in parts.embeddings


def _scale(name: str, settings: FineTuningSection, parts: Parts) -> float:
    """The factor of the first pattern that fits, times the decay for each block between the parameter and the output."""
    block = block_of(name, parts.prefix)
    distance = parts.num_blocks if name in parts.embeddings else 0 if block is None else parts.num_blocks - 1 - block
    factors = settings.learning_rate_scales.items()
    factor = next((value for pattern, value in factors if fnmatchcase(name, pattern)), 1.0)
    return factor * settings.learning_rate_decay_per_block**distance


def _check_patterns(names: Sequence[str], settings: FineTuningSection) -> None:
    patterns = {f"fine_tuning.patterns: {one}": one for one in settings.patterns if settings.train == "patterns"}
    patterns |= {f"fine_tuning.learning_rate_scales: {one}": one for one in settings.learning_rate_scales}
    problems = [
        Problem("no parameter has such a name", seen=key, do=f"the names here: {shown_names(names)}")
        for key, pattern in patterns.items()
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if problems:
        raise ConfigError(problems=problems)


def shown_names(names: Sequence[str]) -> str:
    """Names with a * for the number of a block, each once."""
    short = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    return ", ".join(short[:_SHOWN_NAMES]) + (
        f" and {len(short) - _SHOWN_NAMES} more" if len(short) > _SHOWN_NAMES else ""
    )


def freeze(model: nn.Module, plan: Mapping[str, Trained | None]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plan[name] is not None)


def first_trained_block(plan: Mapping[str, Trained | None], parts: Parts) -> int:
    """The lowest block through which gradients pass: below it nothing has to be kept, or computed again."""
    if any(trained and name in parts.embeddings for name, trained in plan.items()):
        return 0
    blocks = [block_of(name, parts.prefix) for name, trained in plan.items() if trained]
    return min((block for block in blocks if block is not None), default=parts.num_blocks)


def table(plan: Mapping[str, Trained | None], shapes: Mapping[str, tuple[int, ...]], parts: Parts) -> str:
    """Trained and frozen parameters by part of the model, for people, neighbouring blocks of one kind in one row."""
    rows: list[tuple[str, int, int, str]] = []
    for part, names in _by_part(list(plan), parts):
        trained = sum(prod(shapes[name]) for name in names if plan[name])
        scales = sorted({one.scale for name in names if (one := plan[name])})
        rates = " ".join(f"x {scale:.3g}" for scale in scales)
        rows.append((part, trained, sum(prod(shapes[name]) for name in names) - trained, rates))
    merged: list[tuple[str, str, int, int, str]] = []
    for part, trained, frozen, rates in rows:
        last = merged[-1] if merged else None
        if last and part.startswith("block ") and last[0].startswith("block ") and last[2:] == (trained, frozen, rates):
            merged[-1] = (last[0], part, trained, frozen, rates)
        else:
            merged.append((part, part, trained, frozen, rates))
    lines = ["parameters              trained      frozen  learning rate"]
    for first, final, trained, frozen, rates in merged:
        label = first if first == final else f"blocks {first.split()[1]}-{final.split()[1]}, each"
        lines.append(f"  {label:<20}{format_count(trained):>9}{format_count(frozen):>12}  {rates}")
    trained, frozen = sum(row[1] for row in rows), sum(row[2] for row in rows)
    share = 100 * trained / max(1, trained + frozen)
    lines.append(f"  {'together':<20}{format_count(trained):>9}{format_count(frozen):>12}  {share:.3g} % trained")
    return "\n".join(lines)


def _by_part(names: Sequence[str], parts: Parts) -> list[tuple[str, list[str]]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        block = block_of(name, parts.prefix)
        part = "embeddings" if name in parts.embeddings else "norm and head" if block is None else f"block {block}"
        grouped.setdefault(part, []).append(name)
    return list(grouped.items())
