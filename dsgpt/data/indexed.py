"""Megatron-Core's indexed dataset: token ids in PREFIX.bin, their boundaries in PREFIX.idx.

    writer = IndexedWriter(prefix, np.uint16); writer.add_document([1, 2, 3]); writer.finish()
    reader = IndexedReader(prefix); reader[0]

Layout of .idx, little endian: 9 bytes magic, uint64 version 1, uint8 dtype code, uint64 number of sequences S, uint64
number of document edges D + 1, then int32[S] lengths in tokens, int64[S] offsets in bytes, int64[D + 1] document edges
as sequence numbers. We always write one sequence per document; the reader also takes documents of several sequences.

Trade-off: an established format over a better one. Megatron-LM, GPT-NeoX and NeMo read what is written here and the
other way round; the price is 20 bytes of index per document. Nothing is read until it is asked for, so a reader costs no
memory however many documents there are.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import socket
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from dsgpt.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size
_DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype Megatron-Core chooses: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def mask_path(prefix: str | Path) -> Path:
    """Of chat data: one byte for each token in the .bin, 1 where it is learned from."""
    return Path(f"{prefix}.mask")


def hash_file(path: str | Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class IndexedWriter:
    """Writes PREFIX.bin as documents arrive and PREFIX.idx at the end; hashes both on the way.

    Nothing is visible under the final names before `finish` has fsynced both files and renamed them. Until then they
    lie in `scratch`, which has to be on the same file system; by default in the folder of `prefix`.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, scratch: str | Path | None = None):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.num_tokens = 0
        self.sha256_bin = ""
        self.sha256_idx = ""
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        self._temporary = (
            Path(scratch or self.prefix.parent) / f"{self.prefix.name}.{socket.gethostname()}.{os.getpid()}.tmp"
        )
        self._stream = open(bin_path(self._temporary), "wb", buffering=1 << 20)  # noqa: SIM115 (open until finish)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add_document(self, ids: ArrayLike) -> None:
        """Append one document: a 1-d sequence of token ids. Raises DataError where an id does not fit the dtype."""
        ids = np.asarray(ids)
        self.add_documents(ids, np.array([ids.size]))

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that stand one after the other in `ids`, of these lengths. Raises DataError as above."""
        self._write(ids)
        self._lengths.extend(lengths.tolist())

    def add_long_document(self, parts: Iterable[np.ndarray]) -> None:
        """Append one document whose ids come in parts, so that it never has to be in memory."""
        length = sum(self._write(part) for part in parts)
        if length > np.iinfo(np.int32).max:
            raise DataError(
                "a document has more tokens than the index can count",
                seen=f"{length} in document {self.num_documents} of {self.prefix}",
                do="split the text into documents (one a line, or with blank lines between)",
            )
        self._lengths.append(length)

    def _write(self, ids: np.ndarray) -> int:
        if ids.dtype != self.dtype:
            if ids.size and (int(ids.max()) > np.iinfo(self.dtype).max or int(ids.min()) < 0):
                raise DataError(
                    f"token ids do not fit {self.dtype.name}",
                    seen=f"ids from {ids.min()} to {ids.max()} near document {self.num_documents} of {self.prefix}",
                    do="write with the dtype of the tokenizer's vocabulary (dsgpt.data.indexed.dtype_for)",
                )
            ids = ids.astype(self.dtype)
        raw = np.ascontiguousarray(ids).data.cast("B")
        self._stream.write(raw)
        self._hash.update(raw)
        self.num_tokens += ids.size
        return int(ids.size)

    def finish(self) -> None:
        """Write the index, make both files durable and give them their names."""
        self.sha256_bin = self._hash.hexdigest()
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
        digest = hashlib.sha256()
        with open(idx_path(self._temporary), "wb") as stream:
            for raw in self._index():
                digest.update(raw)
                stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        self.sha256_idx = digest.hexdigest()
        os.replace(bin_path(self._temporary), bin_path(self.prefix))
        os.replace(idx_path(self._temporary), idx_path(self.prefix))

    def _index(self) -> Iterator[bytes]:
        """The .idx in pieces: memory stays at four bytes a document."""
        number = self.num_documents
        yield _HEADER.pack(_MAGIC, 1, _CODE_OF_DTYPE[self.dtype], number, number + 1)
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if number else np.zeros(0, np.int32)
        blocks = range(0, number, 1 << 20)
        yield from (lengths[start : start + (1 << 20)].tobytes() for start in blocks)
        offset = 0
        for start in blocks:
            ends = offset + np.cumsum(lengths[start : start + (1 << 20)], dtype=np.int64) * self.dtype.itemsize
            yield np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes()
            offset = int(ends[-1])
        for start in range(0, number + 1, 1 << 20):
            yield np.arange(start, min(number + 1, start + (1 << 20)), dtype=np.int64).tobytes()

    def discard(self) -> None:
        """Drop what was written so far."""
        self._stream.close()
        bin_path(self._temporary).unlink(missing_ok=True)


class IndexedReader:
    """One shard, opened.

    `tokens` is the whole .bin as a flat array; `lengths`, `offsets` (bytes) and `document_edges` (sequence numbers) are
    the index; `reader[i]` is sequence i, `len(reader)` their number. These are memory-mapped when first asked for.
    `read_tokens` and `document_offsets` read instead, because mapped pages count as the memory of every process that
    touches them, up to 2 MiB for each touch. With `plain`, sequences are documents, as IndexedWriter has them, where their
    numbers are the same.

    Raises DataError where a file is missing, is of another format or does not have the size the index implies.
    """

    def __init__(self, prefix: str | Path, plain: bool = False):
        self.prefix = Path(prefix)
        self._index, index_size = _open(idx_path(prefix))
        header = os.pread(self._index.fileno(), HEADER_BYTES, 0)
        self.dtype, self._num_sequences, self._num_edges = parse_header(idx_path(prefix), header, index_size)
        self._bin, size = _open(bin_path(prefix))
        self._bin_descriptor = self._bin.fileno()
        if size % self.dtype.itemsize:
            raise _damaged(bin_path(prefix), f"{size} bytes, not a multiple of {self.dtype.itemsize}")
        self.num_tokens = size // self.dtype.itemsize
        at_offsets = HEADER_BYTES + 4 * self._num_sequences
        at_edges = at_offsets + 8 * self._num_sequences
        self._offsets = _Ascending(self._index, at_offsets, self._num_sequences, size)
        self._edges = _Ascending(self._index, at_edges, self.num_documents, self._num_sequences)
        self._plain = plain and self.num_documents == self._num_sequences
        implied = 0
        if self._num_sequences:
            last_length = os.pread(self._index.fileno(), 4, at_offsets - 4)
            last_offset = os.pread(self._index.fileno(), 8, at_edges - 8)
            implied = int.from_bytes(last_offset, "little") // self.dtype.itemsize + int.from_bytes(
                last_length, "little"
            )
        if implied != self.num_tokens:
            raise _damaged(bin_path(prefix), f"{self.num_tokens} tokens where the index implies {implied}")

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, i: int) -> np.ndarray:
        """Token ids of sequence i, without a copy."""
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)} in {self.prefix}")
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[i])]

    @property
    def num_documents(self) -> int:
        return max(0, self._num_edges - 1)

    @cached_property
    def tokens(self) -> np.ndarray:
        return _map(self._bin, self.dtype)

    @cached_property
    def lengths(self) -> np.ndarray:
        return self._column(0, 4 * self._num_sequences, np.int32)

    @cached_property
    def offsets(self) -> np.ndarray:
        return self._column(4 * self._num_sequences, 8 * self._num_sequences, np.int64)

    @cached_property
    def document_edges(self) -> np.ndarray:
        return self._column(12 * self._num_sequences, 8 * self._num_edges, np.int64)

    @cached_property
    def _mapped_index(self) -> np.ndarray:
        return _map(self._index, np.dtype(np.uint8))

    def _column(self, start: int, size: int, dtype: DTypeLike) -> np.ndarray:
        return self._mapped_index[HEADER_BYTES + start : HEADER_BYTES + start + size].view(dtype)

    def read_tokens(self, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the tokens from number `start` on. Raises DataError where they cannot be read."""
        position = start * self.dtype.itemsize
        while out:
            try:
                count = os.preadv(self._bin_descriptor, [out], position)
            except OSError as error:
                raise _unreadable(f"{bin_path(self.prefix)}: {error}") from error
            if not count:
                raise _damaged(bin_path(self.prefix), f"ends at byte {position}")
            out, position = out[count:], position + count

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions (int64, ascending) in tokens[start:stop] at which a document begins, counted from `start`."""
        return self.document_offsets(start, stop) // self.dtype.itemsize - start

    def document_offsets(self, start: int, stop: int) -> np.ndarray:
        """Offsets in bytes (int64, ascending) of the documents that begin in tokens[start:stop]."""
        itemsize = self.dtype.itemsize
        first, offsets = self._offsets.between(start * itemsize, stop * itemsize)
        if self._plain or not len(offsets):
            return offsets
        return offsets[self._edges.between(first, first + len(offsets))[1] - first]


class _Ascending:
    """Ascending int64 numbers from 0 to `highest` in a file, searched without reading or mapping all of them.

    The first number of each piece that a search comes by is kept, up to some megabytes; so the same region is found with
    one read later on.
    """

    PIECE, MOST_KEPT = 512, 1 << 16

    def __init__(self, file: FileIO, position: int, count: int, highest: int):
        self._file, self._descriptor, self._position, self._count = file, file.fileno(), position, count
        # Pieces whose first number is known, and that number; the ends are no pieces but bounds.
        self._pieces = [0, -(-count // self.PIECE)]
        self._firsts = [-1, highest + 1]

    def between(self, low: int, high: int) -> tuple[int, np.ndarray]:
        """(index of the first number not below `low`, the numbers from there on that are below `high`)."""
        piece = self._last_piece_below(low)
        numbers = self._read(piece)
        begin = int(numbers.searchsorted(low))
        end = int(numbers.searchsorted(high))
        index, found = piece * self.PIECE + begin, numbers[begin:end]
        while end == len(numbers) and (piece + 1) * self.PIECE < self._count:
            piece += 1
            numbers = self._read(piece)
            end = int(numbers.searchsorted(high))
            found = np.concatenate((found, numbers[:end]))
        return index, found

    def _last_piece_below(self, low: int) -> int:
        """The last piece that begins below `low`; the first where none does."""
        at = bisect_left(self._firsts, low, 1, len(self._firsts) - 1)
        piece, after = self._pieces[at - 1], self._pieces[at]
        first, first_after = self._firsts[at - 1], self._firsts[at]
        guess_by_value = True
        while after - piece > 1:
            # Interpolation finds it at once where lengths are alike, halving wherever they are not.
            middle = piece + (after - piece) // 2
            guess = piece + (low - first) * (after - piece) // max(1, first_after - first) if guess_by_value else middle
            guess, guess_by_value = min(max(guess, piece + 1), after - 1), not guess_by_value
            value = int.from_bytes(self._pread(guess * self.PIECE, 1), "little")
            kept = len(self._pieces) < self.MOST_KEPT
            if kept:
                self._pieces.insert(at, guess)
                self._firsts.insert(at, value)
            if value < low:
                piece, first, at = guess, value, at + kept
            else:
                after, first_after = guess, value
        return piece

    def _read(self, piece: int) -> np.ndarray:
        start = piece * self.PIECE
        return np.frombuffer(self._pread(start, min(self.PIECE, self._count - start)), np.int64)

    def _pread(self, index: int, count: int) -> bytes:
        try:
            return os.pread(self._descriptor, 8 * count, self._position + 8 * index)
        except OSError as error:
            raise _unreadable(f"{self._file.name}: {error}") from error


def parse_header(path: Path, header: bytes, size: int) -> tuple[np.dtype, int, int]:
    """(dtype, sequences, document edges) of an .idx of `size` bytes that begins with `header`. Raises DataError."""
    if len(header) < HEADER_BYTES:
        raise _damaged(path, f"{size} bytes, shorter than a header of {HEADER_BYTES}")
    magic, version, code, num_sequences, num_edges = _HEADER.unpack(header[:HEADER_BYTES])
    if magic != _MAGIC or version != 1 or code not in _DTYPE_OF_CODE:
        raise _damaged(path, f"magic {magic!r}, version {version}, dtype code {code}")
    expected = HEADER_BYTES + num_sequences * 12 + num_edges * 8
    # Multimodal files carry one more byte per sequence; for text it has no meaning.
    if size not in (expected, expected + num_sequences):
        raise _damaged(path, f"{size} bytes where the header implies {expected}")
    return _DTYPE_OF_CODE[code], num_sequences, num_edges


def _open(path: Path) -> tuple[FileIO, int]:
    try:
        file = FileIO(path)
        return file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _unreadable(str(error)) from error


def _map(file: FileIO, dtype: np.dtype) -> np.ndarray:
    if not os.fstat(file.fileno()).st_size:  # a file of no bytes cannot be mapped
        return np.zeros(0, dtype)
    try:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
    except OSError as error:
        raise _unreadable(f"{file.name}: {error}") from error


def _unreadable(seen: str) -> DataError:
    return DataError("a shard cannot be read", seen=seen, do="run dsgpt data verify on the dataset")


def _damaged(path: Path, seen: str) -> DataError:
    return DataError(
        f"{path} is damaged or not an indexed dataset", seen=seen, do="prepare the dataset again, or restore the file"
    )
