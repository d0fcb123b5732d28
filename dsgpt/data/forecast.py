"""What a preparation will give and how long it will take, from some samples of the sources.

    print(forecast(plan, encoder, folder, processes=64))

Up to 16 places are read, spread over the parts, a quarter of a megabyte of text at each. Trade-off: an estimate in a
second or two. It is off where sources differ more than the samples show. How far a compressed file can be unpacked is
taken from how well the sample compresses, and the rows of .parquet and .arrow files count by their part of the bytes.
"""

from __future__ import annotations

import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsgpt.data.formats import kind_of
from dsgpt.data.parts import Part, Settings
from dsgpt.data.plan import Plan
from dsgpt.data.sources import HUB, BadLine, Document, LargeDocument, Piece, can_be_cut, read_documents
from dsgpt.errors import DataError, DsgptError
from dsgpt.tokenizer.encoder import Encoder
from dsgpt.units import format_bytes, format_count, format_seconds

_PLACES, _SAMPLE_BYTES, _MOST_BAD = 16, 256 << 10, 1000
_INDEX_BYTES = 20  # of a document in the .idx


@dataclass(frozen=True)
class Forecast:
    """About what will come. `seconds` is None where the rate could not be measured; `bytes` are those to be written."""

    tokens: int
    bytes: int
    files: int
    seconds: float | None
    parts: int
    engine: str
    free_bytes: int

    def __str__(self) -> str:
        took = "time unknown" if self.seconds is None else f"about {format_seconds(self.seconds)}"
        return (
            f"about {format_count(self.tokens)} tokens, {format_bytes(self.bytes)} in {self.files} files, "
            f"{took}; {self.parts} parts, encoded by {self.engine}"
        )


@dataclass
class _Sample:
    source_bytes: float = 0
    tokens: int = 0
    documents: int = 0
    seconds: float = 0
    bad: BadLine | None = None
    bad_in: str = ""


def forecast(plan: Plan, encoder: Encoder, folder: Path, processes: int) -> Forecast:
    """About what `plan` gives on so many processes.

    Raises DataError where not one of the sampled records can be read: that would fail in the end, after hours. What else
    is wrong with the sources is reported by the work.
    """
    parts = plan.parts
    measured = _Sample()
    settings = Settings.of(plan.settings)
    for place in np.unique(np.linspace(0, len(parts) - 1, _PLACES).astype(int)).tolist():
        _add(measured, _piece_of(parts[place], settings), settings, encoder)
    if measured.bad is not None and not measured.documents and plan.max_bad_fraction < 1:
        raise DataError(
            "not one of the sampled records can be read",
            seen=f"{measured.bad_in}: {measured.bad.reason}",
            do="name another --text-field, or correct the files",
        )
    total = sum(part.num_bytes for part in parts if not part.pieces[0].path.startswith(HUB))
    scale = total / measured.source_bytes if measured.source_bytes else 0
    tokens, documents = round(measured.tokens * scale), round(measured.documents * scale)
    return Forecast(
        tokens=tokens,
        bytes=tokens * np.dtype(plan.dtype).itemsize + documents * _INDEX_BYTES,
        files=len(parts) * (4 if settings.validation else 2),
        seconds=measured.seconds * scale / min(processes, len(parts)) if scale else None,
        parts=len(parts),
        engine=encoder.engine,
        free_bytes=shutil.disk_usage(folder).free,
    )


def _piece_of(part: Part, settings: Settings) -> Piece:
    """A piece of the part to sample: its largest, cut to the size of a sample where files can be cut."""
    piece = max(part.pieces, key=lambda one: one.stop - one.start)
    if can_be_cut(piece.path, settings.documents) and kind_of(piece.path) in (("txt", ""), ("jsonl", "")):
        return Piece(piece.path, piece.start, min(piece.stop, piece.start + _SAMPLE_BYTES))
    return piece


def _add(measured: _Sample, piece: Piece, settings: Settings, encoder: Encoder) -> None:
    if piece.path.startswith(HUB):
        return
    began = time.perf_counter()
    texts: list[bytes] = []
    num_bytes = documents = num_bad = 0
    whole = True
    try:
        for item in read_documents(piece, settings.reading):
            if isinstance(item, LargeDocument):
                texts.append(next(item.chunks()))
                whole = False
            elif isinstance(item, Document):
                texts.append(item.utf8)
            else:
                measured.bad, measured.bad_in = item, piece.path
                num_bad += 1
                if num_bad > _MOST_BAD:
                    break
                continue
            documents += 1
            num_bytes += len(texts[-1])
            if num_bytes >= _SAMPLE_BYTES:
                whole = piece.stop - piece.start <= _SAMPLE_BYTES
                break
    except (DsgptError, OSError, UnicodeDecodeError):
        return
    if not num_bytes:
        return
    tokens = len(encoder.encode_batch(texts)[0])
    measured.seconds += time.perf_counter() - began
    measured.source_bytes += piece.stop - piece.start if whole else _source_bytes(piece, b"".join(texts))
    measured.tokens += tokens + documents * (
        (encoder.tokenizer.bos_id is not None) + (encoder.tokenizer.eos_id is not None)
    )
    measured.documents += documents


def _source_bytes(piece: Piece, text: bytes) -> float:
    """About how many bytes of the file the text takes."""
    kind = kind_of(piece.path)
    if kind is not None and (kind[1] or kind[0] in ("parquet",)):
        return len(zlib.compress(text, 6))
    return len(text)
