"""Training from the .bin/.idx files of Megatron-LM, GPT-NeoX and NeMo as they are, without a dataset.json.

    manifest = find_manifest("their/corpus_text_document")     # a prefix, or a folder of such files

What dataset.json would say is put together from the files themselves: counts from the headers, an identity from sizes and
content, one split "train" of all of it. They do not say which tokenizer made them nor how many bytes their text had:
ids are compared with the vocabulary as they are read, the tokenizer is the reader's word (tokenizer.path), and there are
no bits per byte.

Trade-off: the identity hashes files up to 1 MiB whole, and of larger ones 16 pieces spread evenly with the sizes. It tells
one corpus from another within a second, whatever their size; a few bytes changed in between are not seen.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from dsgpt.data.indexed import HEADER_BYTES, bin_path, idx_path, parse_header
from dsgpt.data.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    STATE,
    TOKENIZER,
    BadLines,
    DatasetManifest,
    Shard,
    Split,
    TokenizerRecord,
    fingerprint_of,
    load_manifest,
)
from dsgpt.errors import DataError

UNKNOWN = "unknown"  # the hash of a tokenizer that nothing is known of
_PIECE, _PIECES = 64 << 10, 16


def find_manifest(path: str | Path) -> DatasetManifest:
    """Of a folder with a dataset.json that file; of files of others what stands in for it. Raises DataError."""
    path = Path(path)
    prefixes = _prefixes(path)
    return _manifest_of(path, prefixes) if prefixes else load_manifest(path)


def is_foreign(manifest: DatasetManifest) -> bool:
    """Whether the tokenizer of these ids is not known."""
    return manifest.tokenizer.sha256 == UNKNOWN


def _prefixes(path: Path) -> list[Path]:
    """What `path` names that is not dsgpt's: one prefix, or those in a folder; none where dataset.json has the word."""
    if path.is_dir():
        # A folder of dsgpt that is not finished, or not copied whole, holds such files too: not all, or validation data.
        if any((path / name).exists() for name in (FILE_NAME, STATE, TOKENIZER)):
            return []
        return sorted(one.with_suffix("") for one in path.glob("*.idx"))
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return [stem] if idx_path(stem).exists() else []


def _manifest_of(path: Path, prefixes: list[Path]) -> DatasetManifest:
    found = [_shard(prefix) for prefix in prefixes]
    kinds = sorted({dtype.name for dtype, _ in found})
    if len(kinds) > 1:
        raise DataError(
            "the files of one source hold ids of different types",
            seen=f"{path}: {', '.join(kinds)}",
            do="name each prefix as a source of its own under data.train",
        )
    splits = {"train": Split.of([shard for _, shard in found])}
    return DatasetManifest(
        format_version=FORMAT_VERSION,
        tokenizer=TokenizerRecord(path="", sha256=UNKNOWN, vocab_size=0, bos_id=None, eos_id=None),
        dtype=kinds[0],
        splits=splits,
        sources=[],
        settings={},
        bad_lines=BadLines(count=0, file=None),
        empty_documents=0,
        fingerprint=fingerprint_of(UNKNOWN, splits),
    )


def base_folder(path: Path) -> Path:
    """The folder that the shards of a source are named in."""
    return path if path.is_dir() else path.parent


def _shard(prefix: Path) -> tuple[np.dtype, Shard]:
    try:
        size = idx_path(prefix).stat().st_size
        with open(idx_path(prefix), "rb") as stream:
            dtype, _, num_edges = parse_header(idx_path(prefix), stream.read(HEADER_BYTES), size)
        shard = Shard(
            path=prefix.name,
            documents=max(0, num_edges - 1),
            tokens=bin_path(prefix).stat().st_size // dtype.itemsize,
            text_bytes=0,
            sha256_bin=_identity(bin_path(prefix)),
            sha256_idx=_identity(idx_path(prefix)),
        )
    except OSError as error:
        raise DataError(
            "a shard cannot be read", seen=str(error), do="both PREFIX.bin and PREFIX.idx are needed"
        ) from error
    return dtype, shard


def _identity(path: Path) -> str:
    """A hash of a file's size and content, in bounded time."""
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(f"pieces/1 {size}".encode())
        if size <= _PIECE * _PIECES:
            digest.update(stream.read())
            return digest.hexdigest()
        for number in range(_PIECES):
            stream.seek((size - _PIECE) * number // (_PIECES - 1))
            digest.update(stream.read(_PIECE))
    return digest.hexdigest()
