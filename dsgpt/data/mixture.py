"""Training data from several sources in asked proportions: which sample of which source is the k-th of a run.

    stream = MixtureStream([web, code], [Segment(0, share_slots([0.8, 0.2]))], seed=1234)
    batch = stream.read(np.arange(8))  # the run's first eight samples

The proportions are kept by a pattern of 65,536 slots that repeats: in every prefix of it a source has its share of the
slots to within two (`slot_pattern` says why), and what its weight loses by rounding is less than 1/65,536. So the k-th
sample is a pure function of (seed, fingerprints, weights, k), found without going through those before it, and any batch
has nearly the asked mixture. Trade-off: sources follow each other regularly and not at random, which nobody sees in a
loss that is summed over ranks, and which no random draw keeps as well.

Each source is passed through in its own order (dsgpt.data.dataset.SampleOrder), one permutation after the other. A source
that is appended to a run begins a new segment, in which the others go on where they stood. One source alone gives the
order it always had.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dsgpt.data.dataset import BlockDataset, Samples, SampleStream
from dsgpt.data.foreign import base_folder, is_foreign
from dsgpt.data.manifest import DatasetManifest
from dsgpt.errors import DataError

SLOTS = 65_536


@dataclass(frozen=True)
class Segment:
    """From the run's sample `first_sample` on, source s has slots[s] of each 65,536 samples; later sources have none yet."""

    first_sample: int
    slots: tuple[int, ...]


def share_slots(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as whole slots that add up to 65,536, each rounded down or up. Raises DataError where one gets none."""
    exact = [SLOTS * weight / sum(weights) for weight in weights]
    slots = [int(value) for value in exact]
    # What is left goes to those that lost most, of equals to the first.
    for number in sorted(range(len(exact)), key=lambda i: slots[i] - exact[i])[: SLOTS - sum(slots)]:
        slots[number] += 1
    if not all(slots):
        raise DataError(
            "a source has so little weight that it would never be read",
            seen=f"weight {weights[slots.index(0)]:g} of {sum(weights):g} in all",
            do=f"give every source at least 1/{SLOTS} of the weight, or leave it out",
        )
    return tuple(slots)


def slot_pattern(slots: Sequence[int]) -> np.ndarray:
    """The source of each slot (int16); source s stands in slots[s] of them, evenly spread.

    The sources are halved by weight again and again, and of a group's n slots one half with a of them takes those where
    the rounded a * j / n grows. That is within 1/2 of the exact share at each halving; a half that is halved again has at
    most two thirds, so over all halvings the count of a source in a prefix is off by less than 1/2 * (1 + 2/3 + ...) = 3/2.
    """
    pattern = np.zeros(sum(slots), dtype=np.int16)

    def divide(sources: list[int], places: np.ndarray) -> None:
        if len(sources) == 1:
            pattern[places] = sources[0]
            return
        halves: tuple[list[int], list[int]] = ([], [])
        sums = [0, 0]
        for source in sorted(sources, key=lambda s: -slots[s]):
            lighter = int(sums[1] < sums[0])
            halves[lighter].append(source)
            sums[lighter] += slots[source]
        total = len(places)
        before = (2 * sums[0] * np.arange(total + 1) + total) // (2 * total)
        first = np.diff(before) > 0
        divide(halves[0], places[first])
        divide(halves[1], places[~first])

    divide(list(range(len(slots))), np.arange(len(pattern)))
    return pattern


class _Places:
    """Where one segment's samples come from: their source, and their number in what the run sees of it."""

    def __init__(self, slots: Sequence[int], bases: np.ndarray):
        self.slots, self.bases = np.array(slots, dtype=np.int64), bases
        self.pattern = slot_pattern(slots)
        self.within = np.empty(SLOTS, dtype=np.int64)
        for source, count in enumerate(slots):
            self.within[self.pattern == source] = np.arange(count)

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number in it) of the segment's samples, counted from its first."""
        rounds, slot = np.divmod(places, SLOTS)
        sources = self.pattern[slot].astype(np.int64)
        return sources, self.bases[sources] + rounds * self.slots[sources] + self.within[slot]

    def counts(self, length: int) -> np.ndarray:
        """How many samples of each source the segment's first `length` have."""
        rounds, rest = divmod(length, SLOTS)
        return rounds * self.slots + np.bincount(self.pattern[:rest], minlength=len(self.slots))


class MixtureStream:
    """The samples of a run over several sources, by their number in the run; the interface of SampleStream.

    Samples are numbered through the sources, in their order: `sample_ids` of a source's sample i is i plus the number of
    samples of the sources before it. All sources must have the same seq_length.
    """

    def __init__(self, sources: Sequence[Samples], segments: Sequence[Segment], seed: int):
        self.streams = [SampleStream.of(source, seed) for source in sources]
        self.segments = tuple(segments)
        self.num_samples = sum(source.num_samples for source in sources)
        self._first_ids = np.cumsum([0] + [source.num_samples for source in sources])
        self._starts = np.array([segment.first_sample for segment in segments])
        if self._starts[0] != 0 or (np.diff(self._starts) < 0).any() or len(segments[-1].slots) != len(sources):
            raise ValueError(f"segments must ascend from 0 and end with {len(sources)} sources, got {self.segments}")
        self._places: list[_Places] = []
        seen = np.zeros(len(sources), dtype=np.int64)
        for segment, stop in zip(segments, [*self._starts[1:].tolist(), None], strict=True):
            here = _Places(segment.slots, seen.copy())
            self._places.append(here)
            if stop is not None:
                seen[: len(segment.slots)] += here.counts(stop - segment.first_sample)

    @property
    def fingerprint(self) -> str:
        """Identifies the samples and their order, but for the seed."""
        parts = [[stream.dataset.fingerprint for stream in self.streams], [asdict(one) for one in self.segments]]
        return hashlib.sha256(f"mixture/1 {json.dumps(parts)}".encode()).hexdigest()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of the sample among all that the run sees of this source, from 0) of the run's samples."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(self._places) == 1:
            return self._places[0].locate(positions)
        sources, numbers = np.empty_like(positions), np.empty_like(positions)
        segments = np.searchsorted(self._starts, positions, side="right") - 1
        for segment in np.unique(segments).tolist():
            here = segments == segment
            sources[here], numbers[here] = self._places[segment].locate(positions[here] - self._starts[segment])
        return sources, numbers

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The numbers of these samples of the run, counted through the sources."""
        sources, numbers = self.locate(positions)
        found = np.empty_like(numbers)
        for source in np.unique(sources).tolist():
            here = sources == source
            found[here] = self._first_ids[source] + self.streams[source].ids(numbers[here])
        return found

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """The same for the run's samples [start, start + count)."""
        return self.ids(np.arange(start, start + count))

    def read(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """These samples of the run under each other, as `collate` has them."""
        if len(self.streams) == 1:
            return self.streams[0].read(positions)
        sources, numbers = self.locate(positions)
        batch: dict[str, np.ndarray] = {}
        for source in np.unique(sources).tolist():
            here = sources == source
            for name, rows in self.streams[source].read(numbers[here]).items():
                if name not in batch:
                    batch[name] = np.empty((len(sources), *rows.shape[1:]), rows.dtype)
                batch[name][here] = rows
        return batch


def open_samples(
    path: Path,
    manifest: DatasetManifest,
    split: str,
    seq_length: int,
    document_mask: bool = True,
    vocab_size: int | None = None,
) -> Samples:
    """The samples of a split: packed chats, or blocks of text. The one place that decides.

    `manifest` is what dsgpt.data.foreign.find_manifest says of `path`. `vocab_size` is the model's: what others tokenised
    is compared with it when it is read.
    """
    if manifest.kind == "chat":
        from dsgpt.data.packing import open_chat

        samples: Samples = open_chat(path, split, seq_length)
        return samples
    if is_foreign(manifest):
        return BlockDataset(base_folder(path), split, seq_length, document_mask, manifest, vocab_size)
    return BlockDataset(path, split, seq_length, document_mask, manifest)
