"""What a preparation is to do, on disk, so that every restart and every task of a job array does the same.

    plan = make_plan(paths, tokenizer, settings, ...)
    plan = adopt_plan(folder, plan, tokenizer)        writes it, or continues the one that is there if it is the same
    plan = load_plan(folder)                          what `dsgpt data finish` knows

Sources are known by path, size and time of change, so that nothing has to be read before the work starts; their hashes
come with the parts. A source whose time has changed is read and compared by hash where that is known already, and refused
where it is not. Trade-off: one list of all sources, about 100 bytes each; a million of files are 100 MB, read by each task.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dsgpt.data import manifest as manifests
from dsgpt.data.duplicates import hashes_path
from dsgpt.data.indexed import dtype_for, hash_file
from dsgpt.data.manifest import STATE, TOKENIZER, EngineRecord
from dsgpt.data.parts import Part, PartRecord, Source, changed, load_record, plan_parts
from dsgpt.errors import DataError
from dsgpt.process import write_once
from dsgpt.tokenizer.tokenizer import Tokenizer


class Plan(BaseModel):
    """`tokenizer` is (hash, BOS, EOS); `command` repeats the preparation, without what chooses parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int
    sources: list[Source]
    tokenizer: tuple[str, int | None, int | None]
    vocab_size: int
    settings: dict[str, Any]
    engine: EngineRecord
    max_bad_fraction: float
    command: list[str]
    kind: Literal["text", "chat"] = "text"

    @property
    def parts(self) -> list[Part]:
        sources = [(source.path, source.stop) for source in self.sources]
        return plan_parts(sources, self.settings.get("documents", "file"))

    @property
    def dtype(self) -> str:
        return dtype_for(self.vocab_size).name

    def times_of(self, part: Part) -> dict[str, int]:
        """When the files of a part were changed last, in nanoseconds."""
        return {piece.path: self._times[piece.path] for piece in part.pieces}

    @cached_property
    def _times(self) -> dict[str, int]:
        return {source.path: source.mtime_ns for source in self.sources}

    def command_for(self, parts: Sequence[int]) -> str:
        return shlex.join([*self.command, "--parts", ",".join(map(str, parts))])


def plan_path(folder: Path) -> Path:
    return folder / STATE / "plan.json"


def load_plan(folder: Path) -> Plan:
    """Raises DataError where no preparation was begun."""
    try:
        return Plan.model_validate_json(plan_path(folder).read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(
            "nothing was begun here that could be finished", seen=f"no {plan_path(folder)}", do="run dsgpt data prepare"
        ) from None
    except ValidationError as error:
        raise DataError(
            "the plan of this preparation is damaged or of another version of dsgpt",
            seen=f"{plan_path(folder)}: {error}",
            do="delete the folder, and prepare it anew",
        ) from error


def adopt_plan(folder: Path, plan: Plan, tokenizer: Tokenizer) -> Plan:
    """Begin this preparation, or continue the one the folder holds. Raises DataError where that is another one."""
    if not plan_path(folder).exists():
        _save_tokenizer(folder, tokenizer)
        if write_once(plan_path(folder), plan.model_dump_json()):
            return plan
    found = load_plan(folder)
    seen = [[source.path, source.bytes, source.stop] for source in found.sources]
    existing = description(found.format_version, seen, list(found.tokenizer), found.settings)
    refuse_other(folder, existing, describe(plan), "an unfinished dataset")
    _refuse_changed(folder, found, plan)
    continued = found.model_copy(update={"sources": plan.sources, "max_bad_fraction": plan.max_bad_fraction})
    if continued != found:
        manifests.write_durably(plan_path(folder), continued.model_dump_json())
    return continued


def _save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Put the tokenizer's copy there whole, whichever of several tasks comes first."""
    made = folder / STATE / f"{TOKENIZER}.{socket.gethostname()}.{os.getpid()}.tmp"
    shutil.rmtree(made, ignore_errors=True)
    tokenizer.save(made)
    try:
        os.rename(made, folder / TOKENIZER)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if Tokenizer.load(folder / TOKENIZER).sha256 != tokenizer.sha256:
            do = "choose another --output, or delete the folder"
            raise DataError("the output folder holds another tokenizer", seen=str(folder / TOKENIZER), do=do) from None


def describe(plan: Plan) -> dict[str, Any]:
    """What decides the output bytes: the sources, in their order, tokenizer, settings."""
    sources = [[source.path, source.bytes, source.stop] for source in plan.sources]
    return description(plan.format_version, sources, list(plan.tokenizer), plan.settings)


def description(version: int, sources: list[Any], tokenizer: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {"format_version": version, "sources": sources, "tokenizer": tokenizer, "settings": settings}


def refuse_other(folder: Path, existing: dict[str, Any], wanted: dict[str, Any], kind: str) -> None:
    different = [key for key in wanted if existing.get(key) != wanted[key]]
    if different:
        raise DataError(
            f"the output folder holds {kind} made from something else",
            seen=f"{folder}: different {', '.join(different)}",
            do="choose another --output, or delete the folder to make it anew",
        )


def _refuse_changed(folder: Path, found: Plan, plan: Plan) -> None:
    """A source that was written to since the plan was made must still be what the finished parts were made from."""
    touched = {new.path for old, new in zip(found.sources, plan.sources, strict=True) if old.mtime_ns != new.mtime_ns}
    if not touched:
        return
    hashed = {
        piece.path for part in found.parts if hashes_path(folder / STATE, part.number).exists() for piece in part.pieces
    }
    if hashed & touched:
        raise changed(min(hashed & touched))
    engine = current_engine(folder, found).name
    records = [(part, load_record(folder, part.number, engine)) for part in found.parts]
    used = {piece.path for part, record in records if record for piece in part.pieces} & touched
    hashes = {path: digest for _, record in records if record for path, digest in record.hashes.items()}
    for path in sorted(used):
        if path not in hashes or hash_file(path) != hashes[path]:
            raise changed(path)


def current_engine(folder: Path, plan: Plan) -> EngineRecord:
    """The planned engine, or the reference once the other was seen to differ from it."""
    try:
        return EngineRecord.model_validate(json.loads(_engine_path(folder).read_text("utf-8")))
    except FileNotFoundError:
        return plan.engine


def fall_back(folder: Path, engine: EngineRecord) -> None:
    """From now on this engine encodes; parts of another one no longer count. Of several tasks the first one says why."""
    write_once(_engine_path(folder), engine.model_dump_json())


def _engine_path(folder: Path) -> Path:
    return folder / STATE / "engine.json"


def hashes_of(plan: Plan, records: Sequence[PartRecord]) -> dict[str, str]:
    """The hash of every source, from what the parts recorded."""
    found: dict[str, list[str]] = {}
    for record in records:
        for path, digest in record.hashes.items():
            found.setdefault(path, []).append(digest)
    return {path: manifests.joined_hash(digests) for path, digests in found.items()}
