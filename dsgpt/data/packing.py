"""Whole samples of different lengths, packed into rows of T + 1 tokens: nothing is cut, little is padding.

    samples = open_chat("data/chat", "train", seq_length=1024)  # what dsgpt.data.chat has prepared, as dataset.Block
    packing = pack(lengths, capacity=1025)                      # which samples share a row
    packing.utilisation, packing.fewest_rows

Best-fit decreasing: the longest sample first, each into the fullest row that still takes it. Samples of one length are
placed together, so a million take about a second. Trade-off: all lengths have to be known before the first row, which
is 8 bytes a sample; in exchange only the last few rows are not full, and equal lengths give equal rows anywhere.

Samples in a row do not see each other: positions begin anew and document_ids differ, as in a pretraining block.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from dsgpt.data.dataset import IGNORED, Block
from dsgpt.data.indexed import IndexedReader, mask_path
from dsgpt.data.manifest import load_manifest
from dsgpt.errors import DataError


@dataclass(frozen=True)
class Packing:
    """Row r holds the samples order[rows[r] : rows[r + 1]], ascending; each sample is in one row."""

    capacity: int
    order: np.ndarray
    rows: np.ndarray
    tokens: int

    def __len__(self) -> int:
        return len(self.rows) - 1

    def row(self, i: int) -> np.ndarray:
        return self.order[self.rows[i] : self.rows[i + 1]]

    @property
    def fewest_rows(self) -> int:
        """No packing can have fewer."""
        return -(-self.tokens // self.capacity)

    @property
    def utilisation(self) -> float:
        """The share of the rows' positions that holds a token."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0


def pack(lengths: ArrayLike, capacity: int, where: str = "") -> Packing:
    """Rows of at most `capacity` tokens, each sample of 1 token or more in exactly one of them.

    Raises DataError, which names `where` they are from, for a sample without tokens, and for one longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if capacity < 1:
        raise ValueError(f"a row needs room for a token, got a capacity of {capacity}")
    where = f"{where}: " if where else ""
    empty, too_long = np.flatnonzero(sizes < 1), np.flatnonzero(sizes > capacity)
    if len(empty):
        raise DataError(
            "a sample without tokens cannot be packed",
            seen=f"{where}{len(empty)} of {len(sizes)} samples, the first is number {empty[0]}",
            do="leave them out before packing",
        )
    if len(too_long):
        raise DataError(
            f"samples do not fit into rows of {capacity} tokens",
            seen=f"{where}{len(too_long)} of {len(sizes)} samples; number {too_long[0]} has {sizes[too_long[0]]} tokens, "
            f"the longest {sizes.max()}",
            do=f"raise training.seq_length, or prepare the conversations again: dsgpt data prepare-chat ... --seq-length "
            f"{capacity - 1} leaves out what is longer, with --too-long truncate it is cut",
        )
    # Stable, so that samples of one length keep their order: the result is a function of the lengths alone.
    longest_first = np.argsort(-sizes, kind="stable")
    row_of, num_rows = _best_fit(sizes[longest_first], capacity)
    key = np.lexsort((longest_first, row_of))
    edges = _edges(np.bincount(row_of, minlength=num_rows))
    return Packing(capacity, longest_first[key], edges, int(sizes.sum()))


def _best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """(row of each, number of rows) for sizes in descending order.

    Rows with equal room are kept together. The next sample of a size goes into the row that took the last one for as
    long as it fits there, so from the fullest fitting rows on, each takes as many of the size as it can.
    """
    row_of = np.empty(len(sizes), dtype=np.int64)
    rows_with: dict[int, list[np.ndarray]] = {}  # room left -> rows
    rooms: list[int] = []  # the keys of rows_with, ascending
    num_rows = 0

    def put(room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            if room not in rows_with:
                insort(rooms, room)
            rows_with.setdefault(room, []).append(rows)

    starts = np.flatnonzero(np.diff(sizes, prepend=capacity + 1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(sizes)], strict=True):
        size, done = int(sizes[start]), start
        while done < stop:
            at = bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                chunks = rows_with.pop(room)
                rows = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
            else:
                room, each = capacity, capacity // size
                count = -(-(stop - done) // each)
                rows, num_rows = np.arange(num_rows, num_rows + count), num_rows + count
            each, left = room // size, stop - done
            full = min(len(rows), left // each)
            row_of[done : done + full * each] = np.repeat(rows[:full], each)
            done += full * each
            put(room - size * each, rows[:full])
            rows = rows[full:]
            if len(rows) and done < stop:
                row_of[done:stop] = rows[0]
                put(room - size * (stop - done), rows[:1])
                done, rows = stop, rows[1:]
            put(room, rows)
    return row_of, num_rows


def _edges(sizes: np.ndarray) -> np.ndarray:
    edges = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=edges[1:])
    return edges


class Slices(Protocol):
    """An array of which slices are taken."""

    def __len__(self) -> int: ...

    def __getitem__(self, cut: slice, /) -> np.ndarray: ...


class PackedSamples:
    """Rows of whole samples as blocks of T = capacity - 1 positions.

    ids      the tokens of all samples, one after another
    edges    sample i has the tokens ids[edges[i] : edges[i + 1]]
    trained  for every token whether it is a target

    A label is IGNORED where the next token is not a target or belongs to another sample, and in the padding, whose
    document_ids are -1. `fingerprint` identifies the blocks: `identity` says what the tokens are, the rest is added.
    """

    def __init__(self, ids: Slices, edges: np.ndarray, trained: Slices, packing: Packing, identity: str = ""):
        if not len(ids) == len(trained) == edges[-1]:
            raise DataError(
                "ids, loss mask and edges do not belong together",
                seen=f"{len(ids)} ids, {len(trained)} mask entries, edges up to {edges[-1]}",
                do="prepare the chat data again",
            )
        self.ids, self.edges, self.trained, self.packing = ids, edges, trained, packing
        self.num_samples = len(packing)
        self.seq_length = packing.capacity - 1
        digest = hashlib.sha256(f"packed/1 {identity} {packing.capacity}".encode())
        for array in (packing.order, packing.rows):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, i: int) -> Block:
        if not 0 <= i < self.num_samples:
            raise IndexError(f"row {i} of {self.num_samples}")
        row = self.packing.row(int(i))
        sizes = self.edges[row + 1] - self.edges[row]
        tokens = np.zeros(self.seq_length + 1, dtype=np.int64)
        labels = np.full(self.seq_length + 1, IGNORED, dtype=np.int64)
        position_ids = np.zeros(self.seq_length + 1, dtype=np.int64)
        document_ids = np.full(self.seq_length + 1, -1, dtype=np.int32)
        stop = 0
        for number, (sample, size) in enumerate(zip(row.tolist(), sizes.tolist(), strict=True)):
            start, stop = stop, stop + size
            first = int(self.edges[sample])
            tokens[start:stop] = self.ids[first : first + size]
            targets = self.trained[first + 1 : first + size]
            labels[start : stop - 1] = np.where(targets, tokens[start + 1 : stop], IGNORED)
            position_ids[start:stop] = np.arange(size)
            document_ids[start:stop] = number
        return Block(tokens[:-1], labels[:-1], position_ids[:-1], document_ids[:-1])


class _Joined:
    """Arrays one after another, of which slices are taken that lie in one of them; a map is not copied."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = arrays
        self._edges = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, cut: slice) -> np.ndarray:
        number = int(np.searchsorted(self._edges, cut.start, side="right")) - 1
        first = int(self._edges[number])
        return self._arrays[number][cut.start - first : cut.stop - first]


def open_chat(folder: str | Path, split: str, seq_length: int) -> PackedSamples:
    """The packed rows of a split, as blocks of seq_length positions.

    Memory is 12 bytes for each conversation; ids and masks are mapped. Packing takes about a second for a million of them,
    and is the same on every rank. Raises DataError where the split is missing or damaged, and for a conversation longer
    than seq_length + 1.
    """
    manifest = load_manifest(folder)
    root = Path(folder)
    if split not in manifest.splits:
        raise DataError(f"the dataset has no split {split!r}", seen=f"it has: {', '.join(manifest.splits)}")
    readers, masks = [], []
    for shard in manifest.splits[split].shards:
        reader = IndexedReader(root / shard.path)
        try:
            mask = np.memmap(mask_path(root / shard.path), np.uint8, mode="r")
        except (OSError, ValueError) as error:
            do = f"run: dsgpt data verify {folder}"
            raise DataError(
                "a loss mask cannot be read", seen=f"{mask_path(root / shard.path)}: {error}", do=do
            ) from error
        if (reader.num_documents, len(reader.tokens), len(mask)) != (shard.documents, shard.tokens, shard.tokens):
            do = f"run: dsgpt data verify {folder}"
            raise DataError("a shard does not hold what dataset.json says", seen=str(root / shard.path), do=do)
        readers.append(reader)
        masks.append(mask)
    lengths = np.concatenate([np.asarray(reader.lengths, np.int64) for reader in readers])
    edges = np.concatenate(([0], np.cumsum(lengths)))
    packing = pack(lengths, seq_length + 1, str(folder))
    ids = _Joined([reader.tokens for reader in readers])
    return PackedSamples(ids, edges, _Joined(masks), packing, f"{manifest.fingerprint} {split}")
