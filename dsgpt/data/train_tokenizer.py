"""Trains a tokenizer on files: draws a bounded, uniform sample of the corpus and hands it to dsgpt.tokenizer.training.

    dsgpt tokenizer train corpus/ --vocab-size 32000 --output tokenizers/bpe32k
    train_tokenizer(["corpus/"], vocab_size=32000, output="tokenizers/bpe32k")

A tokenizer learns little from more than some megabytes of text, and reading all of a large corpus for it takes hours.
So blocks of 64 KiB are drawn uniformly over all bytes of all files, and only those are read. What was drawn is written
to tokenizer_training.json. Trade-off: the sample is of byte ranges, so long documents are represented by a stretch of
lines and not whole.
"""

from __future__ import annotations

import hashlib
import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from dsgpt.data.sources import BadLine, Piece, find_sources, read_documents, read_lines
from dsgpt.errors import DataError
from dsgpt.tokenizer.tokenizer import Tokenizer
from dsgpt.tokenizer.training import RECORD, Kind, train_on_texts

SAMPLE_BYTES = 10_000_000
_BLOCK_BYTES = 64 << 10


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    kind: Kind = "sentencepiece-bpe",
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 1234,
    text_field: str = "text",
    progress: Callable[[str], None] | None = None,
) -> Tokenizer:
    """Train on a sample of `inputs` (files, folders, globs of .txt and .jsonl) and write the folder `output`.

    sample_bytes  at most about this much text is read; all of it where the corpus is smaller
    progress      told in words what happens

    A folder that already holds the tokenizer of this sample and these settings is loaded as it is; one that holds
    anything else raises DataError, as do inputs without text and texts too few for `vocab_size`.
    """
    tell = progress or (lambda _: None)
    paths = find_sources(inputs, exclude=output)
    tell(f"sampling {len(paths)} files")
    texts, sample = draw_sample([str(path) for path in paths], sample_bytes, seed, text_field)
    record = {"kind": kind, "vocab_size": vocab_size, "sample": sample}
    folder = Path(output)
    if folder.exists() and any(folder.iterdir()):
        _refuse_other(folder, record)
        return Tokenizer.load(folder)
    tell(f"training {kind} with {vocab_size} tokens on {sample['bytes']} bytes")
    return train_on_texts(texts, vocab_size, output, kind, record)


def draw_sample(paths: list[str], sample_bytes: int, seed: int, text_field: str) -> tuple[list[str], dict[str, Any]]:
    """(texts, what describes them). The same files and arguments give the same texts."""
    sizes = [Path(path).stat().st_size for path in paths]
    corpus_bytes = sum(sizes)
    whole = corpus_bytes <= sample_bytes
    texts: list[str] = []
    drawn = num_bad = 0
    digest = hashlib.sha256()
    for piece in _whole_files(paths, sizes) if whole else _blocks(paths, sizes, sample_bytes, seed):
        for text in _texts(piece, text_field):
            if text is None:
                num_bad += 1
            elif text and drawn < sample_bytes:
                # A document can be longer than its block; none must be the whole sample.
                kept = text if whole else text[: 2 * _BLOCK_BYTES]
                texts.append(kept)
                digest.update(utf8 := kept.encode())
                drawn += len(utf8)
        if drawn >= sample_bytes:
            break
    if not texts:
        raise DataError("the inputs hold no text", seen=", ".join(paths[:5]), do="name files that hold text")
    return texts, {
        "corpus_files": len(paths),
        "corpus_bytes": corpus_bytes,
        "bytes": drawn,
        "texts": len(texts),
        "bad_lines": num_bad,
        "drawn": "all" if whole else f"blocks of {_BLOCK_BYTES} bytes, uniformly over all bytes",
        "seed": None if whole else seed,
        "sha256": digest.hexdigest(),
    }


def _whole_files(paths: list[str], sizes: list[int]) -> Iterator[Piece]:
    return (Piece(path, 0, size) for path, size in zip(paths, sizes, strict=True))


def _blocks(paths: list[str], sizes: list[int], sample_bytes: int, seed: int) -> Iterator[Piece]:
    """Blocks in random order, each at most once, several times as many as should be needed."""
    # Number of the first block of each file, and one past the last of all.
    first = list(accumulate((-(-size // _BLOCK_BYTES) for size in sizes), initial=0))
    wanted = min(first[-1], 8 * sample_bytes // _BLOCK_BYTES + 64)
    for block in random.Random(seed).sample(range(first[-1]), wanted):
        number = bisect_right(first, block) - 1
        start = (block - first[number]) * _BLOCK_BYTES
        yield Piece(paths[number], start, min(sizes[number], start + _BLOCK_BYTES))


def _texts(piece: Piece, text_field: str) -> Iterator[str | None]:
    """The texts that begin in a block; None for what cannot be read."""
    if piece.path.endswith(".jsonl"):
        for item in read_documents(piece, text_field, "line"):
            yield None if isinstance(item, BadLine) else item.text
        return
    try:
        yield b"".join(line for _, line in read_lines(piece)).decode("utf-8")
    except UnicodeDecodeError:
        yield None


def _refuse_other(folder: Path, record: dict[str, Any]) -> None:
    try:
        existing = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        existing = {}
    different = [key for key in record if existing.get(key) != record[key]]
    if different:
        raise DataError(
            "the output folder holds something else",
            seen=f"{folder}: different {', '.join(different)}",
            do="choose another --output, or delete the folder to train anew",
        )
