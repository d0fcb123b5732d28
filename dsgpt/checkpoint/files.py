"""One state file: a safetensors file whose blocks carry checksums, so that whoever reads a range verifies just that.

    layout = Layout([("master:w", "F32", (4, 3))]);  entry = write_file(path, layout, [memoryview(bytes_of_w)])
    StateFile(path, entry).read("master:w", 0, 16, into)

A file is written in one pass (data, sha256, checksums) from memory that is already in the file's order, and any safetensors
reader opens it. Its last tensor, `checksums`, is a table of CRC-32s: of the header, of every 16 KiB of every tensor (blocks
begin with the tensor); then of every 256 entries of this table, a page; then of those. The manifest holds the last one, which
ties the file to its checkpoint. A SHA-256 of the whole file is kept for `dsgpt checkpoint verify`; a resume does not need it,
and so reads every byte once.

Trade-off: CRC-32 finds every error within 32 neighbouring bits and all but one in four billion others, at several times the
speed of SHA-256; neither proves who wrote a file. Blocks of 16 KiB cost 0.025 % of space, and a reader of a range at most one
block more at each end.

Growth: nothing here knows of other ranks. Who knows from the manifest where the tensors lie (`Places`) reads no header, and
of the table the pages of its blocks: for 1 MB of a file of 0.8 GB in 2,000 tensors a few KB. Neither torch nor numpy is
imported: the writer process starts in 0.1 s.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from dsgpt.checkpoint.commit import fsync_path, retrying
from dsgpt.checkpoint.ranges import widened
from dsgpt.errors import DamagedError
from dsgpt.model.safetensors_header import ITEM_BYTES, Place, lay_out, num_bytes, read_header

BLOCK_BYTES = 16384
CHUNK_BYTES = 256 * BLOCK_BYTES
WRITE_BYTES = 64 * BLOCK_BYTES  # stays in a core's cache between its checksums and its write, beside a training process
PAGE_BYTES = 1024  # of the table of checksums
CHECKSUMS = "checksums"


def file_order(name: str, dtype: str) -> tuple[int, str]:
    """By what tensors are sorted in a file: wide types first, as safetensors does, so that all are aligned; then by name."""
    return -ITEM_BYTES[dtype], name


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def _table_bytes(blocks: int) -> tuple[int, int]:
    """Of the checksums of header and blocks, and of those of its pages with their own."""
    table = 4 * (1 + blocks)
    return table, 4 * (-(-table // PAGE_BYTES) + 1)


class Layout:
    """Where each tensor lies in a file that is to be written, and its header.

    `tensors` are (name, safetensors dtype, shape). `ranges[name]` are byte positions in the file.
    """

    def __init__(self, tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: dict[str, str] | None = None):
        ordered = sorted(tensors, key=lambda one: file_order(one[0], one[1]))
        blocks = sum(_num_blocks(num_bytes(dtype, shape)) for _, dtype, shape in ordered)
        checksums = (CHECKSUMS, "U8", (sum(_table_bytes(blocks)),))
        self.header, places = lay_out([*ordered, checksums], metadata)
        self.size = places.pop(CHECKSUMS).stop
        self.ranges = {name: (place.start, place.stop) for name, place in places.items()}

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
            for at in range(0, len(tensor), WRITE_BYTES):
                chunk = tensor[at : at + WRITE_BYTES]
                checksums += [zlib.crc32(chunk[b : b + BLOCK_BYTES]) for b in range(0, len(chunk), BLOCK_BYTES)]
                put(chunk)
        table = _packed(checksums)
        pages = _packed([zlib.crc32(table[at : at + PAGE_BYTES]) for at in range(0, len(table), PAGE_BYTES)])
        own = zlib.crc32(pages)
        put(table + pages + _packed([own]))
    fsync_path(path)
    return {"bytes": size, "header_bytes": len(header), "sha256": sha256.hexdigest(), "crc32": own}


def _packed(values: Sequence[int]) -> bytes:
    return b"".join(value.to_bytes(4, "little") for value in values)


class Places:
    """Where the tensors of a file lie, without its header: their order and their sizes in bytes say it.

    `order` maps a name to its number; files that differ in sizes only share it. `data` is the first tensor's position.
    """

    def __init__(self, order: Mapping[str, int], sizes: Iterable[int], data: int):
        kept = array("q", sizes)
        self._order, self._data = order, data
        self._stops = array("q", accumulate(kept, initial=0))
        self._blocks = array("q", accumulate(map(_num_blocks, kept), initial=0))

    @property
    def end(self) -> int:
        """Where the checksums begin."""
        return self._data + self._stops[-1]

    @property
    def blocks(self) -> int:
        return self._blocks[-1]

    def find(self, name: str) -> tuple[int, int, int]:
        """Positions of its first byte and of the one after its last, number of its first block. Raises KeyError."""
        number = self._order[name]
        return self._data + self._stops[number], self._data + self._stops[number + 1], self._blocks[number]


class StateFile:
    """A written file, read by ranges; every block that is read is compared with its checksum.

    `entry` is the manifest's. Without `places` they are read from the header. With `check` False, and for files of older
    dsgpt without checksums, nothing is compared. Raises DamagedError.
    """

    def __init__(self, path: Path, entry: dict[str, Any], check: bool = True, places: Places | None = None):
        self.path, self.bytes_read = path, 0
        self._check = check and "crc32" in entry
        self._pages: dict[int, memoryview] = {}
        self._table: dict[str, Place] = {}
        self._descriptor: int | None = self._open()
        if places is not None:
            self._places = places
            self._open_checksums(entry)
            return
        try:
            header, self._table = read_header(self._pread)
            names = [name for name in self._table if name != CHECKSUMS]
            sizes = (place.stop - place.start for name, place in self._table.items() if name != CHECKSUMS)
            self._places = Places({name: number for number, name in enumerate(names)}, sizes, len(header))
            self._open_checksums(entry)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DamagedError("the header of a file of the checkpoint is damaged", seen=f"{path}: {error}") from error
        if self._check and zlib.crc32(header) != self._checksum(0):
            raise DamagedError("a file's header differs from its checksum", seen=str(path))

    def _open(self) -> int:
        try:
            return retrying(lambda: os.open(self.path, os.O_RDONLY))[0]
        except OSError as error:
            raise DamagedError("a file of the checkpoint cannot be opened", seen=f"{self.path}: {error}") from error

    def close(self) -> None:
        """Give its descriptor back; what is known of its checksums stays, and the next read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()

    def _pread(self, position: int, size: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = self._open()
        descriptor = self._descriptor
        try:
            data = retrying(lambda: os.pread(descriptor, size, position))[0]
            while len(data) < size:
                more = os.pread(descriptor, size - len(data), position + len(data))
                if not more:
                    raise DamagedError("a file of the checkpoint is cut short", seen=str(self.path))
                data += more
        except OSError as error:
            raise DamagedError("a file of the checkpoint cannot be read", seen=f"{self.path}: {error}") from error
        self.bytes_read += size
        return data

    def _open_checksums(self, entry: dict[str, Any]) -> None:
        """Read what the table's pages are compared with."""
        if not self._check:
            return
        table, rest = _table_bytes(self._places.blocks)
        if self._places.end + table + rest != entry["bytes"]:
            raise DamagedError("a file's tensors are not those of the manifest", seen=str(self.path))
        pages = self._pread(self._places.end + table, rest)
        self._page_checksums = memoryview(pages).cast("I")
        if self._page_checksums[-1] != entry["crc32"] or zlib.crc32(pages[:-4]) != entry["crc32"]:
            raise DamagedError("a file's checksums are not those of the manifest", seen=str(self.path))

    def _checksum(self, number: int) -> int:
        """Entry of the table: 0 is the header's, then come the blocks'."""
        page, place = divmod(4 * number, PAGE_BYTES)
        if page not in self._pages:
            table, _ = _table_bytes(self._places.blocks)
            start = page * PAGE_BYTES
            data = self._pread(self._places.end + start, min(PAGE_BYTES, table - start))
            if zlib.crc32(data) != self._page_checksums[page]:
                raise DamagedError("a file's checksums are damaged", seen=str(self.path))
            self._pages[page] = memoryview(data).cast("I")
        return self._pages[page][place // 4]

    def shape_of(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype, shape) of a tensor. Raises DamagedError where there is none of this name."""
        try:
            return self._table[name].dtype, self._table[name].shape
        except KeyError as error:
            raise DamagedError("a file of the checkpoint lacks a tensor", seen=f"{name} in {self.path}") from error

    def read(self, name: str, start: int, stop: int, into: memoryview) -> None:
        """Bytes [start, stop) of a tensor. At most `CHUNK_BYTES` and a block are held beside `into`."""
        try:
            first, last, block = self._places.find(name)
        except KeyError as error:
            raise DamagedError("a file of the checkpoint lacks a tensor", seen=f"{name} in {self.path}") from error
        if not 0 <= start <= stop <= last - first:
            raise DamagedError("a range lies outside a tensor", seen=f"{name} in {self.path}: {start} to {stop}")
        at = start
        while at < stop:
            end = min(at + CHUNK_BYTES, stop)
            if self._check:
                at, end = widened(at, end, last - first, BLOCK_BYTES)
            data = memoryview(self._pread(first + at, end - at))
            if self._check:
                self._compare(name, block, at, data)
            low, high = max(at, start), min(end, stop)
            into[low - start : high - start] = data[low - at : high - at]
            at = end

    def _compare(self, name: str, block: int, at: int, data: memoryview) -> None:
        """Blocks from byte `at` of a tensor whose first one is number `block`."""
        number = 1 + block + at // BLOCK_BYTES
        for offset in range(0, len(data), BLOCK_BYTES):
            if zlib.crc32(data[offset : offset + BLOCK_BYTES]) != self._checksum(number):
                seen = f"{self.path}: {name}, from byte {at + offset}"
                raise DamagedError("file content differs from its checksum", seen=seen)
            number += 1
