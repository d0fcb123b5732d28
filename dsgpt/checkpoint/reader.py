"""Reading committed checkpoints: any range of any parameter, whatever topology wrote it, without DeepSpeed.

    reader = CheckpointReader("runs/my-run/checkpoints/step-00001000"); reader.tensor("embed_tokens.weight")

Only the files that hold the range are opened, and only its bytes are read, so a rank of another world size reads about
its own share of the state, not the whole.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsgpt.checkpoint import commit
from dsgpt.errors import CheckpointError

MASTER = "master"


def partition_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def buffer_key(name: str) -> str:
    return f"buffer:{name}"


class CheckpointReader:
    """Reads any range of any parameter of a committed checkpoint, opening only the files that hold it."""

    def __init__(self, checkpoint: Path):
        self.path = Path(checkpoint)
        self.manifest = commit.read_manifest(self.path)
        self._open: dict[int, Any] = {}

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self.manifest["parameters"].items()}

    def _fragments(self, name: str) -> list[tuple[int, int, int]]:
        entry = self.manifest["parameters"].get(name)
        if entry is None:
            raise CheckpointError("the checkpoint has no such parameter", seen=f"{name} in {self.path}")
        if "fragments" in entry:
            return [tuple(fragment) for fragment in entry["fragments"]]
        numel, piece = math.prod(entry["shape"]), entry["piece"]
        return [(i, start, min(piece, numel - start)) for i, start in enumerate(range(0, numel, piece))]

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = self.path / partition_file(rank)
            try:
                self._open[rank] = safe_open(path, framework="pt")
            except Exception as error:
                raise CheckpointError("a partition cannot be opened", seen=f"{path}: {error}") from error
        return self._open[rank]

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened parameter, fp32. Raises CheckpointError for a gap."""
        result, found = torch.empty(numel, dtype=torch.float32), 0
        for rank, have_start, have_numel in self._fragments(name):
            low, high = max(start, have_start), min(start + numel, have_start + have_numel)
            if low < high:
                piece = self._file(rank).get_slice(f"{kind}:{name}")[low - have_start : high - have_start]
                result[low - start : high - start] = piece
                found += high - low
        if found != numel:
            raise CheckpointError(
                "the checkpoint does not hold the whole parameter", seen=f"{name}: {found} of {numel}"
            )
        return result

    def tensor(self, name: str, kind: str = MASTER) -> Tensor:
        """A whole parameter in its shape."""
        shape = self.parameters[name]
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def buffers(self) -> dict[str, Tensor]:
        """Running statistics, whole; empty for models without any. They lie in rank 0's file."""
        names = self.manifest.get("buffers", {})
        try:
            return {name: self._file(0).get_tensor(buffer_key(name)) for name in names}
        except SafetensorError as error:
            raise CheckpointError("the checkpoint lacks running statistics", seen=f"{self.path}: {error}") from error
