"""A folder of safetensors files, whole or sharded, as one reader: any range of any tensor costs its own bytes.

    folder = SafetensorsFolder(Path("Llama-3.2-1B"))
    folder.read("model.norm.weight", start=0, numel=32); folder.bytes_read

Which file holds a tensor is read from the files' headers; an index only says which files there are. Nothing is mapped: what
was read is in memory once, and a file that is cut off is an error, not a bus error.

Growth: every rank reads the headers of all files (some 100 bytes a tensor), and then what it asks for. One file is open at a
time. Beside its result a read holds `CHUNK_BYTES`.
"""

from __future__ import annotations

import json
import math
import os
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from dsgpt.errors import ConfigError, Problem
from dsgpt.model.safetensors_header import Place, read_header
from dsgpt.model.tensor_reader import TensorReader

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_BYTES = 16 << 20
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, as transformers chooses them: the whole one, else those of the index, else all.

    They need not exist. Raises ConfigError for an index that cannot be read or leads out of the folder.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not all(name == Path(name).name for name in names):
            raise ValueError("a file's name is a path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            "an index of safetensors is damaged", seen=f"{index}: {error!r}", do="copy it again"
        ) from error
    return [folder / name for name in names]


class SafetensorsFolder(TensorReader):
    """The tensors of a folder under their names in the files. Raises ConfigError for what is missing or damaged."""

    def __init__(self, folder: Path):
        self._opened: FileIO | None = None
        self._bytes_read = 0
        files = weight_files(folder)
        missing = [Problem("a file of weights is missing", str(f), "copy it again") for f in files if not f.is_file()]
        if missing or not files:
            do = "convert other formats to safetensors first"
            raise ConfigError(problems=missing or [Problem("no safetensors files here", str(folder), do)])
        self._places: dict[str, tuple[Path, Place]] = {}
        for file in files:
            for name, place in self._read_header(file).items():
                if name in self._places:
                    seen = f"{name} in {self._places[name][0]} and {file}"
                    raise ConfigError("a tensor lies in two files", seen, "remove what does not belong to the model")
                self._places[name] = file, place
        self.shapes = {name: place.shape for name, (_, place) in self._places.items()}
        self.dtypes = {name: DTYPES[place.dtype] for name, (_, place) in self._places.items()}

    def close(self) -> None:
        """Give its open file back; the next read opens one again."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def __del__(self) -> None:
        self.close()

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def read(self, name: str, start: int, numel: int) -> Tensor:
        file, place = self._places[name]
        if not 0 <= start <= start + numel <= math.prod(place.shape):
            raise ConfigError("a range lies outside a tensor", seen=f"{name} in {file}: {start} and {numel} more")
        result = torch.empty(numel)
        item = self.dtypes[name].itemsize
        chunk = torch.empty(min(numel, CHUNK_BYTES // item), dtype=self.dtypes[name])
        for at in range(0, numel, max(1, len(chunk))):
            values = chunk[: numel - at]
            self._fill(file, place.start + (start + at) * item, bytes_of(values))
            result[at : at + len(values)].copy_(values)
        return result

    def _read_header(self, file: Path) -> dict[str, Place]:
        try:
            whole = file.stat().st_size

            def read(position: int, size: int) -> bytes:
                if position + size > whole:
                    raise ValueError(f"it has {whole} bytes, and its header ends at {position + size}")
                into = bytearray(size)
                self._fill(file, position, memoryview(into))
                return bytes(into)

            header, places = read_header(read)
            end = max((place.stop for place in places.values()), default=len(header))
            if end != whole:
                raise ValueError(f"it has {whole} bytes, and its tensors end at {end}")
        except (ValueError, OSError) as error:
            do = "copy it again; quantised weights are not read"
            raise ConfigError("not a whole safetensors file", seen=f"{file}: {error}", do=do) from error
        return places

    def _fill(self, file: Path, position: int, into: memoryview) -> None:
        """Read bytes of a file from a position on, as many as there is room for."""
        try:
            if self._opened is None or self._opened.name != str(file):
                self.close()
                self._opened = FileIO(str(file))
            self._bytes_read += len(into)
            while into:
                count = os.preadv(self._opened.fileno(), [into], position)
                if not count:
                    raise OSError(f"it ends at byte {position}")
                position, into = position + count, into[count:]
        except OSError as error:
            raise ConfigError(
                "a file of weights cannot be read", seen=f"{file}: {error}", do="copy it again"
            ) from error
