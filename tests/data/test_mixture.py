"""A mixture keeps its proportions from the first batch on, and every source its own passes; appending disturbs neither."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from dsgpt.data.dataset import Block, SampleOrder, SampleStream
from dsgpt.data.mixture import SLOTS, MixtureStream, Segment, share_slots, slot_pattern
from dsgpt.errors import DataError


@dataclass
class Numbered:
    """Sample i of source `name` is the number 1,000,000 * name + i, so that what is read can be told."""

    name: int
    num_samples: int

    @property
    def fingerprint(self) -> str:
        return f"source {self.name}"

    def __getitem__(self, i: int) -> Block:
        assert 0 <= i < self.num_samples
        row = np.full(4, 1_000_000 * self.name + i, dtype=np.int64)
        return Block(row, row, row, row)


def mixture(sizes: list[int], weights: list[float], seed: int = 7) -> MixtureStream:
    sources = [Numbered(number, size) for number, size in enumerate(sizes)]
    return MixtureStream(sources, [Segment(0, share_slots(weights))], seed)


def read(stream: MixtureStream | SampleStream, start: int, count: int) -> list[int]:
    return stream.read(np.arange(start, start + count))["input_ids"][:, 0].tolist()


WEIGHTS = [
    [1],
    [0.8, 0.2],
    [1, 1, 1],
    [0.5, 0.3, 0.15, 0.05],
    [0.999, 0.001],
    [1 / 3, 2 / 3],
    [2.0**-n for n in range(12)],
    [1] * 100,
    [99, *[1] * 99],
    [*[1] * 64, 64, 128],
    np.random.default_rng(0).pareto(1, 40).clip(0.01).tolist(),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: f"{len(weights)}-{weights[0]:.3g}")
def test_every_prefix_has_the_asked_proportions(weights: list[float]) -> None:
    """Exact over two rounds of the pattern, at each of their prefixes of 10,000 samples and more."""
    slots = share_slots(weights)
    pattern = np.tile(slot_pattern(slots), 2)
    lengths = np.arange(1, len(pattern) + 1)
    for source, weight in enumerate(weights):
        counts = np.cumsum(pattern == source)
        assert np.abs(counts / lengths - weight / sum(weights))[9_999:].max() < 1e-3
        assert np.abs(counts - lengths * slots[source] / SLOTS).max() <= 1.5


def test_weights_become_slots_that_add_up() -> None:
    for weights in WEIGHTS:
        slots = share_slots(weights)
        assert sum(slots) == SLOTS
        total = sum(map(Fraction, weights))
        for count, weight in zip(slots, weights, strict=True):
            assert abs(Fraction(count, SLOTS) - Fraction(weight) / total) < Fraction(1, SLOTS)
    assert share_slots([8, 2]) == share_slots([0.8, 0.2])
    with pytest.raises(DataError, match="never be read"):
        share_slots([1e6, 1])


def test_a_pattern_of_this_version_stays_as_it_is() -> None:
    """A run resumed under a later dsgpt must see the same samples: change these only with the format's name."""
    assert slot_pattern(share_slots([5, 3, 2]))[:20].tolist() == PINNED


PINNED: list[int] = [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


def test_each_source_goes_through_its_own_permutations() -> None:
    sizes, count = [50, 7, 23], 4_000
    stream = mixture(sizes, [0.5, 0.3, 0.2])
    seen = np.array(read(stream, 0, count))
    for number, size in enumerate(sizes):
        mine = seen[seen // 1_000_000 == number] % 1_000_000
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
        expected = SampleOrder(size, 7, f"source {number}").sample_ids(0, len(mine))
        assert np.array_equal(mine, expected)


def test_one_source_alone_has_the_order_it_always_had() -> None:
    order = SampleOrder(100, 7, "source 0")
    alone = MixtureStream([Numbered(0, 100)], [Segment(0, (SLOTS,))], 7)
    for start in (0, 95, 65_500, 10_000_000):
        expected = order.sample_ids(start, 60).tolist()
        assert alone.sample_ids(start, 60).tolist() == expected == read(alone, start, 60)
        assert alone.locate(np.arange(start, start + 3))[1].tolist() == [start, start + 1, start + 2]


def test_any_slicing_and_any_start_gives_the_same_samples() -> None:
    sizes, weights = [500, 40, 90], [3, 1, 1]
    stream = mixture(sizes, weights)
    whole = read(stream, 65_000, 1_000)  # over the end of the pattern
    assert [read(stream, at, 1)[0] for at in range(65_000, 66_000)] == whole
    for size in (90, 999):
        parts: list[int] = []
        for start in range(65_000, 66_000, size):
            parts += read(mixture(sizes, weights), start, min(size, 66_000 - start))
        assert parts == whole


def test_numbers_of_samples_count_through_the_sources() -> None:
    sizes = [500, 40, 90]
    stream = mixture(sizes, [3, 1, 1])
    ids, values = stream.sample_ids(0, 300), read(stream, 0, 300)
    firsts = [0, 500, 540]
    assert [value - 1_000_000 * (value // 1_000_000) + firsts[value // 1_000_000] for value in values] == ids.tolist()


def test_seed_weights_and_sources_decide_the_order() -> None:
    base = read(mixture([50, 50], [1, 1]), 0, 40)
    assert read(mixture([50, 50], [1, 1]), 0, 40) == base
    assert read(mixture([50, 50], [1, 1], seed=8), 0, 40) != base
    assert read(mixture([50, 50], [2, 1]), 0, 40) != base
    assert mixture([50, 50], [2, 1]).fingerprint != mixture([50, 50], [1, 1]).fingerprint


@pytest.mark.parametrize("at", [0, 1, 777, SLOTS, 3 * SLOTS + 17])
def test_an_appended_source_lets_the_others_go_on_where_they_stood(at: int) -> None:
    """Twice appended, at any place: each source's samples are still its own order, without a gap or a repetition."""
    sizes = [53, 31, 29, 11]
    sources = [Numbered(number, size) for number, size in enumerate(sizes)]
    first, second, third = share_slots([2, 1]), share_slots([2, 1, 1]), share_slots([1, 1, 1, 5])
    before = MixtureStream(sources[:2], [Segment(0, first)], 7)
    segments = [Segment(0, first), Segment(at, second), Segment(at + 500, third)]
    stream = MixtureStream(sources, segments, 7)
    if at:
        assert read(stream, max(0, at - 300), min(at, 300)) == read(before, max(0, at - 300), min(at, 300))
    places, numbers = stream.locate(np.arange(at + 1_500))
    for number, size in enumerate(sizes):
        assert np.array_equal(numbers[places == number], np.arange((places == number).sum()))
        mine = np.array(read(stream, at, 1_500))
        mine = mine[mine // 1_000_000 == number] % 1_000_000
        start = int((places[:at] == number).sum())
        assert np.array_equal(mine, SampleOrder(size, 7, f"source {number}").sample_ids(start, len(mine)))
    realised = np.bincount(places[at + 500 :], minlength=4) / 1_000
    assert np.abs(realised - np.array([1, 1, 1, 5]) / 8).max() < 3e-3


def test_segments_that_do_not_fit_the_sources_are_a_mistake_of_the_caller() -> None:
    for segments in (
        [Segment(5, (SLOTS,))],
        [Segment(0, (SLOTS - 1, 1))],
        [Segment(0, (SLOTS,)), Segment(-1, (SLOTS,))],
    ):
        with pytest.raises(ValueError, match="must ascend"):
            MixtureStream([Numbered(0, 5)], segments, 1)


def test_a_batch_of_several_sources_is_put_together_in_order() -> None:
    stream = mixture([500, 40], [1, 1])
    batch = stream.read(np.array([9, 2, 2, 70_000]))
    assert sorted(batch) == ["document_ids", "input_ids", "labels", "position_ids"]
    assert batch["labels"].shape == (4, 4) and batch["labels"].dtype == np.int64
    assert batch["input_ids"][:, 0].tolist() == [read(stream, at, 1)[0] for at in (9, 2, 2, 70_000)]
