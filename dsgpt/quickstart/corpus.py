"""The quickstart's text: the sources of Python's own standard library, which every machine that runs dsgpt has.

    python -c "from dsgpt.quickstart.corpus import build_corpus; print(build_corpus('corpus'))"

A few whole packages are held out, so that the held-out figure says something about code that was never seen. Files
that are near copies of another are dropped, because they would make that figure too good: every file is a set of
shingles (hashes of three lines in a row), and two files that share half of the smaller one's shingles are copies. The
trade-off: a shingle is exact, so a copy with every third line edited passes as new text.
"""

from __future__ import annotations

import json
import lzma
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsgpt.data.near_copies import NearCopies
from dsgpt.errors import DataError

# Whole packages, present on Python 3.11 to 3.13 and in the small distributions of it; about 6 % of the bytes.
HELDOUT = ("http", "json", "logging", "urllib")
SHINGLE_LINES = 3
DUPLICATE_SHARE = 0.5
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
# Written when Python was built: no one's code, and other paths on every machine.
_GENERATED = "_sysconfigdata"


@dataclass(frozen=True)
class CorpusSummary:
    """What was written. Sizes are bytes of UTF-8 text; `xz_bits_per_byte` is xz -9e on the held-out text alone."""

    train: Path
    heldout: Path
    heldout_packages: tuple[str, ...]
    train_files: int
    train_bytes: int
    heldout_files: int
    heldout_bytes: int
    duplicate_files: int
    duplicate_bytes: int
    undecodable_files: int
    empty_files: int
    xz_bits_per_byte: float


def build_corpus(
    output: str | Path, holdout: Sequence[str] = HELDOUT, source: str | Path | None = None
) -> CorpusSummary:
    """Write output/train.jsonl and output/heldout.jsonl, one {"path", "text"} a line, the same bytes on every call.

    `holdout` names top-level packages or modules; `source` is the standard library of this Python unless given.
    A near copy of a held-out file is dropped from the training text, never the other way round. Raises DataError where
    either file would be empty.
    """
    source = Path(source or sysconfig.get_path("stdlib"))
    output = Path(output)
    texts: dict[str, str] = {}
    undecodable = empty = 0
    for path in _python_files(source):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            undecodable += 1
            continue
        if text.strip():
            texts[path.relative_to(source).as_posix()] = text
        else:
            empty += 1
    held = {name for name in texts if name.split("/")[0].removesuffix(".py") in holdout}
    # Held-out files first: they stay. Then the largest first: what is dropped is the excerpt, not its source.
    order = sorted(texts, key=lambda name: (name not in held, -len(texts[name]), name))
    copies = near_duplicates({name: texts[name] for name in order})
    kept = sorted(name for name in texts if name not in copies)
    train, heldout = ([name for name in kept if (name in held) == side] for side in (False, True))
    if not train or not heldout:
        raise DataError(
            f"no {'training' if not train else 'held-out'} text in Python's standard library",
            seen=f"{len(texts)} readable .py files in {source}, held out: {', '.join(holdout)}",
            do="install the complete standard library (on Debian: apt install libpython3-stdlib), or train on own text",
        )
    output.mkdir(parents=True, exist_ok=True)
    train_bytes = _write_jsonl(output / "train.jsonl", train, texts)
    heldout_bytes = _write_jsonl(output / "heldout.jsonl", heldout, texts)
    return CorpusSummary(
        train=output / "train.jsonl",
        heldout=output / "heldout.jsonl",
        heldout_packages=tuple(holdout),
        train_files=len(train),
        train_bytes=train_bytes,
        heldout_files=len(heldout),
        heldout_bytes=heldout_bytes,
        duplicate_files=len(copies),
        duplicate_bytes=sum(len(texts[name].encode()) for name in copies),
        undecodable_files=undecodable,
        empty_files=empty,
        xz_bits_per_byte=xz_bits_per_byte("".join(texts[name] for name in heldout)),
    )


def near_duplicates(texts: dict[str, str]) -> dict[str, str]:
    """The near copies among `texts`: name -> the earlier name it copies. Earlier entries of the dict are kept."""
    names, index = list(texts), NearCopies(lambda size, earlier: DUPLICATE_SHARE * min(size, earlier))
    copied = {name: index.add(_shingles(text)) for name, text in texts.items()}
    return {name: names[number] for name, number in copied.items() if number is not None}


def xz_bits_per_byte(text: str) -> float:
    """Bits per byte of UTF-8 text under xz -9e, which starts from nothing: no training text is given to it."""
    data = text.encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def _python_files(source: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(source):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith(_GENERATED) and path.is_file() and not path.is_symlink():
                yield path


def _shingles(text: str) -> set[int]:
    """Hashes of every three consecutive non-blank lines, indentation ignored; a shorter text is one shingle."""
    lines = [hash(line) for line in (raw.strip() for raw in text.splitlines()) if line]
    count = max(1, len(lines) - SHINGLE_LINES + 1)
    return {hash(tuple(lines[i : i + SHINGLE_LINES])) for i in range(count)}


def _write_jsonl(path: Path, names: Sequence[str], texts: dict[str, str]) -> int:
    """Write the named texts and return their bytes. Through a second name: a killed call leaves no half file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for name in names:
            file.write(json.dumps({"path": name, "text": texts[name]}, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    return sum(len(texts[name].encode()) for name in names)
