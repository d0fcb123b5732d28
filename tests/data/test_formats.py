"""One real example of every format that is read, judged by the readers of pandas, pyarrow, csv, json and gzip."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsgpt.data.formats import Record, document_of, kind_of, open_bytes
from dsgpt.data.sources import BadLine, Document, Piece, Reading, find_sources, read_documents
from dsgpt.errors import ConfigError, DataError
from tests.data.reading import read, read_within, records, texts
from tests.tokenizer.texts import DIFFICULT, fuzz

pandas = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")

TEXTS = [*DIFFICULT, *fuzz(40, seed=1), 'quote " comma , tab \t', 'two\nlines, "quoted"']
RECORDS = [{"id": i, "text": text, "title": f"title {i}"} for i, text in enumerate(TEXTS)]


def _table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text", "title"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return file.getvalue().encode()


def _arrow(new: Callable[..., object]) -> bytes:
    table, sink = pa.Table.from_pylist(RECORDS), io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, 10)
    return sink.getvalue()


def _parquet() -> bytes:
    sink = io.BytesIO()
    pandas.DataFrame(RECORDS).to_parquet(sink, row_group_size=10)
    return sink.getvalue()


CONTENTS: dict[str, Callable[[], bytes]] = {
    "jsonl": lambda: "".join(json.dumps(record) + "\n" for record in RECORDS).encode(),
    "json": lambda: json.dumps(RECORDS, indent=1, ensure_ascii=False).encode(),
    "csv": lambda: _table(","),
    "tsv": lambda: _table("\t"),
    "parquet": _parquet,
    "stream.arrow": lambda: _arrow(pa.ipc.new_stream),
    "file.arrow": lambda: _arrow(pa.ipc.new_file),
}
ORACLES: dict[str, Callable[[Path], list[str]]] = {
    "jsonl": lambda path: pandas.read_json(path, lines=True, dtype=False, convert_dates=False)["text"].tolist(),
    "json": lambda path: [record["text"] for record in json.loads(path.read_bytes())],
    "csv": lambda path: pandas.read_csv(path, keep_default_na=False, lineterminator=None)["text"].tolist(),
    "tsv": lambda path: [
        row["text"] for row in csv.DictReader(io.StringIO(path.read_bytes().decode(), ""), delimiter="\t")
    ],
    "parquet": lambda path: pandas.read_parquet(path)["text"].tolist(),
    "stream.arrow": lambda path: pa.ipc.open_stream(path.read_bytes()).read_all()["text"].to_pylist(),
    "file.arrow": lambda path: pa.ipc.open_file(path.read_bytes()).read_all()["text"].to_pylist(),
}


def _zst(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": _zst,
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_each_format_gives_the_texts_that_its_own_reader_finds(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(CONTENTS[kind]())
    assert texts(path) == TEXTS
    assert ORACLES[kind](path) == TEXTS


@pytest.mark.parametrize("kind", CONTENTS)
def test_each_format_gives_whole_records_with_the_line_they_begin_in(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(CONTENTS[kind]())
    strings = kind in ("csv", "tsv")
    expected = [{**record, "id": str(record["id"])} if strings else record for record in RECORDS]
    found = records(path)
    assert [fields for _, fields in found] == expected
    assert [line for line, _ in found] == [item.line for item in read(path)]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "tsv"])
def test_each_text_format_is_read_out_of_each_compression(tmp_path: Path, kind: str, packing: str) -> None:
    content = "\n".join(TEXTS).encode() if kind == "txt" else CONTENTS[kind]()
    plain, packed = tmp_path / f"x.{kind}", tmp_path / f"x.{kind}.{packing}"
    plain.write_bytes(content)
    packed.write_bytes(PACKED[packing](content))
    assert read(packed) == read(plain) != []


@pytest.mark.parametrize("packing", PACKED)
def test_files_of_several_compressed_members_are_read_to_their_end(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"x.txt.{packing}"
    path.write_bytes(b"".join(PACKED[packing](data) for data in (b"one\ntw", b"", b"o\nthree")))
    assert texts(path, "line") == ["one", "two", "three"]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("damage", ["cut off", "empty", "not packed at all"])
def test_a_compressed_file_that_is_damaged_is_refused_with_its_path(tmp_path: Path, packing: str, damage: str) -> None:
    path = tmp_path / f"x.jsonl.{packing}"
    packed = PACKED[packing](b'{"text": "some text"}\n' * 1000)
    path.write_bytes({"cut off": packed[:-9], "empty": b"", "not packed at all": b'{"text": "a"}\n'}[damage])
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("packing", PACKED)
def test_no_flipped_bit_of_a_compressed_file_changes_a_text_unseen(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"x.txt.{packing}"
    text = "".join(f"{i * 7919} " for i in range(40))
    command = {**PACKED, "zst": _checked_zst}[packing]
    packed = command(text.encode())
    if packing == "zst" and packed == b"":
        pytest.skip("no library here writes zstd checksums")
    for place in range(len(packed)):
        path.write_bytes(packed[:place] + bytes([packed[place] ^ 0x10]) + packed[place + 1 :])
        try:
            found = read(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert [item.text for item in found] == [text], place


def _checked_zst(data: bytes) -> bytes:
    """With a checksum, as the command zstd writes it; pyarrow writes none."""
    try:
        return subprocess.run(["zstd", "-c", "-q"], input=data, capture_output=True, check=True).stdout
    except FileNotFoundError:
        return b""


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow"])
def test_a_table_cut_off_anywhere_is_refused_with_its_path(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    content = CONTENTS[kind]()
    for size in [*range(0, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(path) in str(caught.value), size


def test_a_line_of_half_a_gigabyte_in_a_small_gz_file_is_named_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    zeros = gzip.compress(bytes(1 << 20), 1) * 512
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "') + zeros + gzip.compress(b'"}\n{"text": "b"}'))
    assert path.stat().st_size < 4 << 20
    assert read_within(300, path) == "[(1, 'a'), (2, 'longer than 64 MiB'), (3, 'b')]"


def test_names_tell_what_a_file_is() -> None:
    known = ("x.txt", "a.b.jsonl", "x.JSON.GZ", "x.csv.zst", "x.tsv.xz", "x.txt.bz2", "x.parquet", "x.arrow")
    assert [kind_of(name) for name in known] == [
        ("txt", ""),
        ("jsonl", ""),
        ("json", "gz"),
        ("csv", "zst"),
        ("tsv", "xz"),
        ("txt", "bz2"),
        ("parquet", ""),
        ("arrow", ""),
    ]
    assert {kind_of(name) for name in ("x", "x.md", "x.gz", ".jsonl", "x.parquet.gz", "x.txt.zip", "txt")} == {None}


def test_a_template_joins_the_fields_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"title": "T {x}", "body": "B", "n": 1}\n{"title": "only"}\n{"title": "T", "body": null}\n')
    good, *bad = read(path, text="{title}\\n\\n{{{body}}}\\t{title}")
    assert good.text == "T {x}\n\n{B}\tT {x}"
    assert [item.reason for item in bad] == [
        "no field 'body'; fields: title",
        "field 'body' is NoneType, not a string",
    ]
    assert texts(path, text="title") == ["T {x}", "only", "T"]
    assert Reading("{title}: {body} {title}").fields == ("title", "body")


@pytest.mark.parametrize("text", ["{", "a{b", "{}", "{a!r}", "{a:>9}", "}", "{{a}}", "{0.x"])
def test_a_template_that_is_none_is_refused_at_once(text: str) -> None:
    with pytest.raises(ConfigError):
        Reading(text)


def test_other_kinds_of_documents_are_refused() -> None:
    with pytest.raises(ConfigError, match="file, blank-line, line"):
        Reading(documents="page")  # type: ignore[arg-type]


def test_a_bad_record_is_shown_as_the_file_has_it_and_cut() -> None:
    bad = document_of(Record(3, {"a": 1}, b'{"a":1}'), Reading())
    assert bad == BadLine(3, "no field 'text'; fields: a", '{"a":1}')
    bad = document_of(Record(3, {"a": "x" * 5000}), Reading())
    assert isinstance(bad, BadLine) and len(bad.excerpt) == 2000
    assert isinstance(document_of(Record(3, {"text": "\ud83d"}), Reading()), BadLine)


def test_errors_of_the_disk_are_not_taken_for_damage(tmp_path: Path) -> None:
    for name in ("x.txt", "x.jsonl.gz", "x.csv.zst", "x.parquet", "x.arrow"):
        with pytest.raises(FileNotFoundError):
            list(read_documents(Piece(str(tmp_path / name), 0, 10), Reading()))
    with pytest.raises(FileNotFoundError):
        open_bytes(tmp_path / "x.txt.xz")


def test_stdin_is_kept_under_a_name_that_says_what_it_holds(tmp_path: Path) -> None:
    for name, content in {
        "stdin.txt": b"just [text]",
        "stdin.jsonl": b'\xef\xbb\xbf \n{"text": "a"}\n',
        "stdin.json": b' [\n {"text": "a"}]',
        "stdin.jsonl.gz": gzip.compress(b'{"text": "a"}'),
        "stdin.txt.zst": _zst(b"plain"),
        "stdin.csv": b"",
        "stdin.parquet": CONTENTS["parquet"](),
        "stdin.arrow": CONTENTS["file.arrow"](),
    }.items():
        folder = tmp_path / name
        code = "import sys; from dsgpt.data.sources import find_sources; print(*find_sources(['-'], spool=sys.argv[1]))"
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, input=content, capture_output=True)
        if not content:
            assert b"standard input is empty" in done.stderr
            continue
        (path,) = done.stdout.decode().split()
        assert path == str(folder / name) and Path(path).read_bytes() == content
        assert all(isinstance(item, Document) for item in read(path))


def test_stdin_is_refused_where_it_cannot_be_kept() -> None:
    with pytest.raises(DataError, match="standard input cannot be read here"):
        find_sources(["-"])


def test_reading_needs_neither_pyarrow_nor_datasets_before_a_file_does(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}')
    code = (
        "import sys; from dsgpt.data.sources import *\n"
        "list(read_documents(Piece(sys.argv[1], 0, 9), Reading()))\n"
        "print([name for name in ('torch', 'pyarrow', 'datasets', 'pandas') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.jsonl")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
