"""Reads .txt, .jsonl, .json, .csv and .tsv: plain text, lines, and records that can span lines.

    for item in read_text(piece, reading): ...      also read_jsonl, read_json, read_table

A .txt file is kept exactly as it is (line ends, NULs, odd spaces); only a byte-order mark at the start of a file and the
line end that closes a document are taken off. Memory is bounded by the largest record: a line or element above 64 MiB
is passed over and named, plain text above it is handed over as a LargeDocument.

Trade-off: a .json list is cut into its elements by a scan of brackets and quotes and each is then parsed by itself, so
that one bad element costs one element and a list of any length takes no memory. Tables are read by the letter of RFC
4180: text after a closing quote makes a row bad, where lenient readers would change the text.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import BinaryIO, cast

from dsgpt.data import formats
from dsgpt.data.formats import (
    BOM,
    BadLine,
    Document,
    Item,
    LargeDocument,
    Piece,
    Reading,
    Record,
    Row,
    excerpt_of,
    kind_of,
    naming,
    open_bytes,
    read_lines,
    reason_of,
    record_of_json,
    scan_lines,
)
from dsgpt.errors import DataError

_CHUNK_BYTES = 1 << 20
_AT_THE_END = "unexpected end of data"  # what csv.reader says of a quote that is open at the end
_MAX_REPEATS = 4  # of all that was read of a table; above that its quotes are hopeless


def read_text(piece: Piece, reading: Reading) -> Iterator[Item]:
    """Plain text, as `reading.documents` divides it. Blank lines between lines or paragraphs are no documents."""
    if reading.documents == "line":
        return _read_lines(piece)
    return _read_paragraphs(piece) if reading.documents == "blank-line" else _read_file(piece)


def _read_lines(piece: Piece) -> Iterator[Item]:
    for number, line, offset, length in scan_lines(piece):
        if length > formats.MAX_RECORD_BYTES:
            yield _large(piece.path, number, offset, offset + length, closed=True)
        elif (body := _without_end(line)).strip():
            yield _decoded(number, body)


def _read_paragraphs(piece: Piece) -> Iterator[Item]:
    first = begin = end = 0
    kept = bytearray()  # a list of short lines would take many times their bytes

    def finished() -> Item:
        if end - begin > formats.MAX_RECORD_BYTES:
            return _large(piece.path, first, begin, end, closed=True)
        return _decoded(first, _without_end(bytes(kept)))

    for number, line, offset, length in scan_lines(piece):
        if length > len(line) or line.strip():
            if not first:
                first, begin = number, offset
            end = offset + length
            kept += line
            if end - begin > formats.MAX_RECORD_BYTES:
                kept.clear()  # too long to be handed over whole: it is read again, in chunks
        elif first:
            yield finished()
            first = 0
            kept.clear()
    if first:
        yield finished()


def _read_file(piece: Piece) -> Iterator[Item]:
    with open_bytes(piece.path) as stream:
        body = stream.read(formats.MAX_RECORD_BYTES + len(BOM) + 1)
    skipped = len(BOM) if body.startswith(BOM) else 0
    if len(body) - skipped > formats.MAX_RECORD_BYTES:
        del body
        yield _large(piece.path, 1, skipped, None, closed=False)
        return
    body = body[skipped:]
    try:
        yield Document(1, body.decode("utf-8"), body)
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        yield BadLine(line, reason_of(error), excerpt_of(body[max(0, error.start - 40) :]))


def _large(path: str, line: int, start: int, stop: int | None, closed: bool) -> LargeDocument | BadLine:
    """Content bytes [start, stop) as one document; with `closed`, less the line end it closes with."""
    if closed and stop is not None:
        tail = b"".join(_content(path, stop - 2, stop))
        stop -= len(tail) - len(_without_end(tail))
    decode = codecs.getincrementaldecoder("utf-8")().decode
    num_bytes = num_lines = 0
    for chunk in _content(path, start, stop):
        try:
            decode(chunk)
        except UnicodeDecodeError as error:
            # Up to three bytes of the character may stand in the chunk before.
            num_lines += error.object.count(b"\n", 0, error.start)
            reason = f"not UTF-8: byte 0x{error.object[error.start]:02x} near offset {num_bytes}"
            return BadLine(line + num_lines, reason, excerpt_of(error.object[max(0, error.start - 40) :]))
        num_bytes += len(chunk)
        num_lines += chunk.count(b"\n")
    try:
        decode(b"", True)
    except UnicodeDecodeError as error:
        return BadLine(line + num_lines, f"{reason_of(error)} of its last bytes", excerpt_of(error.object))
    return LargeDocument(line, partial(_chunks, path, start, stop), num_bytes)


def _chunks(path: str, start: int, stop: int | None) -> Iterator[bytes]:
    """Content bytes [start, stop), never cut inside a character."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    with naming(path):
        for chunk in _content(path, start, stop):
            yield decode(chunk).encode("utf-8")


def _content(path: str, start: int, stop: int | None) -> Iterator[bytes]:
    with open_bytes(path) as stream:
        position = 0 if (kind_of(path) or ("", ""))[1] else stream.seek(start)
        while position < start and (passed := stream.read(min(_CHUNK_BYTES, start - position))):
            position += len(passed)
        while stop is None or position < stop:
            chunk = stream.read(_CHUNK_BYTES if stop is None else min(_CHUNK_BYTES, stop - position))
            if not chunk:
                return
            position += len(chunk)
            yield chunk


def _decoded(number: int, body: bytes) -> Document | BadLine:
    try:
        return Document(number, body.decode("utf-8"), body)
    except UnicodeDecodeError as error:
        return BadLine(number, reason_of(error), excerpt_of(body))


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def read_jsonl(piece: Piece, fields: tuple[str, ...] = ()) -> Iterator[Row]:
    """The object in each line; every record may have other fields, so those asked for are not looked for here."""
    for number, line in read_lines(piece):
        if line.strip():
            yield record_of_json(number, line)


def read_json(piece: Piece, fields: tuple[str, ...] = ()) -> Iterator[Row]:
    """A list of records, one record, or, as many a .json file, a record in each line."""
    is_list = _first_byte(piece.path) == b"["
    filled = (line for _, line in read_lines(piece) if line.strip())
    # The first line may be a bad one; the second line of a record over several lines is none by itself.
    if not is_list and any(isinstance(record_of_json(1, line), Record) for line in islice(filled, 2)):
        yield from read_jsonl(piece)
        return
    with open_bytes(piece.path) as stream:
        if cast(io.BufferedReader, stream).peek(len(BOM)).startswith(BOM):
            stream.read(len(BOM))
        for number, element in _elements(stream, piece.path, is_list):
            yield record_of_json(number, element)


def _first_byte(path: str) -> bytes:
    """The first byte that is not space; lists can be one line of any length, so that is not asked for."""
    with open_bytes(path) as stream:
        chunk = stream.read(_CHUNK_BYTES).removeprefix(BOM)
        while chunk and not chunk.strip():
            chunk = stream.read(_CHUNK_BYTES)
    return chunk.lstrip()[:1]


_MARK = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


def _elements(stream: BinaryIO, path: str, is_list: bool) -> Iterator[tuple[int, bytes]]:
    """(line, bytes) of each element of a list, or of each object one after another; cut above MAX_RECORD_BYTES."""
    element, held = _Element(), b""
    depth, in_string, closed = 0, False, False
    while chunk := stream.read(_CHUNK_BYTES):
        chunk, held = held + chunk, b""
        start = position = 0
        while position < len(chunk):
            if in_string:
                position = _IN_STRING.match(chunk, position).end()  # type: ignore[union-attr]
                if chunk[position : position + 1] == b"\\":
                    chunk, held = chunk[:position], chunk[position:]  # what it escapes is in the next chunk
                elif position < len(chunk):
                    in_string, position = False, position + 1
                continue
            mark = _MARK.search(chunk, position)
            if mark is None:
                break
            position = mark.end()
            if mark[0] == b'"':
                in_string = True
                continue
            opens, closes = mark[0] in b"[{", mark[0] in b"]}"
            depth += opens - closes
            if not is_list and closes and depth == 0:
                element.add(chunk[start:position])
                start = position
                yield element.take()
            elif is_list and not closed and depth == (0 if closes else 1):
                # The list opens or closes here, or a comma ends an element.
                element.add(chunk[start : position - 1])
                start, closed = position, closes
                found = element.take()
                if not opens and (found[1] or not closes):
                    yield found
        element.add(chunk[start:])
    rest = element.take()[1]
    if in_string or depth or (is_list and (rest or not closed)):
        what = "text after the list" if closed else "it ends before its list or object does"
        do = "get the file anew, or write one record in each line"
        raise DataError("a .json file is not JSON", seen=f"{path}:{element.line}: {what}", do=do)
    if rest and not is_list:
        yield element.begun, rest


class _Element:
    """The bytes of an element as they come, up to the bound, and the line it begins in."""

    def __init__(self) -> None:
        self.line = self.begun = 1
        self._kept = bytearray()

    def add(self, data: bytes) -> None:
        if not self._kept:
            stripped = data.lstrip()
            self.line += data.count(b"\n", 0, len(data) - len(stripped))
            self.begun, data = self.line, stripped
        self.line += data.count(b"\n")
        self._kept += data[: max(0, formats.MAX_RECORD_BYTES + 1 - len(self._kept))]

    def take(self) -> tuple[int, bytes]:
        taken = bytes(self._kept) if len(self._kept) > formats.MAX_RECORD_BYTES else bytes(self._kept.rstrip())
        self._kept.clear()
        return self.begun, taken


def read_table(piece: Piece, fields: tuple[str, ...], delimiter: str) -> Iterator[Row]:
    """Rows under a header; a row with another number of fields is bad."""
    csv.field_size_limit(2 * formats.MAX_RECORD_BYTES)  # in characters, and for good measure: _Feed counts the bytes
    feed = _Feed(piece)
    rows = csv.reader(feed, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        feed.begin()
        try:
            row = next(rows)
        except StopIteration:
            return
        except (csv.Error, _TooLongError) as error:
            if header is None:
                raise _bad_header(piece.path, str(error)) from error
            yield BadLine(feed.line, feed.reason(error), excerpt_of(feed.first))
            feed.repeat()
            continue
        if not row:
            continue
        if header is None:
            header = row
            _check_header(piece.path, header, fields, feed.error)
        elif feed.error is not None:
            yield BadLine(feed.line, reason_of(feed.error), excerpt_of(feed.first))
        elif len(row) != len(header):
            where = f" (lines {feed.line} to {feed.last})" if feed.last > feed.line else ""
            reason = f"{len(row)} fields, not {len(header)} as in the header{where}"
            yield BadLine(feed.line, reason, excerpt_of(feed.first))
        else:
            yield Record(feed.line, dict(zip(header, row, strict=True)), feed.first)


def _check_header(path: str, header: list[str], fields: tuple[str, ...], error: UnicodeDecodeError | None) -> None:
    if error is not None:
        raise _bad_header(path, reason_of(error))
    if missing := [field for field in fields if field not in header]:
        raise _bad_header(path, f"no column {', '.join(missing)}; columns: {', '.join(header)}")
    if twice := [field for field in fields or header if header.count(field) > 1]:
        raise _bad_header(path, f"several columns {twice[0]}; columns: {', '.join(header)}")


def _bad_header(path: str, seen: str) -> DataError:
    do = "name a column of the header, or a template of some, as the text field"
    return DataError("a table does not have the columns asked for", seen=f"{path}: {seen}", do=do)


class _TooLongError(Exception):
    """A row is longer than a record may be."""


class _Feed:
    """The lines of a table for csv.reader, which of them the row at hand took, and the way back where it took too many.

    A quote that opens by mistake swallows all lines up to the next quote, or up to the end. Such a row costs its first
    line only: the others are read once more, from memory, as rows of their own.
    """

    def __init__(self, piece: Piece):
        self._path = piece.path
        self._lines = read_lines(piece)
        self._held = io.BytesIO()
        self._held_line = 0  # the number of the line before those held
        self._read = self._repeated = 0
        self.begin()

    def begin(self) -> None:
        self.line = self.last = 0
        self._row, self._num_first, self._from_held = bytearray(), 0, 0
        self.error: UnicodeDecodeError | None = None

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        if line := self._held.readline():
            self._held_line += 1
            self._from_held += len(line)
            number = self._held_line
        else:
            number, line = next(self._lines)
            self._read += len(line)
        self._row += line
        self.last = number
        if not self.line:
            self.line, self._num_first = number, len(line)
        if len(self._row) > formats.MAX_RECORD_BYTES:
            raise _TooLongError(f"longer than {formats.MAX_RECORD_BYTES >> 20} MiB")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.error = self.error or error
            return line.decode("utf-8", "backslashreplace")

    @property
    def first(self) -> bytes:
        """The first line of the row, or much of it."""
        return bytes(self._row[: min(2000, self._num_first)])

    def reason(self, error: Exception) -> str:
        """What is wrong with the row; `error` is what the reader met at its last line."""
        lines = self.last - self.line
        if str(error) == _AT_THE_END or (lines and isinstance(error, _TooLongError)):
            return f"a quote opens here and never closes (looked for up to line {self.last})"
        if not lines:
            return str(error) if isinstance(error, _TooLongError) else f"not a row: {error}"
        return f"a quote opens here and does not close rightly: line {self.last}: {error}"

    def repeat(self) -> None:
        """Take back all lines of the row but its first."""
        taken = len(self._row) - self._num_first
        if not taken:
            return
        self._repeated += taken
        if self._repeated > _MAX_REPEATS * self._read + _CHUNK_BYTES:
            do = "write the table anew, with its fields quoted as RFC 4180 says"
            raise DataError("the quotes of a table do not match", seen=f"{self._path}:{self.line}", do=do)
        if self._from_held == len(self._row):
            self._held.seek(-taken, io.SEEK_CUR)
        else:
            self._held = io.BytesIO(memoryview(self._row)[self._num_first :])
        self._held_line = self.line
