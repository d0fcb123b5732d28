"""Megatron-Core's indexed dataset: token ids in PREFIX.bin, their boundaries in PREFIX.idx.

    writer = IndexedWriter(prefix, np.uint16); writer.add_document([1, 2, 3]); writer.finish()
    reader = IndexedReader(prefix); reader[0]

Layout of .idx, little endian: 9 bytes magic, uint64 version 1, uint8 dtype code, uint64 number of sequences S, uint64
number of document edges D + 1, then int32[S] lengths in tokens, int64[S] offsets in bytes, int64[D + 1] document edges
as sequence numbers. We always write one sequence per document; the reader also takes documents of several sequences.

Trade-off: an established format over a better one. Megatron-LM, GPT-NeoX and NeMo read what is written here and the
other way round; the price is 20 bytes of index per document. Nothing is read until it is asked for: both files are
memory-mapped, so a reader costs no memory however many documents there are.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from dsgpt.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
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
        self._temporary = Path(scratch or self.prefix.parent) / f"{self.prefix.name}.{os.getpid()}.tmp"
        self._stream = open(bin_path(self._temporary), "wb", buffering=1 << 20)  # noqa: SIM115 (open until finish)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add_document(self, ids: ArrayLike) -> None:
        """Append one document: a 1-d sequence of token ids. Raises DataError where an id does not fit the dtype."""
        wide = np.asarray(ids)
        tokens = wide.astype(self.dtype)
        if wide.size and not np.array_equal(tokens, wide):
            raise DataError(
                f"token ids do not fit {self.dtype.name}",
                seen=f"ids from {wide.min()} to {wide.max()} in document {self.num_documents} of {self.prefix}",
                do="write with the dtype of the tokenizer's vocabulary (dsgpt.data.indexed.dtype_for)",
            )
        raw = tokens.tobytes()
        self._stream.write(raw)
        self._hash.update(raw)
        self._lengths.append(tokens.size)
        self.num_tokens += tokens.size

    def finish(self) -> None:
        """Write the index, make both files durable and give them their names."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        offsets = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self.dtype.itemsize
        edges = np.arange(len(lengths) + 1, dtype=np.int64)
        code = _CODE_OF_DTYPE[self.dtype]
        header = _HEADER.pack(_MAGIC, 1, code, len(lengths), len(edges))
        index = header + lengths.tobytes() + offsets.tobytes() + edges.tobytes()
        self.sha256_bin = self._hash.hexdigest()
        self.sha256_idx = hashlib.sha256(index).hexdigest()
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
        with open(idx_path(self._temporary), "wb") as stream:
            stream.write(index)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(bin_path(self._temporary), bin_path(self.prefix))
        os.replace(idx_path(self._temporary), idx_path(self.prefix))

    def discard(self) -> None:
        """Drop what was written so far."""
        self._stream.close()
        bin_path(self._temporary).unlink(missing_ok=True)


class IndexedReader:
    """One shard, memory-mapped.

    `tokens` is the whole .bin as a flat array; `lengths`, `offsets` (bytes) and `document_edges` (sequence numbers) are
    the index; `reader[i]` is sequence i, `len(reader)` their number.

    Raises DataError where a file is missing, is of another format or does not have the size the index implies.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        index = _map(idx_path(prefix), np.dtype(np.uint8))
        if len(index) < _HEADER.size:
            raise _damaged(idx_path(prefix), f"{len(index)} bytes, shorter than a header of {_HEADER.size}")
        magic, version, code, num_sequences, num_edges = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != 1 or code not in _DTYPE_OF_CODE:
            raise _damaged(idx_path(prefix), f"magic {magic!r}, version {version}, dtype code {code}")
        self.dtype = _DTYPE_OF_CODE[code]
        expected = _HEADER.size + num_sequences * 12 + num_edges * 8
        # Multimodal files carry one more byte per sequence; for text it has no meaning.
        if len(index) not in (expected, expected + num_sequences):
            raise _damaged(idx_path(prefix), f"{len(index)} bytes where the header implies {expected}")
        cursor = _HEADER.size
        self.lengths = index[cursor : (cursor := cursor + 4 * num_sequences)].view(np.int32)
        self.offsets = index[cursor : (cursor := cursor + 8 * num_sequences)].view(np.int64)
        self.document_edges = index[cursor : cursor + 8 * num_edges].view(np.int64)
        self.tokens = _map(bin_path(prefix), self.dtype)
        implied = int(self.offsets[-1]) // self.dtype.itemsize + int(self.lengths[-1]) if num_sequences else 0
        if implied != len(self.tokens):
            raise _damaged(bin_path(prefix), f"{len(self.tokens)} tokens where the index implies {implied}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """Token ids of sequence i, without a copy."""
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)} in {self.prefix}")
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[i])]

    @property
    def num_documents(self) -> int:
        return max(0, len(self.document_edges) - 1)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions (int64, ascending) in tokens[start:stop] at which a document begins, counted from `start`."""
        itemsize, edges = self.dtype.itemsize, self.document_edges
        # Not np.searchsorted: the header's 34 bytes leave these arrays unaligned, and it would copy them whole.
        first = bisect_left(self.offsets, start * itemsize)
        last = bisect_left(self.offsets, stop * itemsize, lo=first)
        low = bisect_left(edges, first, hi=self.num_documents)
        high = bisect_left(edges, last, lo=low, hi=self.num_documents)
        return self.offsets[edges[low:high]] // itemsize - start


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise _damaged(path, f"{size} bytes, not a multiple of {dtype.itemsize}")
        # A file of no bytes cannot be mapped.
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray) if size else np.zeros(0, dtype)
    except OSError as error:
        raise DataError("a shard cannot be read", seen=str(error), do="run dsgpt data verify on the dataset") from error


def _damaged(path: Path, seen: str) -> DataError:
    return DataError(
        f"{path} is damaged or not an indexed dataset", seen=seen, do="prepare the dataset again, or restore the file"
    )
