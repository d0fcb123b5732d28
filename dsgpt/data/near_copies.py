"""Which texts are near copies of an earlier one, by the shingles they share: any hashes of pieces in a row.

    index = NearCopies(lambda size, earlier: 0.9 * max(size, earlier))     # how many shared shingles make a copy
    copied = index.add(shingles)                                           # number of the text it copies, or None

An index from shingle to texts finds the candidates, so the work grows with the text and not with the pairs of texts. A copy
is not added. Trade-off: exact, in memory (about 100 bytes a shingle): right for millions of words and too much for billions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable


class NearCopies:
    """`needed(size, earlier)`: shared shingles from which on a text of so many copies an earlier one of so many."""

    def __init__(self, needed: Callable[[int, int], float]) -> None:
        self._needed = needed
        self._holders: dict[Hashable, list[int]] = defaultdict(list)
        self._sizes: dict[int, int] = {}
        self._count = 0

    def add(self, shingles: Collection[Hashable]) -> int | None:
        """The number of the first text that this one copies, counted from 0 in the order of calls; None where it is new."""
        number, self._count = self._count, self._count + 1
        shared = Counter(earlier for shingle in shingles for earlier in self._holders.get(shingle, ()))
        near = [
            earlier for earlier, count in shared.items() if count >= self._needed(len(shingles), self._sizes[earlier])
        ]
        if near:
            return min(near)
        self._sizes[number] = len(shingles)
        for shingle in shingles:
            self._holders[shingle].append(number)
        return None
