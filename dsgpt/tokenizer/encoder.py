"""Turns documents into token ids as fast as can be, with the ids that tokenizer.json gives in the library `tokenizers`.

    encoder = Encoder.load("tokenizers/bpe32k")         # or engine="reference"
    if difference := encoder.compare(samples):          # the gate: once for every source
        encoder.fall_back(str(difference))
    ids, lengths = encoder.encode_batch([b"a text", b"another"])
    ids, lengths = enclose_flat(ids, lengths, tokenizer.bos_id, tokenizer.eos_id)

`tokenizers` is the reference. The package gigatoken is some fifty times as fast, where it is installed and supports the
tokenizer; it is young, so it is believed only as far as it was compared. `engine` says which one is in use, `fallback`
why it is not the fast one. Text is UTF-8 throughout; text that looks like a special token is text.

Trade-off: one thread, so that processes add up. A text of any size is encoded in parts (`encode_chunks`), whose memory
is bounded; cuts.py says where a text can be cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tokenizers

from dsgpt.tokenizer.cuts import Cuts
from dsgpt.tokenizer.tokenizer import Tokenizer

Ids = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]
_Encode = Callable[[Sequence[bytes]], tuple[Ids, Lengths]]

_PART_BYTES = 4 << 20
_PROBE = (
    "",
    " ",
    "\n",
    "  two  spaces  \n\n\n\tand lines\r\n ",
    "it's 1234567 \0 é e\u0301 漢字 😀👩‍👩‍👧 \ufeff\u00a0\u2028 ▁ x" + " " * 40,
)


class EngineError(Exception):
    """The fast engine broke down over a text."""


@dataclass(frozen=True)
class Difference:
    """Where an engine first differs from the reference: which document, which token of it, and a few ids from there."""

    document: int
    position: int
    expected: list[int]
    seen: list[int]

    def __str__(self) -> str:
        return f"document {self.document} differs from token {self.position} on: {self.seen}, expected {self.expected}"


class Encoder:
    """Encodes UTF-8 documents. `tokenizer` is the one it encodes for.

    engine     "gigatoken 0.10.0" or "tokenizers 0.22.1": what encodes
    fallback   why it is the reference though "auto" was asked for; else empty
    """

    def __init__(self, tokenizer: Tokenizer, engine: Literal["auto", "reference"] = "auto"):
        self.tokenizer = tokenizer
        self._backend = tokenizer._backend
        self._reference: _Encode = _Reference(self._backend)
        self._encode: _Encode = self._reference
        self.engine = f"tokenizers {tokenizers.__version__}"
        self.fallback = ""
        self._cuts: Cuts | None = None
        added = self._backend.get_added_tokens_decoder().values()
        # The longest first, where one begins another.
        special = sorted({token.content.encode() for token in added if token.special}, reverse=True)
        self._special = re.compile(b"|".join(map(re.escape, special))) if special else None
        self._special_prefix = _shared_prefix(special)
        self._special_length = max(map(len, special), default=0)
        if engine == "auto":
            self._speed_up([*_PROBE, *(f"a{t.content}b  {t.content}  {t.content}\n" for t in added)])

    @classmethod
    def load(cls, folder: str | Path, engine: Literal["auto", "reference"] = "auto") -> Encoder:
        """For the tokenizer that Tokenizer.load finds there, with its errors."""
        return cls(Tokenizer.load(folder), engine)

    def encode_batch(self, texts: Sequence[bytes], is_checked: bool = False) -> tuple[Ids, Lengths]:
        """The ids of all texts in one array, and how many belong to each. Nothing is added.

        Raises UnicodeDecodeError where a text is not UTF-8; with `is_checked` the caller knows that all are.
        """
        if not is_checked:
            _check_utf8(texts)
        return self._encode(texts)

    def encode_chunks(self, chunks: Iterable[bytes], part_bytes: int = _PART_BYTES) -> Iterator[Ids]:
        """The ids of one text that comes in chunks, cut anywhere; together they are the ids of the whole.

        Memory is some parts', whatever the size of the text. Raises NoSafeCut where a text larger than `part_bytes`
        cannot be cut, and UnicodeDecodeError where it is not UTF-8.
        """
        waiting = bytearray()
        for chunk in chunks:
            for start in range(0, len(chunk), part_bytes):
                waiting += chunk[start : start + part_bytes]
                while len(waiting) > part_bytes:
                    # Most tokenizers never need it, and it reads all of theirs.
                    self._cuts = self._cuts or Cuts(self._backend)
                    end, rest = self._cuts.last(waiting[:part_bytes])
                    yield self.encode_batch([bytes(waiting[:end])])[0]
                    del waiting[:rest]
        yield self.encode_batch([bytes(waiting)])[0]

    def special_in_text(self, utf8: bytes) -> int:
        """How often the text of a special token occurs: encoded as text, but perhaps meant otherwise."""
        return sum(1 for _ in self._special_in(utf8))

    def special_in_chunks(self, chunks: Iterable[bytes]) -> int:
        """As special_in_text, of a text that comes in chunks."""
        found, tail = 0, b""
        for chunk in chunks:
            text, end = tail + chunk, 0
            for match in self._special_in(text):
                found, end = found + 1, match.end()
            # What could begin a token that the next chunk ends, and belongs to none that was counted.
            tail = text[max(end, len(text) - self._special_length + 1) :] if self._special_length else b""
        return found

    def _special_in(self, utf8: bytes) -> Iterator[re.Match[bytes]]:
        if self._special is None:
            return
        prefix = self._special_prefix
        if not prefix or utf8.count(prefix) > len(utf8) // 256:
            yield from self._special.finditer(utf8)
            return
        # A search for what they all begin with is some twenty times as fast as one for any of them.
        place = utf8.find(prefix)
        while place >= 0:
            match = self._special.match(utf8, place)
            if match:
                yield match
            place = utf8.find(prefix, match.end() if match else place + 1)

    def compare(self, samples: Sequence[bytes]) -> Difference | None:
        """The first difference between this engine and the reference, None where every id is equal."""
        if self._encode is self._reference:
            return None
        _check_utf8(samples)
        found, expected = (_by_text(*encode(samples)) for encode in (self._encode, self._reference))
        for document, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            if not np.array_equal(ours, theirs):
                shared = min(len(ours), len(theirs))
                unequal = np.flatnonzero(ours[:shared] != theirs[:shared])
                at = int(unequal[0]) if len(unequal) else shared
                return Difference(document, at, theirs[at : at + 8].tolist(), ours[at : at + 8].tolist())
        return None

    def fall_back(self, reason: str) -> None:
        """Encode by the reference from now on; `reason` becomes `fallback`."""
        self._encode = self._reference
        self.engine = f"tokenizers {tokenizers.__version__}"
        self.fallback = reason

    def _speed_up(self, probe: list[str]) -> None:
        """Take the fast engine if it is there, reads this tokenizer, and is right about `probe`."""
        try:
            self._encode = _Gigatoken(_source(self.tokenizer))
            self.engine = f"gigatoken {version('gigatoken')}"
            difference = self.compare([text.encode() for text in probe])
        except ModuleNotFoundError as error:
            return self.fall_back(f"{error.name} is not installed")
        except BaseException as error:  # a panic in its Rust part is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            return self.fall_back(
                f"gigatoken does not take this tokenizer: {(str(error) or repr(error)).splitlines()[0]}"
            )
        if difference is not None:
            self.fall_back(f"gigatoken {version('gigatoken')}, probe: {difference}")


class _Reference:
    """The library `tokenizers`."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend

    def __call__(self, texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        found = self._backend.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in found]
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        return (np.concatenate(ids) if ids else np.empty(0, np.uint32)), lengths


class _Gigatoken:
    """The package gigatoken, for a tokenizer.json without special tokens: it would find them in text.

    It trusts its caller, and dies of a segmentation fault where bytes are not UTF-8.
    """

    def __init__(self, tokenizer_json: str):
        import gigatoken

        self._tokenizer = gigatoken.Tokenizer.from_json(tokenizer_json)

    def __call__(self, texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        try:
            # Its threads would stand still in a forked process.
            layout: Any = self._tokenizer.encode_batch(list(texts), parallel=False).layout
        except BaseException as error:  # a panic in its Rust part is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise EngineError(f"gigatoken failed: {(str(error) or repr(error)).splitlines()[0]}") from error
        offsets = layout.offsets.data
        return layout.content.data[offsets[0] : offsets[-1]], np.diff(offsets)


def _shared_prefix(texts: Sequence[bytes]) -> bytes:
    """What all texts begin with."""
    first, last = min(texts, default=b""), max(texts, default=b"")
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _check_utf8(texts: Sequence[bytes]) -> None:
    for text in texts:
        text.decode()


def enclose_flat(ids: Ids, lengths: Lengths, bos_id: int | None, eos_id: int | None) -> tuple[Ids, Lengths]:
    """[BOS] + ids + [EOS] for every text of a batch, each where its id is not None."""
    enclosed = lengths + (bos_id is not None) + (eos_id is not None)
    ends = np.cumsum(enclosed)
    result = np.empty(int(enclosed.sum()), dtype=ids.dtype)
    is_text = np.ones(len(result), dtype=bool)
    for token, places in ((bos_id, ends - enclosed), (eos_id, ends - 1)):
        if token is not None:
            result[places] = token
            is_text[places] = False
    result[is_text] = ids
    return result, enclosed


def _by_text(ids: Ids, lengths: Lengths) -> Iterator[Ids]:
    ends = np.cumsum(lengths).tolist()
    return (ids[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True))


def _source(tokenizer: Tokenizer) -> str:
    """tokenizer.json as other engines should read it: as it is on disk, less what makes text more than text."""
    folder = tokenizer._folder
    content = json.loads((folder / "tokenizer.json").read_text("utf-8") if folder else tokenizer._backend.to_str())
    content["added_tokens"] = [token for token in content.get("added_tokens", []) if not token["special"]]
    content |= {"truncation": None, "padding": None, "post_processor": None}
    return json.dumps(content, ensure_ascii=False)
