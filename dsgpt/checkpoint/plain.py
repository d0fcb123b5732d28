"""The weights of a checkpoint as a model without adapters has them: adapters are added to the matrices they stand beside.

    weights = PlainWeights(CheckpointReader(path)); weights.tensor("blocks.0.attention.q_proj.weight")

What has no adapter is read by range, as the reader does it. A matrix with one is read whole, and added up in fp32.
"""

from __future__ import annotations

from torch import Tensor

from dsgpt.checkpoint.reader import MASTER, CheckpointReader
from dsgpt.config import LoraSection
from dsgpt.model.lora import adapter_names, base_name, is_adapter, merged, plain_name
from dsgpt.model.tensor_reader import TensorReader


class PlainWeights(TensorReader):
    """Names, shapes and fp32 values of a committed checkpoint's parameters. Raises what the reader raises."""

    def __init__(self, reader: CheckpointReader):
        self.reader = reader
        saved = dict(reader.manifest.get("lora", {}))
        self._transposed = saved.pop("transposed", False)
        self._lora = LoraSection.model_validate(saved)
        self._saved = reader.parameters | reader.frozen
        self.shapes = {plain_name(name): shape for name, shape in self._saved.items() if not is_adapter(name)}

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened parameter."""
        saved, base = self._saved, base_name(name)
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
