"""What `dsgpt verify-resume` concludes from the numbers and states of two runs. Nothing is started here.

    first_difference(expected, seen, range(11, 21))     # None, or the first step whose numbers have other bits
    drift(expected, seen, range(11, 21), 1e-5)          # how far the losses go apart, where other bits are to be expected

`expected` and `seen` map a step to its line of metrics.jsonl. Torch is loaded only where two states are compared, tensor by
tensor. Growth: the numbers are a line per step, whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsgpt.checkpoint.diff import Difference

Lines = Mapping[int, Mapping[str, Any]]

COMPARED = ("loss", "gradient_norm", "learning_rate", "data_crc", "consumed_samples", "loss_scale")
# What depends on neither the number of ranks nor the micro-batch; of the losses only a tolerance is promised there.
OF_THE_SCHEDULE = ("learning_rate", "consumed_samples")
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
# Sums in another order drift apart with every step; a loss this far off is no rounding any more.
WILD = 0.1


@dataclass(frozen=True)
class Check:
    """`passed` None: told, not judged."""

    name: str
    passed: bool | None
    detail: str = ""

    def __str__(self) -> str:
        word = {True: "yes", False: "NO", None: "-"}[self.passed]
        return f"{word:<5}{self.name}{f': {self.detail}' if self.detail else ''}"


@dataclass(frozen=True)
class StepDifference:
    """The first step whose numbers differ: name -> both values, None where a side does not have it."""

    step: int
    values: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        return f"step {self.step}: " + ", ".join(f"{key} {a!r} against {b!r}" for key, (a, b) in self.values.items())


@dataclass(frozen=True)
class Drift:
    """Relative differences of the losses: the first, the worst and its step, and the first step beyond the tolerance."""

    first: float
    worst: float
    worst_step: int
    beyond: int | None


@dataclass(frozen=True)
class Report:
    """`ok`: what was to be proven holds. `identical` is None where other bits are to be expected (another topology)."""

    verdict: str
    ok: bool
    identical: bool | None
    checks: list[Check]
    first_differing_step: int | None = None
    first_differing_tensor: dict[str, Any] | None = None
    drift: Drift | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity and no NaN: they become null."""
        told = asdict(self)
        for part in ("first_differing_tensor", "drift"):
            for key, value in (told[part] or {}).items():
                if isinstance(value, float) and not math.isfinite(value):
                    told[part][key] = None
        return told


def first_difference(
    expected: Lines, seen: Lines, steps: Iterable[int], keys: tuple[str, ...] = COMPARED
) -> StepDifference | None:
    """The first of `steps` at which any of `keys` has other bits, or a line is missing on one side."""
    for step in steps:
        left, right = expected.get(step, {}), seen.get(step, {})
        # repr: the bits of a float, so that 0.0 is not -0.0.
        found = {key: (left.get(key), right.get(key)) for key in keys if repr(left.get(key)) != repr(right.get(key))}
        if found or not left:
            return StepDifference(step, found)
    return None


def drift(expected: Lines, seen: Lines, steps: Iterable[int], tolerance: float) -> Drift:
    """How far apart the losses of `steps` are; a loss that is missing or not finite on one side alone is infinitely far."""
    far = {step: _relative(expected.get(step, {}).get("loss"), seen.get(step, {}).get("loss")) for step in steps}
    worst = max(far, key=lambda step: far[step])
    beyond = next((step for step, value in far.items() if value > tolerance), None)
    return Drift(next(iter(far.values())), far[worst], worst, beyond)


def _relative(expected: float | None, seen: float | None) -> float:
    if expected is None or seen is None:
        return 0.0 if expected is seen else math.inf
    return abs(seen - expected) / max(abs(expected), 1e-12)


def loss_checks(found: Drift, dtype: str, unlike: str, until: int) -> list[Check]:
    """Of a resume whose bits may differ: its first loss against the tolerance, its later ones against the absurd.

    `unlike` says why even the first loss is another one (dropout), or is empty.
    """
    tolerance = TOLERANCES[dtype]
    name = f"the first loss after the resume is the one before it, to {tolerance:g} relative ({dtype})"
    seen = f"{found.first:.2g}"
    first = (
        Check(name, None, f"{seen}; not judged: {unlike}") if unlike else Check(name, found.first <= tolerance, seen)
    )
    told = f"worst {found.worst:.2g} at step {found.worst_step}"
    told += f", first beyond {tolerance:g} at step {found.beyond}" if found.beyond else f", none beyond {tolerance:g}"
    later = Check(f"the losses up to step {until} stay near (within {WILD:.0%})", found.worst <= WILD, told)
    return [first, later]


def why_unlike(split: tuple[Any, Any], other: tuple[Any, Any], dropout: bool, batch_norm: bool) -> str:
    """Why the same weights and samples give another loss when (ranks, micro-batch) goes from `split` to `other`, or ""."""
    if split == other:
        return ""
    if dropout:
        return "dropout's masks follow from rank and micro-step, so they are others with other ranks or micro-batches"
    return "batch norm's statistics are those of ranks x micro-batch" if batch_norm else ""


def compare_states(one: Path, other: Path, recorded: tuple[str, ...] = ("",)) -> Difference:
    """What differs: of the tensors, and of what is recorded under keys that begin with one of `recorded`.

    Damage is a difference as well, and is named with its tensor.
    """
    from dsgpt.checkpoint.diff import compare

    found = compare(one, other, check=False)
    return replace(found, recorded={key: both for key, both in found.recorded.items() if key.startswith(recorded)})


def differ(difference: Difference) -> bool:
    return bool(difference.tensors or difference.recorded)


def summary(difference: Difference) -> str:
    """The first tensor that differs, or else what is recorded, how much more there is, and the count."""
    lines = replace(difference, recorded={}).lines() if difference.tensors else difference.lines()
    return "; ".join([*lines[:1], f"and {len(lines) - 2} more", lines[-1]] if len(lines) > 2 else lines)


def first_tensor(states: Sequence[tuple[int, Difference]]) -> dict[str, Any] | None:
    """The first tensor, by name, of the earliest state in which one differs."""
    return next(({"step": step, **vars(state.tensors[0])} for step, state in states if state.tensors), None)
