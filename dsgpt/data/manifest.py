"""dataset.json: what a dataset folder holds, by count and by hash. Written last, so where it exists all is there.

    manifest = load_manifest("data/web"); manifest.splits["train"].tokens

Needs pydantic only, so that planning on a login node can read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dsgpt.errors import DataError

FILE_NAME = "dataset.json"
STATE, TOKENIZER = ".prepare", "tokenizer"  # folders beside it: of an unfinished preparation, and what made the ids
FORMAT_VERSION = 1
EMPTY_HASH = hashlib.sha256().hexdigest()


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _stay_inside(path: str) -> str:
    """A dataset of somebody else must not lead out of its folder."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"the path leaves the dataset folder: {path}")
    return path


_Inside = Annotated[str, AfterValidator(_stay_inside)]


class TokenizerRecord(_Frozen):
    """The tokenizer whose ids the shards hold; `path` is its copy, relative to the dataset folder."""

    path: _Inside
    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None


class Shard(_Frozen):
    """One .bin/.idx pair; `path` is its prefix relative to the dataset folder."""

    path: _Inside
    documents: int
    tokens: int
    text_bytes: int
    sha256_bin: str
    sha256_idx: str
    # Of chat data only: PREFIX.mask holds one byte per token, 1 where the token is learned from.
    sha256_mask: str | None = None
    trained_tokens: int | None = None


class Split(_Frozen):
    """The shards of one split in stream order, and their sums. `text_bytes` is the UTF-8 text before tokenising."""

    documents: int
    tokens: int
    text_bytes: int
    shards: list[Shard]

    @classmethod
    def of(cls, shards: list[Shard]) -> Split:
        return cls(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=shards,
        )


class SourceFile(_Frozen):
    """An input. `sha256` is that of the file; of a data set of the Hub, of the texts (`joined_hash` of its parts')."""

    path: str
    bytes: int
    sha256: str


class EngineRecord(_Frozen):
    """What encoded the text: "gigatoken 0.10.0" or "tokenizers 0.22.1", and why it was not the fast one ("" where it was)."""

    name: str
    fallback: str = ""


class BadLines(_Frozen):
    """Records that could not be read. `file`, relative to the dataset folder, names each; None where there are none."""

    count: int
    file: str | None


class DatasetManifest(_Frozen):
    """All of dataset.json. `settings` are the choices that shaped the documents; `empty_documents` had no text.

    What has a default was added later: files without it are read. `left_out` counts documents by the filter that refused
    them, `duplicates` exact repetitions, `special_in_text` texts of special tokens that were encoded as plain text.
    """

    format_version: int
    tokenizer: TokenizerRecord
    dtype: str
    splits: dict[str, Split]
    sources: list[SourceFile]
    settings: dict[str, Any]
    bad_lines: BadLines
    empty_documents: int
    fingerprint: str
    kind: Literal["text", "chat"] = "text"
    left_out: dict[str, int] = Field(default_factory=dict)
    duplicates: int = 0
    special_in_text: int = 0
    engine: EngineRecord | None = None


def joined_hash(digests: Sequence[str]) -> str:
    """One hash for several; of one, that hash itself."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def fingerprint_of(tokenizer_sha256: str, splits: dict[str, Split]) -> str:
    """Identifies the token streams: equal fingerprints mean the same ids in the same order, wherever they lie."""
    shards = {name: [_hashes(shard) for shard in split.shards] for name, split in sorted(splits.items())}
    return hashlib.sha256(json.dumps([tokenizer_sha256, shards]).encode()).hexdigest()


def _hashes(shard: Shard) -> list[str]:
    return [digest for digest in (shard.sha256_bin, shard.sha256_idx, shard.sha256_mask) if digest is not None]


def load_manifest(folder: str | Path) -> DatasetManifest:
    """Read folder/dataset.json. Raises DataError where it is missing, damaged or of a later format."""
    path = Path(folder) / FILE_NAME
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        state = "the folder exists" if Path(folder).is_dir() else "there is no such folder"
        raise DataError(
            f"{folder} holds no finished dataset",
            seen=f"{state}, {FILE_NAME} is missing",
            do="if it was moved, data.root=FOLDER; else make it, or continue an interrupted run, with: "
            f"dsgpt data prepare INPUT... --tokenizer DIR --output {folder}",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read", seen=str(error), do="prepare the dataset again") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has a format this dsgpt does not know",
            seen=f"format_version {version!r}, known: {FORMAT_VERSION}",
            do="update dsgpt, or prepare the dataset again",
        )
    try:
        return DatasetManifest.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path} is damaged", seen=str(error), do="prepare the dataset again") from error


def save_manifest(folder: str | Path, manifest: DatasetManifest) -> None:
    """Write folder/dataset.json so that it is either absent or complete."""
    write_durably(Path(folder) / FILE_NAME, json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False) + "\n")


def write_durably(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step that survives a crash: temporary name, fsync, rename, fsync of folder."""
    write_bytes_durably(path, text.encode("utf-8"))


def write_bytes_durably(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
