"""What files of text are called, how their bytes are opened, and how a record becomes a document.

    kind_of("x.jsonl.gz")               ("jsonl", "gz"), or None for a file that is not read
    with open_bytes(path) as stream:    what the file holds, decompressed as it is read
    document_of(Record(7, {"title": ...}), Reading("{title}\\n\\n{body}"))

The readers of the formats stand in texts.py and columns.py; dsgpt.data.sources puts all of it together.

Trade-off: compressed files are read by one process from front to back, because none of these compressions can be
entered in the middle. Parquet and Arrow compress their own columns and are not read out of a compressed file.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import string
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from dsgpt.errors import ConfigError, DataError
from dsgpt.fetch import RECORD

Documents = Literal["file", "blank-line", "line"]
DOCUMENTS: tuple[Documents, ...] = ("file", "blank-line", "line")
COMPRESSIBLE = ("txt", "jsonl", "json", "csv", "tsv")
KINDS = (*COMPRESSIBLE, "parquet", "arrow")
COMPRESSIONS = ("gz", "zst", "bz2", "xz")
MAX_RECORD_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file. Of a Hub name it is files [start, stop) of the data set, all where stop is 0."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """How records become documents.

    text       the field that holds the text, or a template such as "{title}\\n\\n{body}": every field in it has to be
               there and be text; a brace is written twice, and \\n, \\t, \\\\ as a shell passes them on are understood
    documents  what is a document in plain text: the file, what blank lines separate, or each line
    """

    text: str = "text"
    documents: Documents = "file"

    def __post_init__(self) -> None:
        if self.documents not in DOCUMENTS:
            raise ConfigError("documents is not known", seen=repr(self.documents), do=f"one of {', '.join(DOCUMENTS)}")
        template_of(self.text)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read, each once, in the order of the template."""
        return tuple(dict.fromkeys(field for _, field in template_of(self.text) if field is not None))


@dataclass(frozen=True)
class Document:
    """Text, also as UTF-8. `line` (from 1) is where it starts: counted from the start of the piece where lines are cut
    (see sources.can_be_cut), else from that of the file. In .parquet and .arrow files it counts the rows of the file, in
    Hub names those of the piece."""

    line: int
    text: str
    utf8: bytes


@dataclass(frozen=True)
class LargeDocument:
    """Plain text above 64 MiB. `chunks()` reads it anew each time, about 1 MiB at once, never cut inside a character."""

    line: int
    chunks: Callable[[], Iterator[bytes]]
    num_bytes: int


@dataclass(frozen=True)
class BadLine:
    """A record that cannot be read; `line` as in Document."""

    line: int
    reason: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class Record:
    """What a reader of records hands over; `raw` is what the file says, where that is at hand."""

    line: int
    fields: dict[str, Any]
    raw: bytes = b""


Item = Document | LargeDocument | BadLine
Row = Record | BadLine


def kind_of(path: str | Path) -> tuple[str, str] | None:
    """(kind, compression or ""), by name alone; None for what is not read, as the list that `dsgpt fetch` leaves."""
    if Path(path).name == RECORD:
        return None
    suffixes = [suffix[1:].lower() for suffix in Path(path).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    return (kind, packed) if kind in (COMPRESSIBLE if packed else KINDS) else None


def open_bytes(path: str | Path) -> BinaryIO:
    """The content of a file as a buffered stream. Raises OSError as `open` does; see `naming` for broken content."""
    packed = (kind_of(path) or ("", ""))[1]
    if not packed:
        return open(path, "rb", buffering=_BUFFER_BYTES)
    if Path(path).stat().st_size == 0:
        raise EOFError("compressed, and no bytes at all")
    if packed == "zst":
        import pyarrow

        raw = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES))
    import bz2
    import gzip

    unpacked = {"gz": gzip, "bz2": bz2, "xz": lzma}[packed].open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(cast(Any, unpacked), _BUFFER_BYTES))


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Content that cannot be what the file's name says becomes a DataError with the path; OSErrors of the disk stay."""
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        do = "get the file anew: it is cut off or damaged"
        raise DataError("an input cannot be read to its end", seen=f"{path}: {error}", do=do) from error


def read_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(line number, line with its end); a line that is too long comes cut to MAX_RECORD_BYTES + 1 bytes."""
    return ((number, line) for number, line, _, _ in scan_lines(piece))


def scan_lines(piece: Piece) -> Iterator[tuple[int, bytes, int, int]]:
    """(line number, line as in read_lines, its offset in the content, its whole length)."""
    with open_bytes(piece.path) as stream:
        whole = bool((kind_of(piece.path) or ("", ""))[1])
        position, number = 0, 0
        if piece.start:
            # The line that runs over `start` belongs to the piece before.
            position = stream.seek(piece.start - 1)
            position += _skip_line(stream)
        while (whole or position < piece.stop) and (line := stream.readline(MAX_RECORD_BYTES + 1)):
            number += 1
            length = len(line)
            if length > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                length += _skip_line(stream)
            if position == 0 and line.startswith(BOM):
                yield number, line[len(BOM) :], len(BOM), length - len(BOM)
            else:
                yield number, line, position, length
            position += length


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of the line; the number of bytes passed over."""
    skipped = 0
    while rest := stream.readline(_BUFFER_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


@lru_cache(maxsize=16)
def template_of(text: str) -> tuple[tuple[str, str | None], ...]:
    """(literal, field or None) pairs; a bare name is the template of that field alone."""
    if "{" not in text and "}" not in text:
        return (("", text),)
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            "the template of the text is not one", seen=f"{text!r}: {error}", do="e.g. {title}"
        ) from error
    if any(spec or conversion or field == "" for _, field, spec, conversion in parsed):
        raise ConfigError("a template holds names of fields only", seen=repr(text), do="e.g. {title}: {body}")
    if not any(field for _, field, _, _ in parsed):
        raise ConfigError("the template of the text names no field", seen=repr(text), do="e.g. {title}: {body}")
    return tuple((_unescaped(literal), field) for literal, field, _, _ in parsed)


def _unescaped(literal: str) -> str:
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], literal)


def text_of(record: Mapping[str, Any], text: str) -> str:
    """The text of a record. Raises ValueError where a field is absent or not text."""
    parts = []
    for literal, field in template_of(text):
        parts.append(literal)
        if field is None:
            continue
        if field not in record:
            raise ValueError(f"no field {field!r}; fields: {', '.join(sorted(map(str, record))) or 'none'}")
        if not isinstance(value := record[field], str):
            raise ValueError(f"field {field!r} is {type(value).__name__}, not a string")
        parts.append(value)
    return "".join(parts)


def document_of(row: Row, reading: Reading) -> Document | BadLine:
    """The document of a record, or why there is none."""
    if isinstance(row, BadLine):
        return row
    try:
        text = text_of(row.fields, reading.text)
        utf8 = text.encode("utf-8")
        check_length(utf8)
        return Document(row.line, text, utf8)
    except ValueError as error:
        raw = row.raw or repr(row.fields)[:2000].encode("utf-8", "backslashreplace")
        return BadLine(row.line, reason_of(error), excerpt_of(raw))


def record_of_json(number: int, line: bytes) -> Row:
    try:
        check_length(line)
        fields = json.loads(line.decode("utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
        return Record(number, fields, line)
    except (ValueError, RecursionError) as error:
        return BadLine(number, reason_of(error), excerpt_of(line))


def check_length(line: bytes) -> None:
    if len(line) > MAX_RECORD_BYTES:
        raise ValueError(f"longer than {MAX_RECORD_BYTES >> 20} MiB")


def reason_of(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"half of a surrogate pair at character {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    return str(error)


def excerpt_of(line: bytes) -> str:
    return line[:2000].decode("utf-8", "backslashreplace").rstrip("\r\n")
