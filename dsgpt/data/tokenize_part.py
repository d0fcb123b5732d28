"""Does one part of a preparation: reads its documents, leaves out what is to be left out, encodes, writes its shards.

    record = tokenize_part(part, Job(folder, settings, "uint16", "gigatoken 0.10.0"))       Mismatch where it cannot be trusted
    hash_part(part, job)                                                                    the first pass of --deduplicate

Everything is done in batches of a megabyte, so that memory does not grow with a file. What an engine says is compared
with the reference for a sample of every source, 64 bytes of each at the least and a 4,096th of the text: one difference,
and the part does not count. Trade-off: a part is the least that is done again after a kill, and one process works on it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from dsgpt.data.duplicates import hash_of, hash_of_chunks, read_duplicates, write_hashes
from dsgpt.data.filters import Filters
from dsgpt.data.indexed import IndexedWriter, hash_file
from dsgpt.data.manifest import STATE, TOKENIZER, EngineRecord, Shard, write_durably
from dsgpt.data.parts import TRAIN, VALIDATION, Part, PartRecord, Settings, bad_lines_path, changed, record_path
from dsgpt.data.sources import BadLine, Document, LargeDocument, Piece, first_line_of, read_documents
from dsgpt.data.workers import count
from dsgpt.errors import DataError
from dsgpt.tokenizer.encoder import Encoder, EngineError, enclose_flat
from dsgpt.tokenizer.tokenizer import Tokenizer

_REPORT_EVERY_BYTES = 256 << 10
_BATCH_BYTES, _BATCH_DOCUMENTS = 1 << 20, 4096
_SAMPLED_SHARE, _MIN_SAMPLE, _MAX_SAMPLE = 4096, 64, 32 << 10


@dataclass(frozen=True)
class Job:
    """What all parts of a preparation have in common. `engine` is the name of the one that encodes."""

    folder: Path
    settings: Settings
    dtype: str
    engine: str


@dataclass(frozen=True)
class Mismatch:
    """The engine's ids are not the reference's, or it broke down."""

    reason: str


def share_of(utf8: bytes) -> float:
    """A number in [0, 1) that depends on the text alone: what is below the validation share is set aside."""
    return _share(hashlib.blake2b(utf8, digest_size=8))


def _share(digest: Any) -> float:
    return int.from_bytes(digest.digest(), "big") / 2**64


def engine_for(tokenizer: Tokenizer | str, engine: Literal["auto", "reference"]) -> EngineRecord:
    """Which engine encodes for a tokenizer (or the folder of one) on this machine, and why not the fast one."""
    encoder = Encoder(tokenizer, engine) if isinstance(tokenizer, Tokenizer) else Encoder.load(tokenizer, engine)
    return EngineRecord(name=encoder.engine, fallback=encoder.fallback)


@lru_cache(maxsize=1)
def load_encoder(folder: str, engine: str) -> Encoder:
    """The encoder of a preparation. Raises DataError where this machine has another engine than `engine`."""
    kind: Literal["reference", "auto"] = "reference" if engine.startswith("tokenizers ") else "auto"
    encoder = Encoder.load(folder, kind)
    if encoder.engine != engine:
        raise DataError(
            "the text would be encoded by another engine than the rest of this dataset",
            seen=f"here {encoder.engine} {f'({encoder.fallback})' if encoder.fallback else ''}, the rest by {engine}",
            do="install the same versions of gigatoken and tokenizers, or delete the output folder to begin anew",
        )
    gc.freeze()  # modules and tokenizer are here to stay: not to be looked through again and again
    return encoder


class _Reader:
    """The documents of a part that are not left out by themselves, and counts of the others."""

    def __init__(self, part: Part, settings: Settings, bad_lines: Path | None):
        self.records = self.bad = self.empty = 0
        self.left_out: Counter[str] = Counter()
        self._part, self._settings, self._bad_lines = part, settings, bad_lines

    def __iter__(self) -> Iterator[tuple[Piece, Document | LargeDocument]]:
        filters = self._settings.filters if self._settings.filters.settings() else None
        with BadLineFile(self._bad_lines) as bad:
            for piece in self._part.pieces:
                for item in read_documents(piece, self._settings.reading):
                    self.records += 1
                    if isinstance(item, BadLine):
                        self.bad += 1
                        bad.add(piece, item)
                    elif not (item.num_bytes if isinstance(item, LargeDocument) else item.text):
                        self.empty += 1
                    elif filters is not None and (reason := _reason(filters, item)):
                        self.left_out[reason] += 1
                    else:
                        yield piece, item


class BadLineFile:
    """Writes bad lines as they come: in the wrong kind of file there can be more of them than fit in memory."""

    def __init__(self, path: Path | None):
        self._path = path
        self._temporary = (
            None if path is None else path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        )
        self._stream: TextIO | None = None
        self._before: tuple[Piece, int] | None = None

    def add(self, piece: Piece, bad: BadLine) -> None:
        if self._temporary is None:
            return
        if self._stream is None:
            self._stream = open(self._temporary, "w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        if self._before is None or self._before[0] is not piece:
            self._before = piece, first_line_of(piece)
        line = {"source": piece.path, "line": bad.line + self._before[1], "reason": bad.reason, "text": bad.excerpt}
        self._stream.write(json.dumps(line) + "\n")

    def __enter__(self) -> BadLineFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._stream is None or self._temporary is None or self._path is None:
            return
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink()


def _reason(filters: Filters, item: Document | LargeDocument) -> str:
    if isinstance(item, Document):
        return filters.reason(item.text)
    # Of a text this long the first megabyte is looked at, and all of its length.
    num_chars = sum(len(chunk.decode()) for chunk in item.chunks())
    return filters.reason(next(item.chunks()).decode(), num_chars)


def hash_part(part: Part, job: Job, times: dict[str, int]) -> int:
    """Write the hash of every document of a part; how many there are. `times` as in tokenize_part."""
    hashes, tally = [], Tally(part.num_bytes)
    for _, item in _Reader(part, job.settings, None):
        hashes.append(hash_of_chunks(item.chunks()) if isinstance(item, LargeDocument) else hash_of(item.utf8))
        tally.add(num_bytes=item.num_bytes if isinstance(item, LargeDocument) else len(item.utf8), documents=1)
    tally.close()
    check_times(times)
    write_hashes(job.folder / STATE, part.number, b"".join(hashes))
    return len(hashes)


def tokenize_part(part: Part, job: Job, times: dict[str, int]) -> PartRecord | Mismatch:
    """Tokenise one part into shards below the folder; its record is on disk when this returns.

    `times` are those of the files' last change (ns). Raises DataError where a file is or becomes another one.
    """
    try:
        return _tokenize(part, job, times)
    except EngineError as error:
        return Mismatch(f"part {part.number}, {part.pieces[0].path} and on: {error}")


def _tokenize(part: Part, job: Job, times: dict[str, int]) -> PartRecord | Mismatch:
    encoder = load_encoder(str(job.folder / TOKENIZER), job.engine)
    repeated = read_duplicates(job.folder / STATE, part.number) if job.settings.deduplicate else None
    reader = _Reader(part, job.settings, bad_lines_path(job.folder, part.number))
    duplicates = 0
    hub = hashlib.sha256()
    with Outputs(job.folder, part.number, job.dtype) as outputs:
        work = _Encoding(encoder, outputs, job.settings.validation, Tally(part.num_bytes))
        for number, (piece, item) in enumerate(reader):
            if repeated is not None and repeated[number]:
                duplicates += 1
                continue
            if piece.path.startswith("hf:") and isinstance(item, Document):
                hub.update(item.utf8)
            work.add(piece, item)
        work.flush()
        if difference := encoder.compare(work.samples):
            outputs.discard()
            return Mismatch(f"part {part.number}, {part.pieces[0].path} and on: {difference}")
        work.tally.close(reader.bad)
    record = PartRecord(
        number=part.number,
        engine=job.engine,
        shards=outputs.shards,
        records=reader.records,
        bad_lines=reader.bad,
        empty_documents=reader.empty,
        left_out=dict(sorted(reader.left_out.items())),
        duplicates=duplicates,
        special_in_text=work.special,
        hashes=source_hashes(part, hub.hexdigest()),
    )
    check_times(times)
    write_durably(record_path(job.folder, part.number), record.model_dump_json())
    return record


def check_times(times: dict[str, int]) -> None:
    for path, time in times.items():
        if not path.startswith("hf:") and os.stat(path).st_mtime_ns != time:
            raise changed(path)


def source_hashes(part: Part, hub: str) -> dict[str, str]:
    """sha256 of the files that begin in this part; of a data set of the Hub, `hub`, that of what was read of it."""
    return {
        piece.path: hub if piece.path.startswith("hf:") else hash_file(piece.path)
        for piece in part.pieces
        if piece.start == 0 or piece.path.startswith("hf:")
    }


class _Encoding:
    """Encodes documents in batches, splits them by content, and keeps samples for the comparison."""

    def __init__(self, encoder: Encoder, outputs: Outputs, validation: float, tally: Tally):
        self.samples: list[bytes] = []
        self.special = 0
        self.tally = tally
        self._encoder, self._outputs, self._validation = encoder, outputs, validation
        self._bos_id, self._eos_id = encoder.tokenizer.bos_id, encoder.tokenizer.eos_id
        self._piece: Piece | None = None
        self._texts: list[bytes] = []
        self._num_bytes = 0

    def add(self, piece: Piece, item: Document | LargeDocument) -> None:
        if isinstance(item, LargeDocument):
            self.flush()
            self._add_large(item)
            return
        if piece is not self._piece:
            self._piece = piece
            self._sample(item.utf8, 0)
        self._texts.append(item.utf8)
        self._num_bytes += len(item.utf8)
        if self._num_bytes >= _BATCH_BYTES or len(self._texts) >= _BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        if not self._texts:
            return
        texts, self._texts = self._texts, []
        num_bytes, self._num_bytes = self._num_bytes, 0
        self._sample(max(texts, key=len), num_bytes)
        self.special += sum(map(self._encoder.special_in_text, texts))
        ids, lengths = self._encoder.encode_batch(texts, is_checked=True)
        ids, lengths = enclose_flat(self._outputs.narrowed(ids), lengths, self._bos_id, self._eos_id)
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        if self._validation:
            aside = np.fromiter((share_of(text) < self._validation for text in texts), np.bool_, len(texts))
            of_ids = np.repeat(aside, lengths)
            for split, chosen, tokens in ((TRAIN, ~aside, ids[~of_ids]), (VALIDATION, aside, ids[of_ids])):
                self._outputs.add(split, tokens, lengths[chosen], int(sizes[chosen].sum()))
        else:
            self._outputs.add(TRAIN, ids, lengths, num_bytes)
        self.tally.add(num_bytes=num_bytes, documents=len(texts), tokens=len(ids))

    def _add_large(self, item: LargeDocument) -> None:
        digest = hashlib.blake2b(digest_size=8)
        for chunk in item.chunks():
            digest.update(chunk)
            self._sample(chunk, len(chunk))
        self.special += self._encoder.special_in_chunks(item.chunks())
        split = VALIDATION if _share(digest) < self._validation else TRAIN
        self._outputs.add_long(split, self._parts_of(item), item.num_bytes)
        self.tally.add(documents=1)

    def _parts_of(self, item: LargeDocument) -> Iterator[np.ndarray]:
        if self._bos_id is not None:
            yield np.array([self._bos_id], np.uint32)
        for ids in self._encoder.encode_chunks(item.chunks()):
            self.tally.add(num_bytes=len(ids), tokens=len(ids))  # a token is a byte at the least
            yield ids
        if self._eos_id is not None:
            yield np.array([self._eos_id], np.uint32)

    def _sample(self, utf8: bytes, num_bytes: int) -> None:
        """Keep a slice of a text, in the size that `num_bytes` of text call for, from somewhere inside."""
        size = min(_MAX_SAMPLE, max(_MIN_SAMPLE, num_bytes // _SAMPLED_SHARE))
        start = 7919 * len(self.samples) % max(1, len(utf8) - size)
        self.samples.append(utf8[start : start + size].decode("utf-8", "ignore").encode())


class Outputs:
    """One writer for each split that turns out to have documents; leaving with an error drops what was written."""

    def __init__(self, folder: Path, number: int, dtype: str):
        self.shards: dict[str, Shard] = {}
        self._folder, self._number, self._dtype = folder, number, dtype
        self._writers: dict[str, IndexedWriter] = {}
        self._text_bytes = {TRAIN: 0, VALIDATION: 0}

    def add(self, split: str, ids: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        if len(lengths):
            self._writer(split).add_documents(ids, lengths)
            self._text_bytes[split] += text_bytes

    def narrowed(self, ids: np.ndarray) -> np.ndarray:
        """In the dtype of the shards, early: what comes after handles half the bytes. Ids that do not fit stay and fail."""
        return ids.astype(self._dtype) if ids.size and int(ids.max()) <= np.iinfo(self._dtype).max else ids

    def add_long(self, split: str, parts: Iterator[np.ndarray], text_bytes: int) -> None:
        self._writer(split).add_long_document(parts)
        self._text_bytes[split] += text_bytes

    def _writer(self, split: str) -> IndexedWriter:
        if split not in self._writers:
            prefix = self._folder / self._name(split)
            self._writers[split] = IndexedWriter(prefix, self._dtype, scratch=self._folder / STATE)
        return self._writers[split]

    def _name(self, split: str) -> str:
        return f"{split}-{self._number:05d}"

    def discard(self) -> None:
        while self._writers:
            self._writers.popitem()[1].discard()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.discard()
        for split, writer in self._writers.items():
            writer.finish()
            self.shards[split] = Shard(
                path=self._name(split),
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                text_bytes=self._text_bytes[split],
                sha256_bin=writer.sha256_bin,
                sha256_idx=writer.sha256_idx,
            )


class Tally:
    """Passes counts on to the progress display, not for every document but for every quarter of a megabyte.

    Text is shorter than the file it stands in, or longer where that is compressed; what is told stays below the size of
    the part, and `close` makes the sum equal to it.
    """

    def __init__(self, part_bytes: int):
        self._left = part_bytes
        self._pending = dict.fromkeys(("num_bytes", "documents", "tokens", "bad_lines"), 0)

    def add(self, num_bytes: int = 0, documents: int = 0, tokens: int = 0) -> None:
        pending = self._pending
        pending["num_bytes"] += num_bytes
        pending["documents"] += documents
        pending["tokens"] += tokens
        if pending["num_bytes"] >= _REPORT_EVERY_BYTES:
            self._flush()

    def close(self, bad_lines: int = 0) -> None:
        self._pending |= {"num_bytes": self._left, "bad_lines": bad_lines}
        self._flush()

    def _flush(self) -> None:
        self._pending["num_bytes"] = min(self._left, self._pending["num_bytes"])
        self._left -= self._pending["num_bytes"]
        count(**self._pending)
        self._pending = dict.fromkeys(self._pending, 0)
