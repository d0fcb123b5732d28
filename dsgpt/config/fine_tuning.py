"""The `fine_tuning` section: which parameters of the model are trained, and at which share of the learning rate.

A block is a transformer block, counted from the input; the last one stands before the final norm and the output head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dsgpt.config.fields import Bool, Count, CountOrZero, Real, Section


def _as_number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


Step = Annotated[int, BeforeValidator(_as_number), Field(ge=1)]  # as the key of a mapping


class LoraSection(Section):
    """Low-rank adapters beside frozen matrices (Hu et al. 2021); with use_dora their magnitude too (Liu et al. 2024)."""

    rank: Count = Field(default=8, description="inner size of an adapter")
    alpha: Real = Field(default=16.0, gt=0, description="an adapter's output is scaled by alpha / rank")
    dropout: Real = Field(default=0.0, ge=0, lt=1, description="dropout before an adapter")
    target_modules: tuple[str, ...] = Field(
        default=(),
        description="ends or patterns of the names of linear layers, e.g. [q_proj, v_proj]; empty = all in the blocks",
    )
    use_dora: Bool = Field(default=False, description="train the length of each row of a matrix beside its adapter")


class FineTuningSection(Section):
    """What is trained; the rest is frozen: it costs no gradients, no optimizer state and is saved once."""

    train: Literal["all", "last_blocks", "patterns", "lora"] = Field(
        default="all",
        description="all, last_blocks (num_last_blocks of them, final norm and head), patterns (of parameter names), lora",
    )
    num_last_blocks: CountOrZero | Literal["auto"] = Field(
        default=2,
        description="how many of the last blocks are trained; auto = by the size of the data and its likeness to the "
        "model's own, measured before the first step",
    )
    patterns: tuple[str, ...] = Field(
        default=(), description="names of trained parameters, * stands for anything: [blocks.5.*, '*.mlp.*']"
    )
    train_embeddings: Bool = Field(
        default=False,
        description="with last_blocks also the embeddings, and a head that shares them, which else stays frozen",
    )
    learning_rate_decay_per_block: Real = Field(
        default=1.0, gt=0, le=1, description="factor on the learning rate for each block further from the output"
    )
    learning_rate_scales: dict[str, Real] = Field(
        default={},
        description="factor on the learning rate by pattern of parameter names; the first pattern that fits counts",
    )
    unfreeze_at: dict[Step, Count | Literal["all"]] = Field(
        default={},
        description="from this step on so many last blocks are trained, or all of the model: {1000: 4, 2000: all}",
    )
    lora: LoraSection = Field(default=LoraSection())
    neftune_alpha: Real = Field(
        default=0.0,
        ge=0,
        description="uniform noise of this strength on the embeddings while training (Jain et al. 2023); 0 = none",
    )

    def counted_unfreezings(self, known: list[int], step: int, optimizer_steps: int) -> list[int]:
        """Optimizer steps taken before each unfreezing that is behind step `step`, where those in `known` were counted."""
        due = self.stage_at(step)
        return [*known[:due], *[optimizer_steps] * (due - len(known))]

    def stage_at(self, step: int) -> int:
        """How many unfreezings are behind step `step`."""
        return sum(first <= step for first in self.unfreeze_at)


@dataclass(frozen=True)
class Trained:
    """`stage`: how many unfreezings came before it was trained; `scale`: its factor on the learning rate."""

    stage: int
    scale: float
