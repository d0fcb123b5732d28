"""Finds places where a text may be cut so that the ids of its parts, one after the other, are the ids of the whole.

    end, start = Cuts(backend).last(utf8)     # ids(utf8) == ids(utf8[:end]) + ids(utf8[start:]), whatever stands around it

A model never looks beyond a piece of the pre-tokenizer, so a cut between two pieces changes nothing, provided that it
is between two pieces for every reader: for the one who comes from far away as for the one who starts nearby (groups of
three digits are counted from where the digits begin), and whatever follows. So a cut is taken only where the pieces and
the ids agree for several starts and several ends of a neighbourhood. A sentencepiece BPE model has no pre-tokenizer;
where no entry of its vocabulary goes on from text into a space it cannot look beyond a space.

`start` is one more than `end` where the tokenizer puts a space before every text: that one stands for the one left out.

Trade-off: only neighbourhoods are examined, about 20 ms a cut. What decides about a piece more than CONTEXT characters
away would be missed; no published pre-tokenizer does so except within one unbroken run, which offers no cut at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from dsgpt.errors import DataError

CONTEXT = 512
# Twice what the context on both sides takes where all characters are as long as can be.
_WINDOW_BYTES = 16 * CONTEXT
_SPACE = "▁"
_CROSSING = re.compile(f"[^{_SPACE}]{_SPACE}")
_BEFORE_SPACE = re.compile(f"(?<=[^\\s{_SPACE}])(?=\\s)")
# More than a group of digits, and of no common length.
_STARTS = (0, 1, 2, 3, 4, 5, 7, 11, 64, 150)
_ENDS = (0, 1, 2, 3, 64, 150)
_TRIED_PER_WINDOW = 6


class NoSafeCut(DataError):
    """A text cannot be encoded in parts: this tokenizer, or this text, has no place for a cut."""

    def __init__(self, seen: str):
        super().__init__(
            "a text is too large to be encoded at once, and it cannot be cut without changing its token ids",
            seen=seen,
            do="split it into documents (one a line, or with blank lines between), or use another tokenizer",
        )


class Cuts:
    """Where texts may be cut for one tokenizer. `impossible` says why not, and is empty where they may."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._normalizer = backend.normalizer
        self._splitter = backend.pre_tokenizer
        self.impossible = ""
        if self._splitter is None:
            self.impossible = _why_spaces_are_no_cuts(json.loads(backend.to_str())["model"])
            self._splitter = pre_tokenizers.Split(Regex(f"{_SPACE}+[^{_SPACE}]*"), "isolated")
        elif isinstance(backend.model, models.Unigram) and len(self._pieces("a a")) == 1:
            self.impossible = "the tokenizer does not cut between words and its model is Unigram"

    def last(self, utf8: bytes | bytearray) -> tuple[int, int]:
        """The last safe cut, as (end of the first part, start of the second). Raises NoSafeCut."""
        if self.impossible:
            raise NoSafeCut(self.impossible)
        high = len(utf8)
        while high > 0:
            low = max(0, high - _WINDOW_BYTES)
            while low < high and utf8[low] & 0xC0 == 0x80:
                low += 1
            # A character may end behind the text; nothing else is amiss in UTF-8.
            window = utf8[low:high].decode(errors="ignore")
            for at in self._proposed(window):
                skipped = self._skipped(window[max(0, at - CONTEXT) : at], window[at : at + CONTEXT])
                if skipped is not None:
                    end = low + len(window[:at].encode())
                    return end, end + skipped
            # So that what was too near to this window's start is just far enough from the next one's end.
            high = low + len(window[: 2 * CONTEXT].encode()) if low else 0
        raise NoSafeCut(f"no safe place in {len(utf8)} bytes that begin with {bytes(utf8[:40])!r}")

    def _proposed(self, window: str) -> Iterator[int]:
        """Places worth a check, from the back: before whitespace, then wherever the pre-tokenizer cuts."""
        inside = range(CONTEXT, len(window) - CONTEXT)
        before_space = [found.start() for found in _BEFORE_SPACE.finditer(window)]
        cuts = [start for _, (start, _) in self._splitter.pre_tokenize_str(self._normalized(window))]
        for places in (before_space, cuts):
            usable = [place for place in places if place in inside]
            yield from usable[: -_TRIED_PER_WINDOW - 1 : -1]

    def _skipped(self, left: str, right: str) -> int | None:
        """Bytes to leave out at a cut between `left` and `right`, or None where it is not safe."""
        for skipped in (0, 1) if right.startswith(" ") else (0,):
            if all(self._alike(left[start:], right, skipped) for start in _STARTS) and all(
                self._alike(left, right[: len(right) - end], skipped) for end in _ENDS
            ):
                return skipped
        return None

    def _alike(self, left: str, right: str, skipped: int) -> bool:
        if self._pieces(left + right) != self._pieces(left) + self._pieces(right[skipped:]):
            return False
        # The pieces know nothing of added tokens, which are found before all else.
        parts = [left + right, left, right[skipped:]]
        whole, first, second = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        return bool(whole.ids == first.ids + second.ids)

    def _pieces(self, text: str) -> list[str]:
        return [piece for piece, _ in self._splitter.pre_tokenize_str(self._normalized(text))]

    def _normalized(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer else text


def _why_spaces_are_no_cuts(model: dict[str, Any]) -> str:
    """Why a tokenizer without pre-tokenizer may look beyond a space, or nothing where it cannot."""
    if model["type"] != "BPE":
        # Its scores are sums over the whole text; rounded, they decide between equally good ways to cut it.
        return f"the tokenizer has no pre-tokenizer and its model is {model['type']}"
    if _SPACE not in model["vocab"]:
        return "the tokenizer has no pre-tokenizer and no token for a space"
    crossing = next((piece for piece in model["vocab"] if _CROSSING.search(piece)), None)
    return f"the tokenizer has no pre-tokenizer and a token goes beyond a space: {crossing!r}" if crossing else ""
