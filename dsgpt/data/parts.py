"""The unit of work of a preparation: some megabytes of text in, one shard for each split out.

Parts are cut from the sorted list of sources and their sizes, never from the number of workers, so any worker on any
machine writes the same bytes for part n. A part is finished when its record exists; the shards come before the record,
each under a temporary name until it is whole and durable.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dsgpt.data.indexed import IndexedWriter
from dsgpt.data.manifest import Shard, write_durably
from dsgpt.data.sources import BadLine, Documents, Piece, can_be_cut, first_line_of, read_documents
from dsgpt.data.workers import count
from dsgpt.tokenizer.tokenizer import Tokenizer

STATE = ".prepare"
TOKENIZER = "tokenizer"
TRAIN, VALIDATION = "train", "validation"
_REPORT_EVERY_BYTES = 256 << 10


@dataclass(frozen=True)
class Settings:
    """The choices that, with sources and tokenizer, decide the output."""

    text_field: str
    documents: Documents
    validation: float


@dataclass(frozen=True)
class Part:
    number: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


def record_path(folder: Path, number: int) -> Path:
    return folder / STATE / f"part-{number:05d}.json"


def bad_lines_path(folder: Path, number: int) -> Path:
    return folder / STATE / f"bad-{number:05d}.jsonl"


def part_bytes(total_bytes: int) -> int:
    """Aimed-at size of a part: some parts per core on small corpora, 32 MiB, and from 32 GiB on about 1,000 parts."""
    return max(1 << 20, min(32 << 20, total_bytes // 16), total_bytes // 1024)


def plan_parts(sources: list[tuple[str, int]], documents: Documents) -> list[Part]:
    """Cut (path, bytes) pairs into parts. A file in which a document can span lines stays whole."""
    target = part_bytes(sum(size for _, size in sources))
    groups: list[list[Piece]] = []
    room = 0
    for path, size in sources:
        start = 0
        while start < size:
            if room <= 0:
                groups.append([])
                room = target
            stop = min(size, start + room) if can_be_cut(path, documents) else size
            groups[-1].append(Piece(path, start, stop))
            room -= stop - start
            start = stop
    return [Part(number, tuple(pieces)) for number, pieces in enumerate(groups)]


class PartRecord(BaseModel):
    """What a finished part holds. `records` counts everything that should have been a document."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    number: int
    shards: dict[str, Shard]
    records: int
    bad_lines: int
    empty_documents: int

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards.values())

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards.values())


def run_part(part: Part, folder: Path, settings: Settings, dtype: str) -> PartRecord:
    """Tokenise one part into shards below `folder`; its record is on disk when this returns."""
    tokenizer = _tokenizer(str(folder / TOKENIZER))
    outputs = _Outputs(folder, part.number, dtype)
    tally = _Tally(part.num_bytes)
    bad: list[dict[str, Any]] = []
    num_records = num_empty = 0
    with outputs:
        for piece in part.pieces:
            for item in read_documents(piece, settings.text_field, settings.documents):
                num_records += 1
                if isinstance(item, BadLine):
                    line = item.line + first_line_of(piece)
                    bad.append({"source": piece.path, "line": line, "reason": item.reason, "text": item.excerpt})
                    tally.add(bad_lines=1)
                elif not item.text:
                    num_empty += 1
                else:
                    split = VALIDATION if share_of(item.utf8) < settings.validation else TRAIN
                    ids = tokenizer.encode_document(item.text)
                    outputs.add(split, ids, len(item.utf8))
                    tally.add(num_bytes=len(item.utf8), documents=1, tokens=len(ids))
    tally.close()
    if bad:
        write_durably(bad_lines_path(folder, part.number), "".join(json.dumps(entry) + "\n" for entry in bad))
    record = PartRecord(
        number=part.number,
        shards=outputs.shards,
        records=num_records,
        bad_lines=len(bad),
        empty_documents=num_empty,
    )
    write_durably(record_path(folder, part.number), record.model_dump_json())
    return record


def share_of(utf8: bytes) -> float:
    """A number in [0, 1) that depends on the text alone: what is below the validation share is set aside."""
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "big") / 2**64


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)


class _Outputs:
    """One writer for each split that turns out to have documents; leaving with an error drops what was written."""

    def __init__(self, folder: Path, number: int, dtype: str):
        self.shards: dict[str, Shard] = {}
        self._folder, self._number, self._dtype = folder, number, dtype
        self._writers: dict[str, IndexedWriter] = {}
        self._text_bytes = {TRAIN: 0, VALIDATION: 0}

    def add(self, split: str, ids: list[int], text_bytes: int) -> None:
        if split not in self._writers:
            prefix = self._folder / self._name(split)
            self._writers[split] = IndexedWriter(prefix, self._dtype, scratch=self._folder / STATE)
        self._writers[split].add_document(ids)
        self._text_bytes[split] += text_bytes

    def _name(self, split: str) -> str:
        return f"{split}-{self._number:05d}"

    def __enter__(self) -> _Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for split, writer in self._writers.items():
            if kind is not None:
                writer.discard()
                continue
            writer.finish()
            self.shards[split] = Shard(
                path=self._name(split),
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                text_bytes=self._text_bytes[split],
                sha256_bin=writer.sha256_bin,
                sha256_idx=writer.sha256_idx,
            )


class _Tally:
    """Passes counts on to the progress display, not for every document but for every quarter of a megabyte.

    Text is shorter than the file it stands in; `close` makes the sum equal to the size of the part.
    """

    def __init__(self, part_bytes: int):
        self._left = part_bytes
        self._pending = dict.fromkeys(("num_bytes", "documents", "tokens", "bad_lines"), 0)

    def add(self, num_bytes: int = 0, documents: int = 0, tokens: int = 0, bad_lines: int = 0) -> None:
        pending = self._pending
        pending["num_bytes"] += num_bytes
        pending["documents"] += documents
        pending["tokens"] += tokens
        pending["bad_lines"] += bad_lines
        if pending["num_bytes"] >= _REPORT_EVERY_BYTES:
            self._flush()

    def close(self) -> None:
        self._pending["num_bytes"] = self._left
        self._flush()

    def _flush(self) -> None:
        self._left -= self._pending["num_bytes"]
        count(**self._pending)
        self._pending = dict.fromkeys(self._pending, 0)
