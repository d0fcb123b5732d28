"""Trains a tokenizer on files: draws a bounded, uniform sample of the corpus and hands it to dsgpt.tokenizer.training.

    dsgpt tokenizer train corpus/ --vocab-size 32000 --output tokenizers/bpe32k
    train_tokenizer(["corpus/"], vocab_size=32000, output="tokenizers/bpe32k")

A tokenizer learns little from more than some megabytes of text, and reading all of a large corpus for it takes hours.
So blocks of 64 KiB are drawn uniformly over all bytes of all files, and only those are read; a file that cannot be
entered in the middle (compressed, a table) is read from the front if it is drawn at all, and so many of its blocks are
kept. What was drawn is written to tokenizer_training.json. Trade-off: the sample is of byte ranges, so long documents are
represented by a stretch and not whole, and how often a compressed file is drawn follows from its compressed size.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from dsgpt.data.formats import BOM, COMPRESSIBLE, kind_of, open_bytes
from dsgpt.data.sources import (
    HUB,
    BadLine,
    Document,
    LargeDocument,
    Piece,
    Reading,
    extent_of,
    find_sources,
    is_lines,
    read_documents,
)
from dsgpt.errors import DataError
from dsgpt.tokenizer.tokenizer import Tokenizer
from dsgpt.tokenizer.training import RECORD, Kind, train_on_texts

SAMPLE_BYTES = 10_000_000
_BLOCK_BYTES = 64 << 10
_HUB_BYTES = 1 << 30
_MAX_LISTED = 1000


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
    """Train on a sample of `inputs` (as `dsgpt data prepare` reads them) and write the folder `output`.

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
    sources = [{"path": str(path), "bytes": _size_of(str(path))} for path in paths[:_MAX_LISTED]]
    return train_on_texts(texts, vocab_size, output, kind, {**record, "sources": sources})


def draw_sample(paths: list[str], sample_bytes: int, seed: int, text_field: str) -> tuple[list[str], dict[str, Any]]:
    """(texts, what describes them). The same files and arguments give the same texts."""
    sizes = [_size_of(path) for path in paths]
    corpus_bytes = sum(sizes)
    whole = corpus_bytes <= sample_bytes and all(_holds_its_size(path) for path in paths)
    reading = Reading(text_field)
    drawn_texts = (
        _all_texts(paths, sizes, reading) if whole else _drawn_texts(paths, sizes, reading, sample_bytes, seed)
    )
    texts: list[str] = []
    drawn = num_bad = 0
    digest = hashlib.sha256()
    for text in drawn_texts:
        if text is None:
            num_bad += 1
        elif text:
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


def _size_of(path: str) -> int:
    return 0 if path.startswith(HUB) else Path(path).stat().st_size


def _holds_its_size(path: str) -> bool:
    """Whether a file holds about as much text as it has bytes."""
    kind, packed = kind_of(path) or ("", "")
    return not path.startswith(HUB) and kind in COMPRESSIBLE and not packed


def _all_texts(paths: list[str], sizes: list[int], reading: Reading) -> Iterator[str | None]:
    for path, size in zip(paths, sizes, strict=True):
        for item in read_documents(Piece(path, 0, size), reading):
            yield None if isinstance(item, BadLine) else "".join(_stretches(item))


def _drawn_texts(
    paths: list[str], sizes: list[int], reading: Reading, sample_bytes: int, seed: int
) -> Iterator[str | None]:
    """Texts from blocks in random order, each at most once; first those of files that have to be read from the front."""
    wanted = -(-sample_bytes // _BLOCK_BYTES)
    rng = random.Random(seed)
    if sum(sizes) <= sample_bytes and not any(path.startswith(HUB) for path in paths):
        # All that is there may be more text than is wanted, and is soon read.
        yield from _reservoir(paths, reading, wanted, rng)
        return
    blocks = list(_blocks(paths, sizes, 8 * wanted + 64, seed))
    from_front = Counter(piece.path for piece in blocks[:wanted] if not is_lines(piece.path))
    for path, number in sorted(from_front.items()):
        yield from _reservoir([path], reading, number, rng)
    for piece in blocks:
        if is_lines(piece.path):
            yield from _texts(piece, reading)


def _blocks(paths: list[str], sizes: list[int], wanted: int, seed: int) -> Iterator[Piece]:
    """Blocks in random order, each at most once. A data set of the Hub, whose size nobody knows, counts as 1 GiB."""
    sizes = [_HUB_BYTES if path.startswith(HUB) else size for path, size in zip(paths, sizes, strict=True)]
    # Number of the first block of each file, and one past the last of all.
    first = list(accumulate((-(-size // _BLOCK_BYTES) for size in sizes), initial=0))
    for block in random.Random(seed).sample(range(first[-1]), min(first[-1], wanted)):
        number = bisect_right(first, block) - 1
        start = (block - first[number]) * _BLOCK_BYTES
        yield Piece(paths[number], start, min(sizes[number], start + _BLOCK_BYTES))


def _reservoir(paths: list[str], reading: Reading, number: int, rng: random.Random) -> Iterator[str | None]:
    """So many blocks of files that are read from the front, each as likely as any other (Vitter's R), in random order.

    A block is a stretch of a long document, or as many short ones as fill it. Of a data set of the Hub the first
    gigabyte is looked at: what comes after it would have to be downloaded.
    """
    kept: list[list[str]] = []
    num_bad = seen = 0
    for block in _filled(paths, reading):
        if block is None:
            num_bad += 1
            continue
        seen += 1
        if len(kept) < number:
            kept.append(block)
        elif (place := rng.randrange(seen)) < number:
            kept[place] = block
    rng.shuffle(kept)
    yield from [None] * num_bad
    yield from (text for block in kept for text in block)


def _filled(paths: list[str], reading: Reading) -> Iterator[list[str] | None]:
    """All texts in lists of about a block; None for what cannot be read."""
    block: list[str] = []
    num_bytes = 0
    for path in paths:
        of_file = 0
        for item in read_documents(Piece(path, 0, extent_of(Path(path))[0]), reading):
            if isinstance(item, BadLine):
                yield None
                continue
            for stretch in _stretches(item):
                block.append(stretch)
                num_bytes += len(stretch.encode())
                if num_bytes >= _BLOCK_BYTES:
                    yield block
                    of_file += num_bytes
                    block, num_bytes = [], 0
            if path.startswith(HUB) and of_file > _HUB_BYTES:
                break
    if block:
        yield block


def _stretches(item: Document | LargeDocument) -> Iterator[str]:
    """The text in pieces of about a block."""
    texts = (chunk.decode() for chunk in item.chunks()) if isinstance(item, LargeDocument) else (item.text,)
    for text in texts:
        for start in range(0, len(text), _BLOCK_BYTES):
            yield text[start : start + _BLOCK_BYTES]


def _texts(piece: Piece, reading: Reading) -> Iterator[str | None]:
    """The records that begin in a block, or the lines of its plain text; None for what cannot be read."""
    if kind_of(piece.path) == ("jsonl", ""):
        for item in read_documents(piece, reading):
            yield None if isinstance(item, BadLine) else "".join(_stretches(item))
        return
    try:
        yield codecs.getincrementaldecoder("utf-8")().decode(_lines_of(piece))
    except UnicodeDecodeError:
        yield None


def _lines_of(piece: Piece) -> bytes:
    """The lines that begin in a block; where there is no line end for as long as a block, the cut is where the block's is.

    So a text without lines gives its blocks, and no more than two of them are read for one.
    """
    before = min(1, piece.start)
    with open_bytes(piece.path) as stream:
        stream.seek(piece.start - before)
        data = stream.read(before + 2 * _BLOCK_BYTES)
    stop = before + piece.stop - piece.start
    if not before:
        begin = len(BOM) if data.startswith(BOM) else 0
    elif (begin := data.find(b"\n", 0, stop) + 1) == 0:
        begin = next((i for i in range(before, stop) if data[i] & 0xC0 != 0x80), stop)
    end = data.find(b"\n", stop - 1) + 1
    return data[begin : end or stop]


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
