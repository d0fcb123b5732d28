"""Finds documents that stand in a corpus more than once, exactly, in bounded memory, whatever the number of tasks.

    write_hashes(folder, part, hashes)          one 16-byte hash per document of a part, in its order
    find_duplicates(folder, parts, memory_bytes)
    read_duplicates(folder, part)               bool for each document: leave it out

Of equal documents the first one in the order of the corpus stays, so the result does not depend on workers or restarts.
Two passes, as an external sort by the hash's leading bits: the hashes of one bucket at a time are in memory. Cost: 16 bytes
per document read once per bucket; 1 B documents are 16 GB of hashes, one byte of memory for each, and 40 for each of a bucket.
A false duplicate has a chance of 2^-128 for each pair of documents.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dsgpt.data.manifest import write_bytes_durably

HASH_BYTES, BYTES_IN_MEMORY = 16, 40
_HASH = np.dtype([("high", "<u8"), ("low", "<u8")])


def hash_of(utf8: bytes) -> bytes:
    """16 bytes of a document's content."""
    return hashlib.blake2b(utf8, digest_size=HASH_BYTES).digest()


def hash_of_chunks(chunks: Iterable[bytes]) -> bytes:
    """As hash_of, of a document that comes in chunks."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


def hashes_path(folder: Path, part: int) -> Path:
    return folder / f"hashes-{part:05d}.bin"


def duplicates_path(folder: Path, part: int) -> Path:
    return folder / f"duplicates-{part:05d}.bin"


def write_hashes(folder: Path, part: int, hashes: bytes) -> None:
    write_bytes_durably(hashes_path(folder, part), hashes)


def find_duplicates(folder: Path, parts: Sequence[int], memory_bytes: int = 1 << 30) -> int:
    """Write `duplicates-<part>.bin` for every part, from all parts' hashes; returns how many documents are left out.

    Raises OSError where a part's hashes are missing.
    """
    counts = [os.path.getsize(hashes_path(folder, part)) // HASH_BYTES for part in parts]
    buckets = max(1, -(-sum(counts) * BYTES_IN_MEMORY // memory_bytes))
    edges = np.cumsum([0, *counts])
    leave_out = np.zeros(edges[-1], np.bool_)
    for bucket in range(buckets):
        high, low, place = _read_bucket(folder, parts, edges, bucket, buckets)
        order = np.lexsort((low, high))  # stable: of equal hashes the first one of the corpus comes first
        again = np.zeros(len(order), np.bool_)
        again[1:] = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
        leave_out[place[order[again]]] = True
    for part, start, stop in zip(parts, edges[:-1], edges[1:], strict=True):
        write_bytes_durably(duplicates_path(folder, part), np.packbits(leave_out[start:stop]).tobytes())
    return int(leave_out.sum())


def _read_bucket(
    folder: Path, parts: Sequence[int], edges: np.ndarray, bucket: int, buckets: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(high, low, place in the corpus) of the hashes that belong to a bucket."""
    high, low, place = [], [], []
    for number, part in enumerate(parts):
        hashes = np.fromfile(hashes_path(folder, part), _HASH)
        mine = np.flatnonzero(hashes["high"] % np.uint64(buckets) == bucket)
        high.append(hashes["high"][mine])
        low.append(hashes["low"][mine])
        place.append(mine + edges[number])
    return np.concatenate(high), np.concatenate(low), np.concatenate(place)


def read_duplicates(folder: Path, part: int) -> np.ndarray:
    """Which of a part's documents are left out, bool; up to seven more at the end mean nothing."""
    return np.unpackbits(np.fromfile(duplicates_path(folder, part), np.uint8)).astype(np.bool_)
