"""The arithmetic of reading against a table of every element's owner."""

from __future__ import annotations

import itertools
import random

from dsgpt.checkpoint.ranges import held, overlaps, widened


def owners(entry: dict) -> list[tuple[int, int]]:
    """(rank, position in its piece) of every element, written out."""
    if "piece" in entry:
        return [(i // entry["piece"], i % entry["piece"]) for i in range(entry["shape"][0])]
    return [(rank, i) for rank, _, numel in entry["fragments"] for i in range(numel)]


def entry_of(rng: random.Random) -> dict:
    total = rng.randint(1, 60)
    if rng.random() < 0.5:
        return {"shape": [total], "piece": rng.randint(1, total + 3)}
    cuts = sorted(rng.sample(range(total + 1), rng.randint(0, min(5, total))))
    edges = [0, *cuts, total]
    pieces = [(a, b - a) for a, b in itertools.pairwise(edges) if b > a]
    first = rng.randint(0, 3)
    return {"shape": [total], "fragments": [[first + n, start, numel] for n, (start, numel) in enumerate(pieces)]}


def test_every_element_of_a_range_is_found_where_it_lies() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        entry = entry_of(rng)
        table = owners(entry)
        start, stop = sorted(rng.randint(0, len(table)) for _ in range(2))
        found = [
            (one.rank, element - one.begins)
            for one in overlaps(entry, start, stop - start)
            for element in range(one.low, one.high)
        ]
        assert found == table[start:stop]
        for rank in range(8):
            assert held(entry, rank) == sum(owner == rank for owner, _ in table)


def test_a_gap_is_not_filled() -> None:
    entry = {"shape": [10], "fragments": [[0, 0, 3], [2, 6, 4]]}
    assert [tuple(one) for one in overlaps(entry, 1, 9)] == [(0, 1, 3, 0), (2, 6, 10, 6)]
    assert [*overlaps(entry, 3, 3)] == []


def test_a_widened_range_is_the_blocks_that_hold_it() -> None:
    assert widened(5, 9, 100, 8) == (0, 16)
    assert widened(8, 16, 100, 8) == (8, 16)
    assert widened(97, 99, 100, 8) == (96, 100)
