"""The weights of a checkpoint as a model without adapters has them: adapters are added to the matrices they stand beside.

    weights = PlainWeights(CheckpointReader(path)); weights.tensor("blocks.0.attention.q_proj.weight")

What has no adapter is read by range, as the reader does it. A matrix with one is read whole, and added up in fp32.
"""

from __future__ import annotations

import math
from functools import cached_property

from torch import Tensor

from dsgpt.checkpoint.reader import MASTER, CheckpointReader
from dsgpt.config import LoraSection
from dsgpt.model.lora import adapter_names, base_name, is_adapter, merged, plain_name


class PlainWeights:
    """Names, shapes and fp32 values of a committed checkpoint's parameters. Raises what the reader raises."""

    def __init__(self, reader: CheckpointReader):
        self.reader = reader
        saved = dict(reader.manifest.get("lora", {}))
        self._transposed = saved.pop("transposed", False)
        self._lora = LoraSection.model_validate(saved)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By plain name."""
        saved = self.reader.parameters | self.reader.frozen
        return {plain_name(name): shape for name, shape in saved.items() if not is_adapter(name)}

    def tensor(self, name: str) -> Tensor:
        return self.read(name, 0, math.prod(self.shapes[name])).view(self.shapes[name])

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened parameter."""
        saved = self.reader.parameters | self.reader.frozen
        base = base_name(name)
        if base not in saved:
            return self.reader.read(name, MASTER, start, numel)
        matrix = self.reader.tensor(base)
        one, two, length = adapter_names(name)
        if one in saved:
            magnitude = self.reader.tensor(length) if length in saved else None
            a, b = self.reader.tensor(one), self.reader.tensor(two)
            whole = merged(matrix.t() if self._transposed else matrix, self._lora, a, b, magnitude)
            matrix = (whole.t() if self._transposed else whole).contiguous()
        return matrix.flatten()[start : start + numel]
