"""One state file: a safetensors file whose blocks carry checksums, so that whoever reads a range verifies just that.

    layout = Layout([("master:w", "F32", (4, 3))]);  entry = write_file(path, layout, [memoryview(bytes_of_w)])
    StateFile(path, entry).read("master:w", 0, 16, into)

A file is written in one pass (data, sha256, checksums) from memory that is already in the file's order, and any safetensors
reader opens it. Its last tensor, `checksums`, holds a CRC-32 of the header, of every 16 KiB of every tensor (blocks begin
with the tensor), and of itself; the manifest holds the last one, which ties the file to its checkpoint. A SHA-256 of the
whole file is kept for `dsgpt checkpoint verify`; a resume does not need it, and so reads every byte once.

Trade-off: CRC-32 finds every error within 32 neighbouring bits and all but one in four billion others, at several times the
speed of SHA-256; neither proves who wrote a file. Blocks of 16 KiB cost 0.025 % of space, and a reader of a range at most one
block more at each end.

Growth: nothing here knows of other ranks. Neither torch nor numpy is imported: the writer process starts in 0.1 s.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsgpt.checkpoint.commit import fsync_path, retrying
from dsgpt.checkpoint.ranges import widened
from dsgpt.errors import DamagedError

BLOCK_BYTES = 16384
CHUNK_BYTES = 256 * BLOCK_BYTES
CHECKSUMS = "checksums"
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
_LENGTH_BYTES = 8  # of the header, before it
_LARGEST_HEADER = 100_000_000  # the format's own limit


class Layout:
    """Where each tensor lies in a file: wide types first, as safetensors does, so that all are aligned; then by name.

    `tensors` are (name, safetensors dtype, shape). `ranges[name]` are byte positions in the file.
    """

    def __init__(self, tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: dict[str, str] | None = None):
        table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        position, blocks = 0, 0
        for name, dtype, shape in sorted(tensors, key=lambda one: (-ITEM_BYTES[one[1]], one[0])):
            size = ITEM_BYTES[dtype] * math.prod(shape)
            table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            position, blocks = position + size, blocks + -(-size // BLOCK_BYTES)
        end = position + 4 * (blocks + 2)
        table[CHECKSUMS] = {"dtype": "U8", "shape": [end - position], "data_offsets": [position, end]}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        self.header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        offset = len(self.header)
        self.ranges = {
            name: (offset + entry["data_offsets"][0], offset + entry["data_offsets"][1])
            for name, entry in table.items()
            if name not in ("__metadata__", CHECKSUMS)
        }
        self.size = offset + end

    @property
    def data_bytes(self) -> int:
        """Of all tensors, without header and checksums; they lie one after another."""
        return sum(stop - start for start, stop in self.ranges.values())


def write_file(path: Path, header: bytes, tensors: Iterable[memoryview]) -> dict[str, Any]:
    """Write a file of a `Layout`'s header and its tensors' bytes in its order, force it to storage; its manifest entry.

    Raises OSError.
    """
    sha256, checksums, size = hashlib.sha256(), [zlib.crc32(header)], 0
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            sha256.update(data)
            file.write(data)
            size += len(data)

        put(header)
        for tensor in tensors:
            for at in range(0, len(tensor), CHUNK_BYTES):
                chunk = tensor[at : at + CHUNK_BYTES]
                checksums += [zlib.crc32(chunk[b : b + BLOCK_BYTES]) for b in range(0, len(chunk), BLOCK_BYTES)]
                put(chunk)
        table = b"".join(value.to_bytes(4, "little") for value in checksums)
        own = zlib.crc32(table)
        put(table + own.to_bytes(4, "little"))
    fsync_path(path)
    return {"bytes": size, "sha256": sha256.hexdigest(), "crc32": own}


class StateFile:
    """A written file, read by ranges; every block that is read is compared with its checksum.

    `entry` is the manifest's. With `check` False, and for files of older dsgpt without checksums, nothing is compared.
    Raises DamagedError.
    """

    def __init__(self, path: Path, entry: dict[str, Any], check: bool = True):
        self.path, self.bytes_read = path, 0
        try:
            self._descriptor = retrying(lambda: os.open(path, os.O_RDONLY))[0]
        except OSError as error:
            raise DamagedError("a file of the checkpoint cannot be opened", seen=f"{path}: {error}") from error
        length = int.from_bytes(self._pread(0, _LENGTH_BYTES), "little")
        if length > _LARGEST_HEADER:
            raise DamagedError("a file of the checkpoint has no header", seen=str(path))
        header = self._pread(_LENGTH_BYTES, length)
        try:
            self._table = json.loads(header)
            self._data = _LENGTH_BYTES + length
            self._check = check and "crc32" in entry
            if self._check:
                self._read_checksums(length.to_bytes(_LENGTH_BYTES, "little") + header, entry["crc32"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError("the header of a file of the checkpoint is damaged", seen=f"{path}: {error}") from error

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def _pread(self, position: int, size: int) -> bytes:
        try:
            data = retrying(lambda: os.pread(self._descriptor, size, position))[0]
            while len(data) < size:
                more = os.pread(self._descriptor, size - len(data), position + len(data))
                if not more:
                    raise DamagedError("a file of the checkpoint is cut short", seen=str(self.path))
                data += more
        except OSError as error:
            raise DamagedError("a file of the checkpoint cannot be read", seen=f"{self.path}: {error}") from error
        self.bytes_read += size
        return data

    def _read_checksums(self, header: bytes, expected: int) -> None:
        start, stop = self._table[CHECKSUMS]["data_offsets"]
        table = self._pread(self._data + start, stop - start)
        values = memoryview(table).cast("I")
        if values[-1] != expected or zlib.crc32(table[:-4]) != expected:
            raise DamagedError("a file's checksums are not those of the manifest", seen=str(self.path))
        if zlib.crc32(header) != values[0]:
            raise DamagedError("a file's header differs from its checksum", seen=str(self.path))
        self._checksums, self._first_block, position = values, {}, 1
        for name, entry in self._table.items():
            if name not in ("__metadata__", CHECKSUMS):
                self._first_block[name] = position
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                position += -(-size // BLOCK_BYTES)

    def shape_of(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype, shape) of a tensor. Raises DamagedError where there is none of this name."""
        try:
            return self._table[name]["dtype"], tuple(self._table[name]["shape"])
        except (KeyError, TypeError) as error:
            raise DamagedError("a file of the checkpoint lacks a tensor", seen=f"{name} in {self.path}") from error

    def read(self, name: str, start: int, stop: int, into: memoryview) -> None:
        """Bytes [start, stop) of a tensor. At most `CHUNK_BYTES` and a block are held beside `into`."""
        self.shape_of(name)
        first, last = self._table[name]["data_offsets"]
        if not 0 <= start <= stop <= last - first:
            raise DamagedError("a range lies outside a tensor", seen=f"{name} in {self.path}: {start} to {stop}")
        at = start
        while at < stop:
            end = min(at + CHUNK_BYTES, stop)
            if self._check:
                at, end = widened(at, end, last - first, BLOCK_BYTES)
            data = memoryview(self._pread(self._data + first + at, end - at))
            if self._check:
                self._compare(name, at, data)
            low, high = max(at, start), min(end, stop)
            into[low - start : high - start] = data[low - at : high - at]
            at = end

    def _compare(self, name: str, at: int, data: memoryview) -> None:
        block = self._first_block[name] + at // BLOCK_BYTES
        for offset in range(0, len(data), BLOCK_BYTES):
            if zlib.crc32(data[offset : offset + BLOCK_BYTES]) != self._checksums[block]:
                seen = f"{self.path}: {name}, from byte {at + offset}"
                raise DamagedError("file content differs from its checksum", seen=seen)
            block += 1
