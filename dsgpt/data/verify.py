"""Re-checks a dataset folder against its dataset.json, and shows what is in it.

    dsgpt data verify data/corpus       every hash, count and id; reads all shards once
    dsgpt data inspect data/corpus      counts, lengths, most common tokens, decoded samples

Trade-off: verify reports every problem it can find instead of stopping at the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsgpt.data.indexed import IndexedReader, bin_path, hash_file, idx_path
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
    for path, recorded in ((bin_path(prefix), shard.sha256_bin), (idx_path(prefix), shard.sha256_idx)):
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
    for start in range(0, len(reader.tokens), _IDS_AT_ONCE):
        ids = reader.tokens[start : start + _IDS_AT_ONCE]
        if int(ids.max()) >= manifest.tokenizer.vocab_size or int(ids.min()) < 0:
            yield Problem(
                f"{bin_path(prefix)} holds ids outside the vocabulary",
                seen=f"ids from {ids.min()} to {ids.max()}, vocabulary of {manifest.tokenizer.vocab_size}",
                do="prepare the dataset again with the tokenizer it names",
            )
            return


@dataclass(frozen=True)
class SplitSummary:
    """What `inspect` shows of a split. Lengths in tokens; `common` is (text of the token, count)."""

    documents: int
    tokens: int
    text_bytes: int
    shards: int
    shortest: int
    longest: int
    histogram: list[tuple[int, int]]
    common: list[tuple[str, int]]
    samples: list[str]


def inspect_split(folder: str | Path, split: str, num_samples: int = 3, sample_tokens: int = 60) -> SplitSummary:
    """Summarise one split of a dataset.

    histogram   (upper bound, documents): documents with fewer tokens than the bound, and not fewer than the one before
    samples     the beginnings of documents spread evenly over the split, special tokens included

    Raises DataError where the dataset or the split is missing or damaged.
    """
    manifest = load_manifest(folder)
    if split not in manifest.splits:
        raise DataError(f"the dataset has no split {split!r}", seen=f"it has: {', '.join(manifest.splits)}")
    root, found = Path(folder), manifest.splits[split]
    tokenizer = Tokenizer.load(root / manifest.tokenizer.path)
    by_length = np.zeros(64, np.int64)
    counts = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    shortest, longest = [], []
    samples: list[str] = []
    wanted = {int(i) for i in np.linspace(0, found.documents - 1, num_samples)} if found.documents else set()
    first = 0
    for shard in found.shards:
        reader = IndexedReader(root / shard.path)
        lengths = np.diff(np.append(0, np.cumsum(reader.lengths, dtype=np.int64))[reader.document_edges])
        by_length += np.bincount(np.frexp(lengths)[1], minlength=64)
        shortest.append(int(lengths.min(initial=found.tokens)))
        longest.append(int(lengths.max(initial=0)))
        for start in range(0, len(reader.tokens), _IDS_AT_ONCE):
            counts += np.bincount(reader.tokens[start : start + _IDS_AT_ONCE], minlength=len(counts))
        for number in sorted(i for i in wanted if first <= i < first + reader.num_documents):
            sequence = int(reader.document_edges[number - first])
            samples.append(tokenizer.decode(reader[sequence][:sample_tokens].tolist()))
        first += reader.num_documents
    return SplitSummary(
        documents=found.documents,
        tokens=found.tokens,
        text_bytes=found.text_bytes,
        shards=len(found.shards),
        shortest=min(shortest, default=0),
        longest=max(longest, default=0),
        histogram=[(1 << i, int(n)) for i, n in enumerate(by_length) if n],
        common=[
            (tokenizer.decode([int(i)]), int(counts[i])) for i in np.argsort(-counts, kind="stable")[:20] if counts[i]
        ],
        samples=samples,
    )
