"""Shows what is in a dataset folder: counts, lengths, common tokens, and documents as training sees them.

    dsgpt data inspect data/corpus

Trade-off: every token is read once, to count them all; of 100 GB that takes minutes, and the figures are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from dsgpt.data.indexed import IndexedReader, mask_path
from dsgpt.data.manifest import Shard, load_manifest
from dsgpt.errors import DataError
from dsgpt.tokenizer.tokenizer import Tokenizer

_IDS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Span:
    """Text of a sample. `kind`: where a document begins or ends, text that is learned from, or text that is only read."""

    text: str
    kind: Literal["boundary", "learned", "context"]


@dataclass(frozen=True)
class SplitSummary:
    """What `inspect` shows of a split. Lengths in tokens; `common` is (text of the token, count)."""

    documents: int
    tokens: int
    text_bytes: int
    trained_tokens: int
    shards: int
    shortest: int
    longest: int
    histogram: list[tuple[int, int]]
    common: list[tuple[str, int]]
    samples: list[list[Span]]


def inspect_split(folder: str | Path, split: str, num_samples: int = 3, sample_tokens: int = 60) -> SplitSummary:
    """Summarise one split of a dataset.

    histogram   (upper bound, documents): documents with fewer tokens than the bound, and not fewer than the one before
    samples     the beginnings and ends of documents spread evenly over the split, special tokens included

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
    samples: list[list[Span]] = []
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
            samples.append(list(_spans(reader, shard, root, number - first, tokenizer, sample_tokens)))
        first += reader.num_documents
    return SplitSummary(
        documents=found.documents,
        tokens=found.tokens,
        text_bytes=found.text_bytes,
        trained_tokens=sum(
            shard.tokens if shard.trained_tokens is None else shard.trained_tokens for shard in found.shards
        ),
        shards=len(found.shards),
        shortest=min(shortest, default=0),
        longest=max(longest, default=0),
        histogram=[(1 << i, int(n)) for i, n in enumerate(by_length) if n],
        common=[
            (tokenizer.decode([int(i)]), int(counts[i])) for i in np.argsort(-counts, kind="stable")[:20] if counts[i]
        ],
        samples=samples,
    )


def _spans(
    reader: IndexedReader, shard: Shard, root: Path, document: int, tokenizer: Tokenizer, most: int
) -> Iterator[Span]:
    """A document as training sees it; of a long one `most` tokens, half from each end."""
    first, last = (int(edge) for edge in reader.document_edges[document : document + 2])
    start = int(reader.offsets[first]) // reader.dtype.itemsize
    ids = reader.tokens[start : start + int(reader.lengths[first:last].sum())]
    learned = np.ones(len(ids), np.bool_)
    if shard.sha256_mask is not None:
        learned = np.fromfile(mask_path(root / shard.path), np.uint8, len(ids), offset=start).astype(np.bool_)
    cuts = [slice(0, len(ids))] if len(ids) <= most else [slice(0, most // 2), slice(len(ids) - most // 2, len(ids))]
    boundaries = {tokenizer.bos_id, tokenizer.eos_id}
    for number, cut in enumerate(cuts):
        if number:
            yield Span(f" [... {len(ids) - 2 * (most // 2):,} tokens ...] ", "context")
        pairs = zip(ids[cut].tolist(), learned[cut].tolist(), strict=True)
        for (is_boundary, is_learned), group in groupby(pairs, lambda pair: (pair[0] in boundaries, pair[1])):
            text = tokenizer.decode([token for token, _ in group])
            yield Span(text, "boundary" if is_boundary else "learned" if is_learned else "context")
