"""Finds text files and reads documents out of them; what cannot be read is handed over with its place and reason.

    for path in find_sources(["corpus/", "more/*.jsonl"]): ...
    for record in read_documents(Piece(path, 0, size), text_field="text", documents="file"): ...

A `Piece` is a byte range of a file, so that one large file feeds many workers: a line belongs to the piece in which
its first byte lies. Only files in which every line is a document of its own are cut (.jsonl, and .txt with
documents="line").

Trade-off: text is kept exactly as it is (line ends, NULs, odd spaces); only a byte-order mark at the start of a file
and the line end that closes a document are taken off. Lines are read with a bound, so that one endless line in a
.jsonl file cannot exhaust memory.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from dsgpt.errors import DataError, Problem

Documents = Literal["file", "blank-line", "line"]
DOCUMENTS: tuple[Documents, ...] = ("file", "blank-line", "line")
SUFFIXES = (".txt", ".jsonl")
MAX_LINE_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"
# A folder with one of these holds something that was made from text, not text.
_NOT_TEXT = ("dataset.json", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Document:
    """Text, also as UTF-8; `line` (from 1) is where it starts, counted from the start of the piece."""

    line: int
    text: str
    utf8: bytes


@dataclass(frozen=True)
class BadLine:
    """A record that cannot be read; `line` as in Document."""

    line: int
    reason: str
    excerpt: str


def find_sources(inputs: Iterable[str | Path], exclude: str | Path | None = None) -> list[Path]:
    """All .txt and .jsonl files behind files, folders (searched to the bottom) and globs, sorted, each once.

    `exclude` is a folder to leave out (the output, where it lies inside an input). Hidden files and folders, datasets
    and tokenizers are passed over. Raises DataError, with one problem for each input that yields nothing.
    """
    excluded = Path(exclude).resolve() if exclude is not None else None
    found: dict[Path, Path] = {}
    problems = []
    for item in map(str, inputs):
        matches = [Path(item)] if os.path.lexists(item) else [Path(m) for m in glob.glob(item, recursive=True)]
        files: list[Path] = []
        for match in matches:
            if match.is_dir():
                files += _walk(match)
            elif match.is_file() and match.suffix in SUFFIXES:
                files.append(match)
        if excluded is not None:
            files = [file for file in files if excluded not in file.resolve().parents]
        if not files:
            problems.append(_nothing_found(item, matches))
        for file in files:
            found.setdefault(file.resolve(), file)
    if problems:
        raise DataError(problems=problems)
    if not found:
        raise DataError("no input given", do="name at least one .txt or .jsonl file, folder or glob")
    return sorted(found.values(), key=str)


def _walk(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if any(marker in names for marker in _NOT_TEXT):
            folders[:] = []
            continue
        for name in sorted(names):
            path = Path(here, name)
            if path.suffix in SUFFIXES and not name.startswith(".") and path.is_file():
                yield path


def _nothing_found(item: str, matches: list[Path]) -> Problem:
    known = " and ".join(SUFFIXES)
    if not matches:
        return Problem("an input does not exist", seen=item, do="check the path; a glob has to match at least one file")
    if len(matches) == 1 and matches[0].is_symlink() and not matches[0].exists():
        return Problem("an input is a dangling link", seen=f"{item} -> {os.readlink(item)}", do="repair the link")
    if len(matches) == 1 and matches[0].is_file():
        return Problem("an input is of a kind that is not read", seen=item, do=f"convert it: {known} are read")
    return Problem("an input holds no text files", seen=item, do=f"put {known} files there, or name another folder")


def can_be_cut(path: str | Path, documents: Documents) -> bool:
    """Whether every line of the file is a document of its own."""
    return Path(path).suffix == ".jsonl" or documents == "line"


def read_documents(piece: Piece, text_field: str, documents: Documents) -> Iterator[Document | BadLine]:
    """The documents of a piece in file order, bad records among them. Blank lines between records are not records.

    A document without text comes as a Document with empty text; the caller decides. Raises OSError as `open` does.
    """
    if piece.path.endswith(".jsonl"):
        return _read_jsonl(piece, text_field)
    if documents == "line":
        return _read_lines(piece)
    if documents == "blank-line":
        return _read_paragraphs(piece)
    return _read_file(piece)


def first_line_of(piece: Piece) -> int:
    """How many lines of the file come before those of the piece. Reads them, so ask only with something to report."""
    if not piece.start:
        return 0
    count, left = 1, piece.start - 1  # of the line that runs over `start`, or ends just there, the end is not counted
    with open(piece.path, "rb") as stream:
        while left and (chunk := stream.read(min(left, 1 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def read_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(line number, line with its end); a line that is too long comes cut to MAX_LINE_BYTES + 1 bytes."""
    with open(piece.path, "rb", buffering=1 << 20) as stream:
        position, number = 0, 0
        if piece.start:
            # The line that runs over `start` belongs to the piece before.
            position = stream.seek(piece.start - 1)
            position += _skip_line(stream)
        while position < piece.stop and (line := stream.readline(MAX_LINE_BYTES + 1)):
            at_start = position == 0
            position += len(line)
            number += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                position += _skip_line(stream)
            yield number, line.removeprefix(_BOM) if at_start else line


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of the line; the number of bytes passed over."""
    skipped = 0
    while rest := stream.readline(1 << 20):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _read_jsonl(piece: Piece, text_field: str) -> Iterator[Document | BadLine]:
    for number, line in read_lines(piece):
        if not line.strip():
            continue
        try:
            text = _text_of_record(line, text_field)
            yield Document(number, text, text.encode("utf-8"))
        except (ValueError, RecursionError) as error:
            yield BadLine(number, _reason(error), _excerpt(line))


def _text_of_record(line: bytes, text_field: str) -> str:
    _check_length(line)
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"no field {text_field!r}; fields: {', '.join(sorted(record)) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is {type(text).__name__}, not a string")
    return text


def _read_lines(piece: Piece) -> Iterator[Document | BadLine]:
    for number, line in read_lines(piece):
        body = line.removesuffix(b"\n").removesuffix(b"\r")
        if body.strip():
            yield _decoded(number, body)


def _read_paragraphs(piece: Piece) -> Iterator[Document | BadLine]:
    first, paragraph, size = 0, [], 0
    for number, line in read_lines(piece):
        if line.strip():
            first = first or number
            # One line more than the bound is enough to report the paragraph.
            if size <= MAX_LINE_BYTES:
                paragraph.append(line)
            size += len(line)
        elif paragraph:
            yield _decoded(first, b"".join(paragraph).removesuffix(b"\n").removesuffix(b"\r"))
            first, paragraph, size = 0, [], 0
    if paragraph:
        yield _decoded(first, b"".join(paragraph).removesuffix(b"\n").removesuffix(b"\r"))


def _read_file(piece: Piece) -> Iterator[Document | BadLine]:
    with open(piece.path, "rb") as stream:
        body = stream.read().removeprefix(_BOM)
    try:
        yield Document(1, body.decode("utf-8"), body)
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        yield BadLine(line, _reason(error), _excerpt(body[max(0, error.start - 40) :]))


def _decoded(number: int, body: bytes) -> Document | BadLine:
    try:
        _check_length(body)
        return Document(number, body.decode("utf-8"), body)
    except ValueError as error:
        return BadLine(number, _reason(error), _excerpt(body))


def _check_length(line: bytes) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MiB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"half of a surrogate pair at character {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    return str(error)


def _excerpt(line: bytes) -> str:
    return line[:2000].decode("utf-8", "backslashreplace").rstrip("\r\n")
