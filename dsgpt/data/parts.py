"""The unit of work of a preparation: some megabytes of text in, one shard for each split out.

Parts are cut from the sorted list of sources and their sizes, never from the number of workers, so any worker on any
machine writes the same bytes for part n. A part is finished when its record exists; the shards come before the record,
each under a temporary name until it is whole and durable. dsgpt.data.tokenize_part does the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dsgpt.data.filters import Filters
from dsgpt.data.manifest import STATE, Shard
from dsgpt.data.sources import Documents, Piece, Reading, can_be_cut
from dsgpt.errors import DataError

TRAIN, VALIDATION = "train", "validation"
_MAX_PARTS = 1024


@dataclass(frozen=True)
class Settings:
    """The choices that, with sources and tokenizer, decide the output."""

    text_field: str = "text"
    documents: Documents = "file"
    validation: float = 0.0
    filters: Filters = field(default_factory=Filters)
    deduplicate: bool = False

    @property
    def reading(self) -> Reading:
        return Reading(self.text_field, self.documents)

    def recorded(self) -> dict[str, Any]:
        """For dataset.json: what every dataset has, and of the rest what was chosen."""
        chosen: dict[str, Any] = {
            "text_field": self.text_field,
            "documents": self.documents,
            "validation": self.validation,
        }
        if filters := self.filters.settings():
            chosen["filters"] = filters
        return chosen | ({"deduplicate": True} if self.deduplicate else {})

    @classmethod
    def of(cls, recorded: dict[str, Any]) -> Settings:
        return cls(**{**recorded, "filters": Filters.of(recorded.get("filters", {}))})


@dataclass(frozen=True)
class Source:
    """A source as it was when the preparation was planned: `stop` ends its last piece, `bytes` are its size on disk."""

    path: str
    bytes: int
    stop: int
    mtime_ns: int


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
    return max(1 << 20, min(32 << 20, total_bytes // 16), total_bytes // _MAX_PARTS)


def plan_parts(sources: list[tuple[str, int]], documents: Documents) -> list[Part]:
    """Cut (path, stop) pairs into parts. A file in which a document can span lines stays whole.

    The files of a data set of the Hub are counted, not measured, so its parts hold no other source.
    """
    files = [(path, size) for path, size in sources if not path.startswith("hf:")]
    target = part_bytes(sum(size for _, size in files))
    groups: list[list[Piece]] = []
    room = 0
    for path, size in sources:
        if path.startswith("hf:"):
            step = -(-size // _MAX_PARTS)
            groups += [[Piece(path, start, min(size, start + step))] for start in range(0, size, step)]
            room = 0
            continue
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
    """What a finished part holds. `records` counts everything that should have been a document.

    hashes      path -> sha256 of each source that begins in this part (of a Hub data set: of the texts of this part)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    number: int
    engine: str
    shards: dict[str, Shard]
    records: int
    bad_lines: int
    empty_documents: int
    left_out: dict[str, int]
    duplicates: int
    special_in_text: int
    hashes: dict[str, str]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards.values())

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards.values())


def load_record(folder: Path, number: int, engine: str) -> PartRecord | None:
    """The record of a part that this engine finished; None where there is none."""
    try:
        record = PartRecord.model_validate_json(record_path(folder, number).read_text("utf-8"))
    except FileNotFoundError:
        return None
    return record if record.engine == engine else None


def changed(path: str) -> DataError:
    return DataError(
        "a source has changed since this preparation began",
        seen=path,
        do="put the old file back, or delete the output folder to prepare it anew",
    )
