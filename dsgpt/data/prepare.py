"""Tokenises text files into a dataset folder, in parallel, restartable at any instant.

    dsgpt data prepare corpus/ --tokenizer tokenizers/bpe32k --output data/corpus --workers 16 --validation 0.5%

    output/
      dataset.json                       written last: where it exists, all is there
      train-00000.bin .idx, ...          one pair for each part and split that has documents
      tokenizer/                         a copy of the tokenizer
      bad_lines.jsonl                    what could not be read, with source, line and reason (only where there is any)
      .prepare/                          the plan and one record for each finished part; gone at the end

The sorted list of sources alone decides the parts, and content alone decides what is set aside for validation. So the
output is the same, byte for byte, for any number of workers and any number of restarts; a part whose record exists is
not done again. Trade-off: each source is read twice, first to hash it. The hash costs a few percent of tokenising, and
it makes "the same input" a fact and not a guess from names and times.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dsgpt.data import manifest as manifests
from dsgpt.data.indexed import dtype_for, hash_file
from dsgpt.data.manifest import BadLines, DatasetManifest, SourceFile, Split, TokenizerRecord
from dsgpt.data.parts import (
    STATE,
    TOKENIZER,
    Part,
    PartRecord,
    Settings,
    bad_lines_path,
    plan_parts,
    record_path,
    run_part,
)
from dsgpt.data.sources import DOCUMENTS, Documents, find_sources
from dsgpt.data.workers import Counts, Pool
from dsgpt.errors import ConfigError, DataError, DsgptError, LockedError
from dsgpt.tokenizer.tokenizer import Tokenizer

BAD_LINES = "bad_lines.jsonl"


@dataclass(frozen=True)
class Progress:
    """How far a preparation is. `done` includes what an earlier start finished, `resumed_bytes` of it."""

    phase: Literal["hash", "tokenize"]
    total_bytes: int
    done: Counts
    resumed_bytes: int = 0


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    workers: int = 1,
    validation: float = 0.0,
    text_field: str = "text",
    documents: Documents = "file",
    max_bad_fraction: float = 0.001,
    progress: Callable[[Progress], None] | None = None,
) -> DatasetManifest:
    """Make the dataset `output` from `inputs` (files, folders, globs of .txt and .jsonl) and return its manifest.

    workers           processes that read and tokenise; 1 works in this process
    validation        share of the documents, in [0, 1), set aside as the split "validation" by the hash of their text
    text_field        the field of a .jsonl record that holds the text
    documents         what is a document in a .txt file: the file, what blank lines separate, or each line
    max_bad_fraction  highest share of records that may be unreadable

    A folder that already holds the finished dataset of the same content, tokenizer and settings is returned as it is.
    Raises DataError (sources, too many bad records, a folder that holds something else), ConfigError (arguments),
    LockedError (no write access, or another process is at work there), DsgptError (disk full, a worker killed).
    """
    _check_arguments(workers, validation, documents, max_bad_fraction)
    report = progress or (lambda _: None)
    paths = find_sources(inputs, exclude=output)
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    folder = Path(output)
    settings = Settings(text_field, documents, validation)
    with _locked(folder), Pool(workers) as pool:
        sources = _hash_sources(paths, workers, report)
        plan = _plan(sources, loaded, settings)
        if (folder / manifests.FILE_NAME).exists():
            return _already_there(folder, plan)
        _adopt_plan(folder, plan, loaded)
        parts = plan_parts([(source.path, source.bytes) for source in sources], documents)
        records = _run_parts(folder, parts, settings, dtype_for(loaded.vocab_size).name, pool, report)
        _check_records(folder, records, max_bad_fraction)
        return _finish(folder, loaded, sources, settings, records)


def _check_arguments(workers: int, validation: float, documents: str, max_bad_fraction: float) -> None:
    if workers < 1:
        raise ConfigError("workers must be at least 1", seen=str(workers), do="give the number of processes")
    if not 0 <= validation < 1:
        raise ConfigError("validation is a share in [0, 1)", seen=str(validation), do="e.g. 0.005 for half a percent")
    if documents not in DOCUMENTS:
        raise ConfigError("documents is not known", seen=repr(documents), do=f"one of {', '.join(DOCUMENTS)}")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError("max_bad_fraction is a share in [0, 1]", seen=str(max_bad_fraction), do="e.g. 0.001")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold output/.prepare/lock; the kernel lets go of it when this process ends, however it ends."""
    state = folder / STATE
    try:
        ours = state.exists() or (folder / manifests.FILE_NAME).exists()
        if not ours and folder.exists() and any(folder.iterdir()):
            raise DataError(
                "the output folder holds other files", seen=str(folder), do="choose a new or empty --output"
            )
        state.mkdir(parents=True, exist_ok=True)
        lock = open(state / "lock", "w")  # noqa: SIM115 (held by the with block below)
    except OSError as error:
        raise LockedError(
            "the output folder cannot be written", seen=str(error), do="choose another --output, or change its owner"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LockedError(
                "another process is preparing into this folder", seen=str(folder), do="wait for it, or stop it first"
            ) from error
        try:
            yield
        finally:
            if (folder / manifests.FILE_NAME).exists():
                shutil.rmtree(state)


def _hash_sources(paths: Sequence[Path], workers: int, report: Callable[[Progress], None]) -> list[SourceFile]:
    sizes = [path.stat().st_size for path in paths]
    total, done = sum(sizes), 0
    if total == 0:
        raise DataError("all inputs are empty", seen=", ".join(map(str, paths[:5])), do="name files that hold text")
    sources = []
    # Threads, because hashing does not hold the interpreter lock and starting processes takes longer than most hashes.
    try:
        with ThreadPoolExecutor(workers) as threads:
            for path, size, digest in zip(paths, sizes, threads.map(hash_file, paths), strict=True):
                sources.append(SourceFile(path=str(path), bytes=size, sha256=digest))
                done += size
                report(Progress("hash", total, Counts(num_bytes=done)))
    except OSError as error:
        raise DataError("an input cannot be read", seen=str(error), do="check its permissions") from error
    return sources


def _plan(sources: list[SourceFile], tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """What decides the output bytes: content and order of the sources, tokenizer, settings."""
    return {
        "format_version": manifests.FORMAT_VERSION,
        "sources": [[source.bytes, source.sha256] for source in sources],
        "tokenizer": [tokenizer.sha256, tokenizer.bos_id, tokenizer.eos_id],
        "settings": asdict(settings),
    }


def _already_there(folder: Path, plan: dict[str, Any]) -> DatasetManifest:
    found = manifests.load_manifest(folder)
    existing = {
        "format_version": found.format_version,
        "sources": [[source.bytes, source.sha256] for source in found.sources],
        "tokenizer": [found.tokenizer.sha256, found.tokenizer.bos_id, found.tokenizer.eos_id],
        "settings": found.settings,
    }
    _refuse_other(folder, existing, plan, "a finished dataset")
    return found


def _adopt_plan(folder: Path, plan: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Continue the preparation this folder began, or begin one."""
    path = folder / STATE / "plan.json"
    if path.exists():
        _refuse_other(folder, json.loads(path.read_text("utf-8")), plan, "an unfinished dataset")
        for leftover in path.parent.glob("*.tmp*"):
            leftover.unlink()
    tokenizer.save(folder / TOKENIZER)
    manifests.write_durably(path, json.dumps(plan))


def _refuse_other(folder: Path, existing: dict[str, Any], plan: dict[str, Any], kind: str) -> None:
    different = [key for key in plan if existing.get(key) != plan[key]]
    if different:
        raise DataError(
            f"the output folder holds {kind} made from something else",
            seen=f"{folder}: different {', '.join(different)}",
            do="choose another --output, or delete the folder to make it anew",
        )


def _run_parts(
    folder: Path, parts: list[Part], settings: Settings, dtype: str, pool: Pool, report: Callable[[Progress], None]
) -> list[PartRecord]:
    """One record for each part, in the order of the parts."""
    records: dict[int, PartRecord] = {}
    for part in parts:
        if (path := record_path(folder, part.number)).exists():
            records[part.number] = PartRecord.model_validate_json(path.read_text("utf-8"))
    total_bytes = sum(part.num_bytes for part in parts)
    earlier = Counts(
        num_bytes=sum(part.num_bytes for part in parts if part.number in records),
        documents=sum(record.documents for record in records.values()),
        tokens=sum(record.tokens for record in records.values()),
        bad_lines=sum(record.bad_lines for record in records.values()),
    )

    def tell(counts: Counts) -> None:
        report(Progress("tokenize", total_bytes, earlier + counts, earlier.num_bytes))

    todo = [(part, folder, settings, dtype) for part in parts if part.number not in records]
    try:
        for record in pool.run(run_part, todo, tell):
            records[record.number] = record
    except OSError as error:
        raise DsgptError(
            "reading or writing failed half way",
            seen=str(error),
            do=f"make room or repair what is named, then run the same command again; {len(records)} of {len(parts)} "
            "parts are finished and kept",
        ) from error
    return [records[part.number] for part in parts]


def _check_records(folder: Path, records: list[PartRecord], max_bad_fraction: float) -> None:
    num_records = sum(record.records for record in records)
    num_bad = sum(record.bad_lines for record in records)
    if num_bad > max_bad_fraction * num_records:
        _join_bad_lines(folder, records)
        first = json.loads((folder / BAD_LINES).read_text("utf-8").split("\n", 1)[0])
        raise DataError(
            f"{num_bad} of {num_records} records cannot be read: more than max_bad_fraction = {max_bad_fraction:g}",
            seen=f"{first['source']}:{first['line']}: {first['reason']}",
            do=f"all are listed in {folder / BAD_LINES}; correct them, or accept them with --max-bad-fraction",
        )
    if not any("train" in record.shards for record in records):
        raise DataError(
            "no document is left to train on",
            seen=f"{num_records} records, {sum(record.empty_documents for record in records)} of them without text",
            do="name more text, or set aside a smaller share for validation",
        )


def _join_bad_lines(folder: Path, records: list[PartRecord]) -> None:
    lines = [bad_lines_path(folder, record.number).read_text("utf-8") for record in records if record.bad_lines]
    manifests.write_durably(folder / BAD_LINES, "".join(lines))


def _finish(
    folder: Path,
    tokenizer: Tokenizer,
    sources: list[SourceFile],
    settings: Settings,
    records: list[PartRecord],
) -> DatasetManifest:
    """Write dataset.json, the last file."""
    num_bad = sum(record.bad_lines for record in records)
    if num_bad:
        _join_bad_lines(folder, records)
    shards = {name: [r.shards[name] for r in records if name in r.shards] for name in ("train", "validation")}
    splits = {name: Split.of(found) for name, found in shards.items() if found}
    manifest = DatasetManifest(
        format_version=manifests.FORMAT_VERSION,
        tokenizer=TokenizerRecord(
            path=TOKENIZER,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
        ),
        dtype=dtype_for(tokenizer.vocab_size).name,
        splits=splits,
        sources=sources,
        settings=asdict(settings),
        bad_lines=BadLines(count=num_bad, file=BAD_LINES if num_bad else None),
        empty_documents=sum(record.empty_documents for record in records),
        fingerprint=manifests.fingerprint_of(tokenizer.sha256, splits),
    )
    manifests.save_manifest(folder, manifest)
    return manifest
