"""Reads sentencepiece's .model files, without sentencepiece and without protobuf.

    model = read_model(Path("tokenizer.model").read_bytes())        ValueError for what is none
    model.pieces[model.bos_id], model.kind, model.dummy_prefix, ...

sentencepiece's own interface tells the pieces but not how text is normalised, and its generated protobuf module needs a
package that nothing else here needs. Trade-off: only the fields that decide about ids are read, by the numbers that
sentencepiece_model.proto gives them; those numbers are part of the file format and do not change.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class SentencePieceModel:
    """What of a model decides about ids; `types` are NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED and BYTE."""

    kind: Literal["unigram", "bpe", "word", "char"]
    pieces: list[str]
    scores: list[float]
    types: list[int]
    bos_id: int | None
    eos_id: int | None
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    space_is_suffix: bool

    def ids_of(self, kind: int) -> list[int]:
        return [i for i, found in enumerate(self.types) if found == kind]


def read_model(proto: bytes) -> SentencePieceModel:
    """Raises ValueError where the bytes are no sentencepiece model."""
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, content in _fields(proto):
            if number == 1:
                fields = dict(_fields(_bytes(content)))
                pieces.append(_bytes(fields[1]).decode())
                scores.append(struct.unpack("<f", _bytes(fields.get(2, bytes(4))))[0])
                types.append(_int(fields.get(3, NORMAL)))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(_bytes(content)))
        kind = KINDS[_int(trainer.get(3, 1))]
        bos, eos = (_bytes(trainer.get(number, name)).decode() for number, name in ((46, b"<s>"), (47, b"</s>")))
        if types.count(UNKNOWN) != 1:
            raise ValueError("no token, or several, for what is unknown")
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise ValueError(f"no sentencepiece model: {error}") from error
    control = {piece: i for i, piece in enumerate(pieces) if types[i] == CONTROL}
    return SentencePieceModel(
        kind=kind,  # type: ignore[arg-type]
        pieces=pieces,
        scores=scores,
        types=types,
        bos_id=control.get(bos),
        eos_id=control.get(eos),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        space_is_suffix=bool(trainer.get(24, 0)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, content) of each field of a protobuf message; a later one replaces an earlier one of its number."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        if key & 7 == 0:
            content: int | bytes
            content, place = _varint(message, place)
        else:
            if key & 7 == 2:
                length, place = _varint(message, place)
            else:
                length = {1: 8, 5: 4}[key & 7]
            if place + length > len(message):
                raise ValueError("cut off")
            content = message[place : place + length]
            place += length
        yield key >> 3, content


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, place


def _bytes(content: int | bytes) -> bytes:
    if not isinstance(content, bytes):
        raise ValueError("a number where text should be")
    return content


def _int(content: int | bytes) -> int:
    if not isinstance(content, int):
        raise ValueError("text where a number should be")
    return content
