"""Puts the finished parts of a preparation together: dataset.json, and bad_lines.jsonl where there are any.

    dsgpt data finish data/corpus

Only records are read, never the shards, so it takes seconds whatever the size. Any number of tasks may do it at once: all
write the same bytes, by rename.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dsgpt.data import manifest as manifests
from dsgpt.data.manifest import STATE, TOKENIZER, BadLines, DatasetManifest, SourceFile, Split, TokenizerRecord
from dsgpt.data.parts import TRAIN, VALIDATION, PartRecord, bad_lines_path, load_record
from dsgpt.data.plan import Plan, current_engine, hashes_of, load_plan
from dsgpt.errors import DataError

BAD_LINES = "bad_lines.jsonl"


def finish(output: str | Path) -> DatasetManifest:
    """Write dataset.json for a folder whose parts are all done. Raises DataError that names those that are missing."""
    folder = Path(output)
    if (folder / manifests.FILE_NAME).exists():
        return manifests.load_manifest(folder)
    plan = load_plan(folder)
    if missing := missing_parts(folder, plan):
        raise DataError(
            f"{len(missing)} of {len(plan.parts)} parts are missing",
            seen=f"{folder}: parts {', '.join(map(str, missing[:20]))}{' ...' if len(missing) > 20 else ''}",
            do=f"run: {plan.command_for(missing)}",
        )
    manifest = write_dataset(folder, plan)
    shutil.rmtree(folder / STATE, ignore_errors=True)
    return manifest


def missing_parts(folder: Path, plan: Plan) -> list[int]:
    """Numbers of the parts without a record by the engine that is in use."""
    engine = current_engine(folder, plan).name
    return [part.number for part in plan.parts if load_record(folder, part.number, engine) is None]


def write_dataset(folder: Path, plan: Plan) -> DatasetManifest:
    """Check all records and write dataset.json, the last file. Raises DataError as `prepare`."""
    engine = current_engine(folder, plan)
    found = [load_record(folder, part.number, engine.name) for part in plan.parts]
    records = [record for record in found if record is not None]
    num_bad = _check(folder, records, plan.max_bad_fraction)
    listed = num_bad or any(bad_lines_path(folder, record.number).exists() for record in records if record.left_out)
    if listed:
        _join_bad_lines(folder, records)
    shards = {name: [r.shards[name] for r in records if name in r.shards] for name in (TRAIN, VALIDATION)}
    splits = {name: Split.of(found) for name, found in shards.items() if found}
    hashes = hashes_of(plan, records)
    sha256, bos_id, eos_id = plan.tokenizer
    manifest = DatasetManifest(
        format_version=manifests.FORMAT_VERSION,
        tokenizer=TokenizerRecord(
            path=TOKENIZER, sha256=sha256, vocab_size=plan.vocab_size, bos_id=bos_id, eos_id=eos_id
        ),
        dtype=plan.dtype,
        splits=splits,
        sources=[
            SourceFile(path=source.path, bytes=source.bytes, sha256=hashes.get(source.path, manifests.EMPTY_HASH))
            for source in plan.sources
        ],
        settings=plan.settings,
        bad_lines=BadLines(count=num_bad, file=BAD_LINES if listed else None),
        empty_documents=sum(record.empty_documents for record in records),
        fingerprint=manifests.fingerprint_of(sha256, splits),
        left_out=dict(sorted(sum((Counter(record.left_out) for record in records), Counter()).items())),
        duplicates=sum(record.duplicates for record in records),
        special_in_text=sum(record.special_in_text for record in records),
        engine=engine,
        kind=plan.kind,
    )
    manifests.save_manifest(folder, manifest)
    return manifest


def _check(folder: Path, records: list[PartRecord], max_bad_fraction: float) -> int:
    """The number of bad records, where it is not too high and something is left to train on."""
    num_records = sum(record.records for record in records)
    num_bad = sum(record.bad_lines for record in records)
    if num_bad > max_bad_fraction * num_records:
        _join_bad_lines(folder, records)
        with open(folder / BAD_LINES, encoding="utf-8") as stream:
            first = json.loads(stream.readline())
        raise DataError(
            f"{num_bad} of {num_records} records cannot be read: more than max_bad_fraction = {max_bad_fraction:g}",
            seen=f"{first['source']}:{first['line']}: {first['reason']}",
            do=f"all are listed in {folder / BAD_LINES}; correct them, or accept them with --max-bad-fraction",
        )
    if not any(TRAIN in record.shards for record in records):
        left_out = sum(sum(record.left_out.values()) + record.duplicates for record in records)
        empty = sum(record.empty_documents for record in records)
        raise DataError(
            "no document is left to train on",
            seen=f"{num_records} records, {empty} of them without text, {left_out} left out",
            do="name more text, leave out less, or set aside a smaller share for validation",
        )
    return num_bad


def _join_bad_lines(folder: Path, records: Iterable[PartRecord]) -> None:
    temporary = folder / STATE / f"{BAD_LINES}.{socket.gethostname()}.{os.getpid()}.tmp"
    with open(temporary, "wb") as joined:
        for record in records:
            if record.bad_lines or (record.left_out and bad_lines_path(folder, record.number).exists()):
                with open(bad_lines_path(folder, record.number), "rb") as one:
                    shutil.copyfileobj(one, joined)
        joined.flush()
        os.fsync(joined.fileno())
    os.replace(temporary, folder / BAD_LINES)
