"""Re-checks a dataset folder against its dataset.json.

    dsgpt data verify data/corpus       every hash, count, id and mask; reads all shards once

Trade-off: verify reports every problem it can find instead of stopping at the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dsgpt.data.indexed import IndexedReader, bin_path, hash_file, idx_path, mask_path
from dsgpt.data.manifest import DatasetManifest, Shard, Split, fingerprint_of, load_manifest
from dsgpt.errors import DataError, Problem
from dsgpt.tokenizer.tokenizer import Tokenizer

_REMEDY = "restore the file from a copy, or prepare the dataset again"
_IDS_AT_ONCE = 1 << 24


def verify_dataset(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Everything that is wrong with the dataset; empty if it is sound. `progress` gets (bytes checked, bytes in all).

    Checked: dataset.json, the tokenizer's copy, size, hash and counts of each shard, ids below the vocabulary size, the
    sums and the fingerprint. Raises DataError where there is no dataset.json to check against.
    """
    manifest = load_manifest(folder)
    root = Path(folder)
    problems = list(_check_tokenizer(root, manifest)) + list(_check_sums(manifest))
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    total, done = sum(shard.tokens for shard in shards) * np.dtype(manifest.dtype).itemsize, 0
    for shard in shards:
        problems += _check_shard(root, manifest, shard)
        done += shard.tokens * np.dtype(manifest.dtype).itemsize
        if progress:
            progress(done, total)
    return problems


def _check_tokenizer(root: Path, manifest: DatasetManifest) -> Iterator[Problem]:
    recorded = manifest.tokenizer
    try:
        found = Tokenizer.load(root / recorded.path)
    except DataError as error:
        yield from error.problems
        return
    seen = (found.sha256, found.vocab_size, found.bos_id, found.eos_id)
    if seen != (recorded.sha256, recorded.vocab_size, recorded.bos_id, recorded.eos_id):
        yield Problem(
            f"{root / recorded.path} is not the tokenizer the dataset was made with",
            seen=f"sha256 {seen[0][:12]}..., {seen[1]} ids; recorded {recorded.sha256[:12]}..., "
            f"{recorded.vocab_size} ids",
            do=_REMEDY,
        )


def _check_sums(manifest: DatasetManifest) -> Iterator[Problem]:
    for name, split in manifest.splits.items():
        if split != Split.of(split.shards):
            yield Problem(f"the counts of split {name!r} are not the sums of its shards", do=_REMEDY)
    if manifest.fingerprint != fingerprint_of(manifest.tokenizer.sha256, manifest.splits):
        yield Problem("the fingerprint in dataset.json does not follow from its shards", do=_REMEDY)


def _check_shard(root: Path, manifest: DatasetManifest, shard: Shard) -> Iterator[Problem]:
    prefix = root / shard.path
    hashes = [(bin_path(prefix), shard.sha256_bin), (idx_path(prefix), shard.sha256_idx)]
    if shard.sha256_mask is not None:
        hashes.append((mask_path(prefix), shard.sha256_mask))
    for path, recorded in hashes:
        try:
            digest = hash_file(path)
        except OSError as error:
            yield Problem(f"{path} cannot be read", seen=str(error), do=_REMEDY)
            return
        if digest != recorded:
            yield Problem(f"{path} has changed", seen=f"sha256 {digest}, recorded {recorded}", do=_REMEDY)
    try:
        reader = IndexedReader(prefix)
    except DataError as error:
        yield from error.problems
        return
    seen = (reader.num_documents, len(reader.tokens), reader.dtype.name)
    if seen != (shard.documents, shard.tokens, manifest.dtype):
        yield Problem(
            f"{prefix} does not hold what dataset.json says",
            seen=f"documents, tokens, dtype {seen}, recorded {(shard.documents, shard.tokens, manifest.dtype)}",
            do=_REMEDY,
        )
    if shard.sha256_mask is not None:
        yield from _check_mask(prefix, shard, len(reader.tokens))
    for start in range(0, len(reader.tokens), _IDS_AT_ONCE):
        ids = reader.tokens[start : start + _IDS_AT_ONCE]
        if int(ids.max()) >= manifest.tokenizer.vocab_size or int(ids.min()) < 0:
            yield Problem(
                f"{bin_path(prefix)} holds ids outside the vocabulary",
                seen=f"ids from {ids.min()} to {ids.max()}, vocabulary of {manifest.tokenizer.vocab_size}",
                do="prepare the dataset again with the tokenizer it names",
            )
            return


def _check_mask(prefix: Path, shard: Shard, num_tokens: int) -> Iterator[Problem]:
    mask = np.fromfile(mask_path(prefix), np.uint8)
    seen = (len(mask), int(np.count_nonzero(mask)))
    if seen != (num_tokens, shard.trained_tokens) or (len(mask) and int(mask.max()) > 1):
        yield Problem(
            f"{mask_path(prefix)} is not a mask of these tokens",
            seen=f"tokens, learned from {seen}, recorded {(num_tokens, shard.trained_tokens)}",
            do=_REMEDY,
        )
