"""Named tensors that are read by ranges, and readers made of others: a model's own names, and more rows than are there.

    files = SafetensorsFolder(folder)                                     # under the names in the files
    reader = PartReader(files, {"w": Part("model.w"), "q": Part("c_attn.weight", 0, 768, transposed=True)})
    reader.read("w", start=0, numel=32)                                    # fp32, one-dimensional

All readers have the same three members, so they can be put on top of each other, and whoever loads a model need not know
what it comes from.

Growth: a rank that asks for its own ranges reads those, so all ranks of a ZeRO-3 run together read the files once. Two things
are read whole by every rank that needs a piece of them: a tensor that lies transposed in the file (GPT-2's matrices), and,
for new rows, the tensor whose mean they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from dsgpt.errors import ConfigError, Problem
from dsgpt.model.hf_format import Part, take_part

MEAN_ELEMENTS = 4 << 20  # of a tensor that are in memory at a time while its mean row is computed: 16 MiB


class TensorReader(ABC):
    """Tensors by name. `shapes` says which; `bytes_read` counts what was read from storage, 0 where nobody knows."""

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def bytes_read(self) -> int:
        return 0

    @abstractmethod
    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor, fp32, one-dimensional. Raises KeyError."""

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in its shape, fp32."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)


class PartReader(TensorReader):
    """Tensors each of which lies in one of another reader's: `parts` says for each name in which one, and where.

    What is a range of rows is read as that range. A transposed tensor is read whole, and the last one is kept, since
    several parts may lie in it: at most the largest such tensor is in memory, in fp32.
    """

    def __init__(self, source: TensorReader, parts: Mapping[str, Part]):
        self._source, self._parts = source, parts
        self.shapes = {name: _shape(source.shapes[part.source], part) for name, part in parts.items()}
        self._kept: tuple[str, Tensor] | None = None

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def read(self, name: str, start: int, numel: int) -> Tensor:
        part = self._parts[name]
        if part.transposed:
            return take_part(self._whole(part.source), part).flatten()[start:][:numel]
        row = math.prod(self._source.shapes[part.source][1:])
        return self._source.read(part.source, part.row * row + start, numel)

    def _whole(self, name: str) -> Tensor:
        if self._kept is None or self._kept[0] != name:
            self._kept = None  # before the next one is read
            self._kept = name, self._source.tensor(name)
        return self._kept[1]


class GrownReader(TensorReader):
    """Another reader's tensors, those named in `rows` with that many rows: each new one is the mean of all there are.

    So a new token begins with the average token's logit and changes no other's (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"). The mean is taken in double precision in a fixed order, once; every rank
    has the same bits. Names that the other reader lacks are ignored. Raises ConfigError for fewer rows than there are.
    """

    def __init__(self, source: TensorReader, rows: Mapping[str, int]):
        self._source, self._means = source, dict[str, Tensor]()
        self.shapes = {
            name: (rows.get(name, shape[0]), *shape[1:]) if shape else () for name, shape in source.shapes.items()
        }
        problems = [
            Problem(f"{name} has more rows than the model", seen=f"{there[0]}, expected {self.shapes[name][0]}")
            for name, there in source.shapes.items()
            if there and there[0] > self.shapes[name][0]
        ]
        if problems:
            raise ConfigError(problems=problems)

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def read(self, name: str, start: int, numel: int) -> Tensor:
        there, stop = math.prod(self._source.shapes[name]), start + numel
        if stop <= there:
            return self._source.read(name, start, numel)
        mean = self._mean(name)
        new = mean[torch.arange(max(start, there), stop) % len(mean)]
        return torch.cat((self._source.read(name, start, there - start), new)) if start < there else new

    def _mean(self, name: str) -> Tensor:
        """(row elements,) fp32."""
        if name not in self._means:
            rows, row = self._source.shapes[name][0], math.prod(self._source.shapes[name][1:])
            total, at_once = torch.zeros(row, dtype=torch.float64), max(1, MEAN_ELEMENTS // row)
            for first in range(0, rows, at_once):
                count = min(at_once, rows - first)
                total += self._source.read(name, first * row, count * row).view(count, row).sum(0, dtype=torch.float64)
            self._means[name] = (total / rows).float()
        return self._means[name]


def _shape(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    return tuple(take_part(torch.empty(shape, device="meta"), part).shape)


def refuse_other_shapes(what: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError that names every tensor that is missing, is one too many, or has another shape."""
    problems = [
        Problem(f"{what}: {name}", seen=f"{found.get(name, 'missing')}, expected {wanted.get(name, 'no such')}")
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if problems:
        raise ConfigError(problems=problems)
