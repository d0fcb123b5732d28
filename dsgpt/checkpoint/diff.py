"""Two checkpoints compared: what their manifests say, and their tensors bit for bit, whatever topologies wrote them.

One parameter at a time is in memory, so the comparison of two large states takes long but fits anywhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.config import flatten

# What is about the files, not about the state.
_NOT_STATE = ("files", "parameters", "frozen", "attempt", "format_version", "sha256")
MAX_SHOWN = 8


@dataclass(frozen=True)
class TensorDifference:
    """`largest` is the largest absolute difference, None where one side has no such tensor or another shape."""

    name: str
    kind: str
    largest: float | None
    unequal: int

    def __str__(self) -> str:
        where = f"{self.kind} of {self.name}"
        if self.largest is None:
            return f"{where}: only in one of them, or of another shape"
        return f"{where}: {self.unequal} elements differ, by at most {self.largest:.3g}"


@dataclass(frozen=True)
class Difference:
    """`recorded` maps a dotted key of the manifests to both values."""

    recorded: dict[str, tuple[Any, Any]]
    tensors: list[TensorDifference]
    compared: int

    def as_dict(self) -> dict[str, Any]:
        recorded = {key: list(values) for key, values in self.recorded.items()}
        return {"recorded": recorded, "tensors": [vars(one) for one in self.tensors], "compared": self.compared}

    def lines(self) -> list[str]:
        told = [f"{key}: {_short(before)} | {_short(after)}" for key, (before, after) in self.recorded.items()]
        told += [str(one) for one in self.tensors]
        equal = self.compared - len(self.tensors)
        return [*told, f"{equal} of {self.compared} tensors are equal bit for bit"]


def _short(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, list) and len(value) > MAX_SHOWN else repr(value)


def compare(one: Path, other: Path, check: bool = True) -> Difference:
    """Everything that differs. Raises CheckpointError where one cannot be read or, with `check`, is damaged."""
    left, right = CheckpointReader(one, check), CheckpointReader(other, check)
    recorded = _recorded(left.manifest, right.manifest)
    kinds = list(dict.fromkeys((*left.manifest["state_kinds"], *right.manifest["state_kinds"])))
    tensors, compared = [], 0
    for name in sorted(left.parameters.keys() | right.parameters.keys()):
        for kind in kinds:
            compared += 1
            sides = [
                reader.tensor(name, kind)
                if name in reader.parameters and kind in reader.manifest["state_kinds"]
                else None
                for reader in (left, right)
            ]
            difference = _compare(name, kind, *sides)
            if difference is not None:
                tensors.append(difference)
    for name in sorted(left.frozen.keys() | right.frozen.keys()):
        compared += 1
        difference = _compare(
            name, "frozen", *(one.tensor(name) if name in one.frozen else None for one in (left, right))
        )
        if difference is not None:
            tensors.append(difference)
    buffers = left.buffers(), right.buffers()
    for name in sorted(buffers[0].keys() | buffers[1].keys()):
        compared += 1
        difference = _compare(name, "buffer", buffers[0].get(name), buffers[1].get(name))
        if difference is not None:
            tensors.append(difference)
    return Difference(recorded, tensors, compared)


def _recorded(left: dict[str, Any], right: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    flat = [
        flatten({key: value for key, value in manifest.items() if key not in _NOT_STATE}) for manifest in (left, right)
    ]
    keys = sorted(flat[0].keys() | flat[1].keys())
    # Through JSON: two lists of floats differ only where a digit does.
    return {
        key: (flat[0].get(key), flat[1].get(key))
        for key in keys
        if json.dumps(flat[0].get(key)) != json.dumps(flat[1].get(key))
    }


def _compare(name: str, kind: str, left: torch.Tensor | None, right: torch.Tensor | None) -> TensorDifference | None:
    if left is None or right is None or left.shape != right.shape:
        return TensorDifference(name, kind, None, 0)
    # Bits, so that a NaN equals itself and 0.0 is not -0.0.
    unequal = left.contiguous().view(torch.uint8).ne(right.contiguous().view(torch.uint8))
    if not unequal.any():
        return None
    return TensorDifference(name, kind, float((left.double() - right.double()).abs().max()), int(left.ne(right).sum()))
