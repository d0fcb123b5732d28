"""Training blocks of fixed length over a split, and the order in which a run visits them.

    dataset = BlockDataset("data/corpus", "train", seq_length=1024)
    order = SampleOrder(dataset.num_samples, seed=1234, fingerprint=dataset.fingerprint)
    batch = SampleStream(dataset, order).read(np.arange(8))  # the run's first eight samples

A split is one stream of tokens, its shards in the order of dataset.json. Block i takes the T + 1 tokens from i * T on,
so every token is an input exactly once per epoch, over the edges of documents and shards; only what is left at the end
and too short for a block is not seen. Trade-off: documents are cut where blocks end, which costs the start of a block
its context, in exchange for no padding, no dropped token and no index to build.

The order is computed, not stored: sample k of a run is a pure function of (seed, fingerprint, k). It takes no memory
and no time to start or resume, and it does not know of world size, micro-batch or restarts.

What costs time per sample is done for a whole batch at once: only reading the tokens and looking up their documents are
loops. Files are read and not mapped: a scheduler counts mapped pages as the process's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsgpt.data.indexed import IndexedReader
from dsgpt.data.manifest import DatasetManifest, Shard, load_manifest
from dsgpt.errors import DataError

IGNORED = -100  # label of a position without a target, as torch's cross entropy has it
_ROUNDS = 8
_MOST_OPEN = 256  # shards of a dataset whose files are open at a time; each has two, and 1,024 are the usual limit
_CHUNK = 4096  # places of the order that are computed together


@dataclass(frozen=True)
class Block:
    """One sample of T positions; all arrays have shape (T,).

    input_ids     int64
    labels        int64, the next token; IGNORED where it belongs to another document
    position_ids  int64, from 0 at the start of the block and of each document in it
    document_ids  int32, 0, 1, 2, ... from the start of the block; positions with equal ids may attend to each
                  other; -1 is padding (blocks have none)
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray


def collate(blocks: Sequence[Block]) -> dict[str, np.ndarray]:
    """Blocks under each other: a dict with the fields of Block, each (B, T)."""
    return {field.name: np.stack([getattr(block, field.name) for block in blocks]) for field in fields(Block)}


class Samples(Protocol):
    """What training reads: numbered samples, and what identifies them. `read(ids)`, where there is one, is the faster
    way to collate([self[i] for i in ids])."""

    num_samples: int
    fingerprint: str

    def __getitem__(self, i: int) -> Block: ...


class BlockDataset:
    """The blocks of one split.

    With document_mask=False a block is one piece of text: labels cross document edges, positions run through and
    document_ids are 0. `fingerprint` identifies the samples (not their order): dataset, split and seq_length.
    `manifest` stands for folder/dataset.json where that does not exist (dsgpt.data.foreign); `vocab_size` is given where
    nobody has compared the ids with a vocabulary yet.

    Raises DataError where the split is missing, has fewer than seq_length + 1 tokens, a shard does not have the
    number of tokens that dataset.json says, or an id that is read is not below vocab_size.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        seq_length: int,
        document_mask: bool = True,
        manifest: DatasetManifest | None = None,
        vocab_size: int | None = None,
    ):
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        self.manifest = manifest or load_manifest(folder)
        self.split = split
        self.seq_length = seq_length
        self.document_mask = document_mask
        if split not in self.manifest.splits:
            raise DataError(
                f"the dataset has no split {split!r}",
                seen=f"{folder} has: {', '.join(self.manifest.splits)}",
                do="prepare it again with --validation, e.g. --validation 0.5%",
            )
        found = self.manifest.splits[split]
        self.num_samples = (found.tokens - 1) // seq_length if found.tokens else 0
        if self.num_samples < 1:
            raise DataError(
                f"the split {split!r} is too short for one block of {seq_length} tokens",
                seen=f"{found.tokens} tokens in {folder}; {seq_length + 1} are needed",
                do="prepare more text for it, or lower training.seq_length",
            )
        identity = f"blocks/1 {self.manifest.fingerprint} {split} {seq_length}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._shards = [shard for shard in found.shards if shard.tokens]
        # Stream position at which each shard begins, and one past the end of the last.
        self._edges = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._firsts = self._edges.tolist()
        # Opened when first read: a run of many ranks over many shards opens only what it visits.
        self._readers: dict[int, IndexedReader] = {}

    @property
    def order_fingerprint(self) -> str:
        """What the order of a run is keyed with: the dataset's, so that the order is the same for any seq_length and
        split of as many samples."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, i: int) -> Block:
        return Block(**{name: array[0] for name, array in self.read(np.array([i])).items()})

    def read(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The samples of these numbers under each other, as `collate` has them."""
        ids = np.asarray(ids, dtype=np.int64)
        outside = (ids < 0) | (ids >= self.num_samples)
        if outside.any():
            raise IndexError(f"sample {ids[outside][0]} of {self.num_samples}")
        rows, length = len(ids), self.seq_length
        tokens, starts = self._gather(ids * length, length + 1)
        if self.vocab_size is not None:
            self._check_ids(tokens, self.vocab_size)
        labels = tokens[:, 1:].astype(np.int64)
        row, column = np.divmod(starts, length + 1)
        # A document that begins at the first token has nothing before it here; one after the last only ends a target.
        row, column = row[column > 0], column[column > 0]
        labels[row, column - 1] = IGNORED
        inner = (row * length + column)[column < length]
        position_ids, document_ids = _segments(inner, rows, length)
        return {
            "input_ids": tokens[:, :-1].astype(np.int64),
            "labels": labels,
            "position_ids": position_ids,
            "document_ids": document_ids,
        }

    def _gather(self, begins: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` tokens of the stream from each of `begins` on, as rows; and where documents begin in that array
        counted through (ascending; empty without a mask)."""
        tokens = np.empty((len(begins), count), dtype=self.manifest.dtype)
        raw, itemsize = memoryview(tokens).cast("B"), tokens.itemsize
        offsets, shifts = [], []
        numbers = np.searchsorted(self._edges, begins, side="right") - 1
        for row, (begin, number) in enumerate(zip(begins.tolist(), numbers.tolist(), strict=True)):
            done = 0
            while done < count:
                reader = self._readers.get(number) or self._open(number)
                first = begin + done - self._firsts[number]
                piece = min(count - done, reader.num_tokens - first)
                at = (row * count + done) * itemsize
                reader.read_tokens(first, raw[at : at + piece * itemsize])
                if self.document_mask:
                    offsets.append(reader.document_offsets(first, first + piece))
                    shifts.append(row * count + done - first)
                done += piece
                number += 1
        if not self.document_mask:
            return tokens, np.zeros(0, np.int64)
        starts = np.concatenate(offsets) // itemsize + np.repeat(shifts, [len(one) for one in offsets])
        # A document without tokens begins where the next one does.
        return tokens, starts[np.diff(starts, prepend=-1) > 0]

    def _check_ids(self, tokens: np.ndarray, vocab_size: int) -> None:
        lowest, highest = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
        if lowest < 0 or highest >= vocab_size:
            raise DataError(
                "the data holds ids outside the model's vocabulary",
                seen=f"ids from {lowest} to {highest} in {self.folder}, model.vocab_size={vocab_size}",
                do="give the model the vocabulary of the tokenizer that made the data (model.vocab_size)",
            )

    def _open(self, number: int) -> IndexedReader:
        """Open a shard, and keep it."""
        if len(self._readers) >= _MOST_OPEN:  # files stay open with them: the one that was opened first goes
            del self._readers[next(iter(self._readers))]
        shard: Shard = self._shards[number]
        reader = IndexedReader(self.folder / shard.path, plain=self.vocab_size is None)
        if reader.num_tokens != shard.tokens or reader.dtype.name != self.manifest.dtype:
            raise DataError(
                f"shard {shard.path} is not the one that dataset.json describes",
                seen=f"{reader.num_tokens} tokens of {reader.dtype.name}, expected {shard.tokens} of {self.manifest.dtype}",
                do=f"run: dsgpt data verify {self.folder}",
            )
        self._readers[number] = reader
        return reader


def _segments(inner: np.ndarray, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(position_ids, document_ids) of rows x length places that are cut at each row and at `inner`, counted through."""
    heads = np.concatenate((np.arange(rows) * length, inner))
    heads.sort()
    sizes = np.diff(heads, append=rows * length)
    number = np.arange(len(heads))
    first_of_row = np.maximum.accumulate(np.where(heads % length == 0, number, 0))
    documents = np.repeat((number - first_of_row).astype(np.int32), sizes)
    # What a fresh array costs is mostly its pages, so the large ones are made once.
    positions = np.repeat(heads, sizes)
    np.subtract(_places(rows * length), positions, out=positions)
    return positions.reshape(rows, length), documents.reshape(rows, length)


@lru_cache(maxsize=4)
def _places(count: int) -> np.ndarray:
    return np.arange(count)


class SampleOrder:
    """Which dataset sample is the k-th of the run: epoch k // num_samples, and in it a permutation of all samples.

    The permutation is a Feistel network over the smallest even number of bits that holds num_samples, walked until it
    falls below num_samples: at most four steps on average, and each index exactly once.
    """

    def __init__(self, num_samples: int, seed: int, fingerprint: str):
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.num_samples = num_samples
        self._identity = f"order/1 {seed} {fingerprint} {num_samples}"
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """Dataset indices (int64, shape (count,)) of the run's samples [start, start + count)."""
        k = np.arange(start, start + count, dtype=np.int64)
        epochs, within = k // self.num_samples, k % self.num_samples
        ids = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._permute(within[here], int(epoch))
        return ids

    def _permute(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        digest = hashlib.sha512(f"{self._identity} {epoch}".encode()).digest()
        keys = np.frombuffer(digest, dtype="<u8", count=_ROUNDS).astype(np.uint64)
        values = self._feistel(indices.astype(np.uint64), keys)
        while (outside := values >= np.uint64(self.num_samples)).any():
            values[outside] = self._feistel(values[outside], keys)
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << bits) | right


class SampleStream:
    """The samples of a run over one dataset, by their number in the run.

    `read(positions)` gives the batch of these, `sample_ids(start, count)` their numbers in the dataset. dsgpt.data.mixture
    has the same two for several datasets.
    """

    def __init__(self, dataset: Samples, order: SampleOrder):
        self.dataset = dataset
        self.order = order
        self.num_samples = dataset.num_samples
        # One call for some thousand places costs little more than one for a batch, but each epoch in it as much again.
        self._places = min(_CHUNK, max(16, order.num_samples))
        self._chunk = lru_cache(maxsize=8)(lambda number: order.sample_ids(number * self._places, self._places))

    @classmethod
    def of(cls, dataset: Samples, seed: int) -> SampleStream:
        """In the order of a run over this dataset alone."""
        fingerprint: Any = getattr(dataset, "order_fingerprint", dataset.fingerprint)
        return cls(dataset, SampleOrder(dataset.num_samples, seed, fingerprint))

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Dataset indices (int64) of these samples of the run."""
        positions = np.asarray(positions, dtype=np.int64)
        chunks, within = np.divmod(positions, self._places)
        if len(chunks) and (chunks == chunks[0]).all():
            return self._chunk(int(chunks[0]))[within]
        found = np.empty(len(positions), dtype=np.int64)
        for chunk in np.unique(chunks).tolist():
            here = chunks == chunk
            found[here] = self._chunk(chunk)[within[here]]
        return found

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """Dataset indices of the run's samples [start, start + count)."""
        return self.ids(np.arange(start, start + count))

    def read(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """These samples of the run under each other, as `collate` has them."""
        return read_samples(self.dataset, self.ids(positions))


def read_samples(dataset: Samples, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The samples of these numbers, collated, in the fastest way the dataset has."""
    read = getattr(dataset, "read", None)
    return read(ids) if read else collate([dataset[int(i)] for i in ids])


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
