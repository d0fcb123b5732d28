"""Reading committed checkpoints: any range of any parameter, whatever topology wrote it, without DeepSpeed.

    reader = CheckpointReader("runs/my-run/checkpoints/step-00001000"); reader.tensor("embed_tokens.weight")

Only the files that hold the range are opened, only its bytes are read, and they are verified as they are read (files.py), so
the ranks of another world size together read the state once, and each only its own share. Where a tensor lies in a file
follows from the manifest; no header is read.

Growth: a range costs what it overlaps, not the number of ranks that wrote the checkpoint. A rank that resumes opens the files
of about (old ranks / new ranks) neighbours; where one of the two is ZeRO 3 and the other 1 or 2, all of them, which costs a
rank 40 KB of memory, 3 ms and a few KB read for each; at most `MAX_OPEN` are open at a time, since the usual limit is 1,024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.files import Places, StateFile, file_order
from dsgpt.checkpoint.ranges import held, overlaps
from dsgpt.errors import CheckpointError, DamagedError
from dsgpt.model.safetensors_folder import DTYPES, bytes_of
from dsgpt.model.safetensors_header import ITEM_BYTES

MASTER = "master"
MAX_OPEN = 256


def partition_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def frozen_file(rank: int) -> str:
    return f"frozen-{rank:05d}.safetensors"


def buffer_key(name: str) -> str:
    return f"buffer:{name}"


class CheckpointReader:
    """Reads any range of any parameter of a committed checkpoint, opening only the files that hold it.

    With `check` False what is read is not compared with its checksums. Raises CheckpointError, DamagedError among them.
    """

    def __init__(self, checkpoint: Path, check: bool = True):
        self.path, self.check = Path(checkpoint), check
        self.manifest = commit.read_manifest(self.path)
        self._files: dict[str, StateFile] = {}
        self._recent: dict[str, None] = {}  # those that may be open, the one not used for longest first

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what was trained."""
        return {name: tuple(entry["shape"]) for name, entry in self.manifest["parameters"].items()}

    @property
    def frozen(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what was not."""
        return {name: tuple(entry["shape"]) for name, entry in self.manifest.get("frozen", {}).items()}

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files.values())

    def _file(self, name: str, places: Callable[[int], Places | None] = lambda data: None) -> StateFile:
        """`places` say where its tensors lie when they begin at a byte; else its header is read."""
        if name not in self._files:
            entry = self.manifest["files"].get(name)
            if entry is None:
                raise DamagedError("the manifest does not know a file", seen=f"{name} in {self.path}")
            found = places(entry["header_bytes"]) if "header_bytes" in entry else None
            self._files[name] = StateFile(self.path / name, entry, self.check, found)
        self._recent.pop(name, None)
        self._recent[name] = None
        if len(self._recent) > MAX_OPEN:
            oldest = next(iter(self._recent))
            del self._recent[oldest]
            self._files[oldest].close()
        return self._files[name]

    def _partition(self, rank: int) -> StateFile:
        def places(data: int) -> Places | None:
            if rank == 0 and self.manifest.get("buffers"):
                return None
            return Places(self._order, (4 * held(entry, rank) for entry in self._in_order), data)

        return self._file(partition_file(rank), places)

    def _frozen(self, rank: int) -> StateFile:
        def places(data: int) -> Places:
            entries = self.manifest["frozen"]
            names = sorted(entries, key=lambda name: file_order(name, entries[name]["dtype"]))
            order = {name: number for number, name in enumerate(names)}
            sizes = (ITEM_BYTES[entries[name]["dtype"]] * held(entries[name], rank) for name in names)
            return Places(order, sizes, data)

        return self._file(frozen_file(rank), places)

    @cached_property
    def _order(self) -> dict[str, int]:
        """Of all that a file of a rank may hold, by its name there."""
        kinds = self.manifest["state_kinds"]
        names = sorted(f"{kind}:{name}" for kind in kinds for name in self.manifest["parameters"])
        return {name: number for number, name in enumerate(names)}

    @cached_property
    def _in_order(self) -> list[dict[str, Any]]:
        return [self.manifest["parameters"][name.partition(":")[2]] for name in self._order]

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened parameter, fp32. Raises DamagedError for a gap.

        What was frozen has no state but its value, in the precision it had; it comes as fp32 too.
        """
        entry, file_of, key = self.manifest["parameters"].get(name), self._partition, f"{kind}:{name}"
        if entry is None and kind == MASTER:
            entry, file_of, key = self.manifest.get("frozen", {}).get(name), self._frozen, name
        if entry is None:
            raise CheckpointError("the checkpoint has no such parameter", seen=f"{kind} of {name} in {self.path}")
        dtype = DTYPES[entry.get("dtype", "F32")]
        result, found = torch.empty(numel, dtype=dtype), 0
        memory, size = bytes_of(result), result.element_size()
        for rank, low, high, begins in overlaps(entry, start, numel):
            into = memory[(low - start) * size : (high - start) * size]
            file_of(rank).read(key, (low - begins) * size, (high - begins) * size, into)
            found += high - low
        if found != numel:
            raise DamagedError("the checkpoint does not hold the whole parameter", seen=f"{name}: {found} of {numel}")
        return result.float()

    def tensor(self, name: str, kind: str = MASTER) -> Tensor:
        """A whole parameter in its shape."""
        shape = (self.parameters | self.frozen)[name]
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def weights(self) -> dict[str, Tensor]:
        """All parameters whole, trained and frozen."""
        return {name: self.tensor(name) for name in (*self.parameters, *self.frozen)}

    def buffers(self) -> dict[str, Tensor]:
        """Running statistics, whole; empty for models without any. They lie in rank 0's file."""
        found = {}
        for name in self.manifest.get("buffers", {}):
            file, key = self._partition(0), buffer_key(name)
            dtype, shape = file.shape_of(key)
            found[name] = torch.empty(shape, dtype=DTYPES[dtype])
            memory = bytes_of(found[name])
            file.read(key, 0, len(memory), memory)
        return found
