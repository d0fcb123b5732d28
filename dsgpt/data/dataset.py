"""Training blocks of fixed length over a split, and the order in which a run visits them.

    dataset = BlockDataset("data/corpus", "train", seq_length=1024)
    order = SampleOrder(dataset.num_samples, seed=1234, fingerprint=dataset.fingerprint)
    batch = collate([dataset[i] for i in order.sample_ids(start=0, count=8)])

A split is one stream of tokens, its shards in the order of dataset.json. Block i takes the T + 1 tokens from i * T on,
so every token is an input exactly once per epoch, over the edges of documents and shards; only what is left at the end
and too short for a block is not seen. Trade-off: documents are cut where blocks end, which costs the start of a block
its context, in exchange for no padding, no dropped token and no index to build.

The order is computed, not stored: sample k of a run is a pure function of (seed, fingerprint, k). It takes no memory
and no time to start or resume, and it does not know of world size, micro-batch or restarts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np

from dsgpt.data.indexed import IndexedReader
from dsgpt.data.manifest import DatasetManifest, Shard, load_manifest
from dsgpt.errors import DataError

IGNORED = -100  # label of a position without a target, as torch's cross entropy has it
_ROUNDS = 8


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


class BlockDataset:
    """The blocks of one split.

    With document_mask=False a block is one piece of text: labels cross document edges, positions run through and
    document_ids are 0. `fingerprint` identifies the samples (not their order): dataset, split and seq_length.

    Raises DataError where the split is missing, has fewer than seq_length + 1 tokens, or a shard does not have the
    number of tokens that dataset.json says.
    """

    def __init__(self, folder: str | Path, split: str, seq_length: int, document_mask: bool = True):
        self.folder = Path(folder)
        self.manifest: DatasetManifest = load_manifest(folder)
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
        # Mapped when first read: a run of many ranks over many shards opens only what it visits.
        self._reader = lru_cache(maxsize=None)(self._open)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, i: int) -> Block:
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.num_samples}")
        length = self.seq_length
        tokens, starts = self._read(int(i) * length, length + 1)
        input_ids, labels = tokens[:-1], tokens[1:].copy()
        position_ids = np.arange(length, dtype=np.int64)
        document_ids = np.zeros(length, dtype=np.int32)
        starts = starts[starts > 0]
        if self.document_mask and len(starts):
            labels[starts - 1] = IGNORED
            inside = starts[starts < length]
            document_ids[inside] = 1
            np.cumsum(document_ids, out=document_ids)
            position_ids -= np.concatenate(([0], inside))[document_ids]
        return Block(input_ids, labels, position_ids, document_ids)

    def _read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64) of stream[start : start + count], and where in them documents begin (int64, ascending)."""
        tokens = np.empty(count, dtype=np.int64)
        starts = []
        done = 0
        number = int(np.searchsorted(self._edges, start, side="right")) - 1
        while done < count:
            first = start + done - int(self._edges[number])
            take = min(count - done, self._shards[number].tokens - first)
            reader = self._reader(number)
            tokens[done : done + take] = reader.tokens[first : first + take]
            starts.append(reader.document_starts(first, first + take) + done)
            done += take
            number += 1
        # A document without tokens begins where the next one does.
        return tokens, np.unique(np.concatenate(starts))

    def _open(self, number: int) -> IndexedReader:
        shard: Shard = self._shards[number]
        reader = IndexedReader(self.folder / shard.path)
        if len(reader.tokens) != shard.tokens or reader.dtype.name != self.manifest.dtype:
            raise DataError(
                f"shard {shard.path} is not the one that dataset.json describes",
                seen=f"{len(reader.tokens)} tokens of {reader.dtype.name}, "
                f"expected {shard.tokens} of {self.manifest.dtype}",
                do=f"run: dsgpt data verify {self.folder}",
            )
        return reader


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


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
