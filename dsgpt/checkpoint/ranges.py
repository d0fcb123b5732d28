"""Which saved pieces hold a range of a parameter: the arithmetic of every read, and of its simulation. Torch-free.

A manifest's entry of a parameter says where its elements lie: "piece" p, rank i holds [i p, (i + 1) p); or "fragments"
[[rank, start, numel], …] in the order of their starts. Both are answered without a look at ranks that have no part in it, so
that a read costs what it overlaps: with 4,096 ranks before and 3,000 after, two or three pieces.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Overlap(NamedTuple):
    """Elements [low, high) of the flattened parameter lie in `rank`'s piece, which begins at element `begins`."""

    rank: int
    low: int
    high: int
    begins: int


def overlaps(entry: Mapping[str, Any], start: int, numel: int) -> Iterator[Overlap]:
    """The pieces that elements [start, start + numel) lie in. Gaps are left out: whoever asks counts what was found."""
    stop = min(start + numel, math.prod(entry["shape"]))
    if "fragments" in entry:
        fragments = entry["fragments"]
        for rank, begins, size in fragments[max(0, bisect_right(fragments, start, key=lambda one: one[1]) - 1) :]:
            if begins >= stop:
                break
            low, high = max(start, begins), min(stop, begins + size)
            if low < high:
                yield Overlap(rank, low, high, begins)
    elif stop > start:
        piece = entry["piece"]
        for rank in range(start // piece, -(-stop // piece)):
            yield Overlap(rank, max(start, rank * piece), min(stop, (rank + 1) * piece), rank * piece)


def held(entry: Mapping[str, Any], rank: int) -> int:
    """How many elements of the parameter are in that rank's file."""
    if "fragments" in entry:
        fragments = entry["fragments"]  # in the order of the ranks, too
        place = bisect_left(fragments, rank, key=lambda one: one[0])
        return int(fragments[place][2]) if place < len(fragments) and fragments[place][0] == rank else 0
    piece = entry["piece"]
    return min(piece, max(0, math.prod(entry["shape"]) - rank * piece))


def widened(start: int, stop: int, size: int, block: int) -> tuple[int, int]:
    """The byte range of a tensor of `size` bytes that is read so that whole blocks can be verified."""
    return start - start % block, min(-(-stop // block) * block, size)
