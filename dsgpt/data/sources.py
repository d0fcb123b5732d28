"""Finds texts and reads documents out of them; what cannot be read is handed over with its place and reason.

    for path in find_sources(["corpus/", "more/*.jsonl.gz", "hf:roneneldan/TinyStories"]): ...
    for item in read_documents(Piece(path, 0, size), Reading(text="text", documents="file")): ...
    for row in read_records(Piece(path, 0, size)): ...          (line, all fields) | BadLine

Read are .txt, .jsonl, .json, .csv and .tsv, each also as .gz, .zst, .bz2 and .xz; .parquet and .arrow; folders written
by `datasets.save_to_disk`; data sets of the Hugging Face Hub, streamed; and standard input. The formats themselves are
in texts.py and columns.py.

A `Piece` is a byte range of a file, so that one large file feeds many workers: a line, row group or record batch
belongs to the piece in which its first byte lies. What cannot be cut (`can_be_cut`) is one piece.

Trade-off: names alone say what a file is, never its content. A file that is damaged ends the reading with a DataError
that names it; a record that is bad costs that record.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dsgpt.data.columns import HUB, open_hub, read_arrow, read_hub, read_parquet, saved_files
from dsgpt.data.formats import (
    BOM,
    COMPRESSIBLE,
    COMPRESSIONS,
    DOCUMENTS,
    BadLine,
    Document,
    Documents,
    Item,
    LargeDocument,
    Piece,
    Reading,
    Row,
    document_of,
    kind_of,
    naming,
    open_bytes,
    read_lines,
)
from dsgpt.data.texts import read_json, read_jsonl, read_table, read_text
from dsgpt.errors import DataError, Problem

__all__ = [
    "DOCUMENTS",
    "HUB",
    "BadLine",
    "Document",
    "Documents",
    "LargeDocument",
    "Piece",
    "Reading",
    "can_be_cut",
    "extent_of",
    "find_sources",
    "first_line_of",
    "is_lines",
    "read_documents",
    "read_lines",
    "read_records",
]

STDIN = "-"
_KNOWN = f".{', .'.join(COMPRESSIBLE)} (also .{', .'.join(COMPRESSIONS)}), .parquet and .arrow"
# A folder with one of these holds something that was made from text, not text.
_NOT_TEXT = ("dataset.json", "tokenizer_config.json", "tokenizer.json")
_MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_STARTS = {rb"\s*\{": "jsonl", rb"\s*\[\s*\{": "json", rb"PAR1": "parquet", rb"ARROW1": "arrow"}
# Fields that are named are checked to be there, and alone are read where a format can be read by columns.
_READERS: dict[str, Callable[[Piece, tuple[str, ...]], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": partial(read_table, delimiter=","),
    "tsv": partial(read_table, delimiter="\t"),
    "parquet": read_parquet,
    "arrow": read_arrow,
}


def find_sources(
    inputs: Iterable[str | Path], exclude: str | Path | None = None, spool: str | Path | None = None
) -> list[Path]:
    """All files that can be read behind files, folders (searched to the bottom) and globs, sorted, each once.

    `exclude` is a folder to leave out (the output, where it lies inside an input). Hidden files and folders, prepared
    datasets and tokenizers are passed over. Names of the Hub ("hf:NAME") come back as they are. "-" is standard input:
    it can be read only once, so it is written to the folder `spool` first, and refused without one. Raises DataError,
    with one problem for each input that yields nothing and each file that is empty, dangling or incomplete.
    """
    excluded = Path(exclude).resolve() if exclude is not None else None
    found: dict[Path, tuple[str, int, Path]] = {}
    problems: list[Problem] = []
    for item in map(str, inputs):
        files: list[tuple[str, int, Path]] = []
        try:
            if item.startswith(HUB):
                files = [(item, 0, Path(item))]
            elif item == STDIN:
                files = [_spooled(spool)]
            else:
                files = _behind(item, excluded, problems)
        except DataError as error:
            problems += error.problems
        for file in files:
            real = file[2].resolve()
            found[real] = min(found.get(real, file), file)
    if problems:
        raise DataError(problems=problems)
    if not found:
        raise DataError("no input given", do=f"name files, folders or globs: {_KNOWN}")
    return [path for _, _, path in sorted(found.values())]


def _behind(item: str, excluded: Path | None, problems: list[Problem]) -> list[tuple[str, int, Path]]:
    """(what sorts it, its place in a saved data set, path) of the files behind a file, folder or glob."""
    matches = [Path(item)] if os.path.lexists(item) else [Path(m) for m in glob.glob(item, recursive=True)]
    files: list[tuple[str, int, Path]] = []
    known = len(problems)
    for match in matches:
        if match.is_dir():
            files += _walk(match, problems)
        elif kind_of(match) is not None and not (match.is_symlink() and not match.exists()):
            files.append((str(match), 0, match))
            if match.is_file() and match.stat().st_size == 0 and len(matches) == 1:
                problems.append(Problem("an input is empty", seen=item, do="name a file that holds text"))
    if excluded is not None:
        files = [file for file in files if excluded not in file[2].resolve().parents]
    if not files and len(problems) == known:
        problems.append(_nothing_found(item, matches))
    return files


def _walk(folder: Path, problems: list[Problem]) -> Iterator[tuple[str, int, Path]]:
    entered: set[Path] = set()  # a link can lead back up
    for here, folders, names in os.walk(folder, followlinks=True, onerror=partial(_unreadable, problems)):
        if (real := Path(here).resolve()) in entered:
            folders[:] = []
            continue
        entered.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if any(marker in names for marker in _NOT_TEXT):
            folders[:] = []
            continue
        try:
            saved = saved_files(Path(here))
        except DataError as error:
            problems += error.problems
            saved = []
        if saved is not None:
            folders[:] = []
            yield from ((here, place, path) for place, path in enumerate(saved))
            continue
        for name in sorted(names):
            path = Path(here, name)
            if name.startswith(".") or (kind := kind_of(path)) is None:
                continue
            if not path.exists():
                problems.append(_dangling(str(path)))
            elif path.is_file():
                # Plain text may be empty; a packed or binary file without bytes was lost on its way.
                if path.stat().st_size == 0 and (kind[1] or kind[0] in ("parquet", "arrow")):
                    problems.append(Problem("an input is empty", seen=str(path), do="get it anew, or delete it"))
                yield str(path), 0, path


def _unreadable(problems: list[Problem], error: OSError) -> None:
    problems.append(
        Problem("a folder cannot be read", seen=f"{error.filename}: {error.strerror}", do="check its permissions")
    )


def _dangling(path: str) -> Problem:
    return Problem("an input is a dangling link", seen=f"{path} -> {os.readlink(path)}", do="repair the link")


def _nothing_found(item: str, matches: list[Path]) -> Problem:
    if not matches:
        return Problem("an input does not exist", seen=item, do="check the path; a glob has to match at least one file")
    if len(matches) == 1 and matches[0].is_symlink() and not matches[0].exists():
        return _dangling(item)
    if len(matches) == 1 and matches[0].is_file():
        return Problem("an input is of a kind that is not read", seen=item, do=f"convert it; read are {_KNOWN}")
    return Problem("an input holds no text files", seen=item, do=f"name another folder; read are {_KNOWN}")


def _spooled(spool: str | Path | None) -> tuple[str, int, Path]:
    if spool is None:
        raise DataError("standard input cannot be read here", seen=STDIN, do="write it to a file and name that")
    path = keep_stdin(Path(spool), sys.stdin.buffer)
    if path.stat().st_size == 0:
        raise DataError("standard input is empty", seen=STDIN, do="pipe text or records into the command")
    return STDIN, 0, path


def keep_stdin(folder: Path, stream: BinaryIO) -> Path:
    """Write a stream to a file whose name says what it seems to hold: .jsonl if it starts with a brace, .json if with a
    list of objects, else .txt."""
    folder.mkdir(parents=True, exist_ok=True)
    partial_file = folder / "stdin.tmp"
    with open(partial_file, "wb") as file:
        while chunk := stream.read(1 << 20):
            file.write(chunk)
    with open(partial_file, "rb") as file:
        head = file.read(4096)
    packed = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")
    if packed:
        unpacked = partial_file.rename(folder / f"stdin.txt.{packed}")
        with naming(STDIN), open_bytes(unpacked) as content:
            head = content.read(4096)
        partial_file = unpacked
    kind = next((kind for start, kind in _STARTS.items() if re.match(start, head.removeprefix(BOM))), "txt")
    return partial_file.rename(folder / ".".join(["stdin", kind, *([packed] if packed else [])]))


def is_lines(path: str | Path) -> bool:
    """Whether the file can be entered at any byte and read from the next line on."""
    return not str(path).startswith(HUB) and kind_of(path) in (("txt", ""), ("jsonl", ""))


def can_be_cut(path: str | Path, documents: Documents) -> bool:
    """Whether pieces of the file give the same documents as the whole."""
    kind = None if str(path).startswith(HUB) else kind_of(path)
    return kind in (("jsonl", ""), ("parquet", ""), ("arrow", "")) or (kind == ("txt", "") and documents == "line")


def read_documents(piece: Piece, reading: Reading) -> Iterator[Item]:
    """The documents of a piece in file order, bad records among them. Blank lines between records are not records.

    A document without text comes as a Document with empty text; the caller decides. Raises OSError as `open` does, and
    DataError with the path where the file is cut off, damaged or lacks the columns asked for.
    """
    if not piece.path.startswith(HUB) and _known_kind(piece.path) == "txt":
        with naming(piece.path):
            yield from read_text(piece, reading)
        return
    for row in _rows(piece, reading.fields):
        yield document_of(row, reading)


def read_records(piece: Piece) -> Iterator[tuple[int, dict[str, Any]] | BadLine]:
    """The records of a piece with all their fields and the line (or row) each begins in, bad ones among them.

    Raises as read_documents, and DataError for plain text, which has no records.
    """
    if not piece.path.startswith(HUB) and _known_kind(piece.path) == "txt":
        raise DataError("plain text holds no records", seen=piece.path, do="give one record a line, as .jsonl")
    for row in _rows(piece, ()):
        yield row if isinstance(row, BadLine) else (row.line, row.fields)


def _rows(piece: Piece, fields: tuple[str, ...]) -> Iterator[Row]:
    if piece.path.startswith(HUB):
        yield from read_hub(piece, fields)
        return
    with naming(piece.path):
        yield from _READERS[_known_kind(piece.path)](piece, fields)


def _known_kind(path: str) -> str:
    if (kind := kind_of(path)) is None:
        raise DataError("an input is of a kind that is not read", seen=path, do=f"convert it; read are {_KNOWN}")
    return kind[0]


def first_line_of(piece: Piece) -> int:
    """What to add to the `line` of the piece's documents to get the line of the file.

    Reads the file up to the piece, so ask only with something to report.
    """
    if not piece.start or not is_lines(piece.path):
        return 0
    count, left = 1, piece.start - 1  # of the line that runs over `start`, or ends just there, the end is not counted
    with open(piece.path, "rb") as stream:
        while left and (chunk := stream.read(min(left, 1 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def extent_of(path: Path) -> tuple[int, int]:
    """(stop, bytes): where the last piece of a source ends, and its size on disk. Raises OSError, DataError.

    A data set of the Hub has files for places, and no known size.
    """
    if str(path).startswith(HUB):
        return int(open_hub(str(path)).num_shards), 0
    size = path.stat().st_size
    return size, size
