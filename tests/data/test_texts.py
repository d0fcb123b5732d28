"""Plain text, lines and tables are read exactly, however they are cut, and what cannot be read is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pytest

from dsgpt.data import formats
from dsgpt.data.sources import BadLine, Document, LargeDocument, Reading, can_be_cut, first_line_of
from dsgpt.errors import DataError
from tests.data.reading import in_pieces, kept_and_bad, read, read_within, records, texts
from tests.tokenizer.texts import DIFFICULT, fuzz

MIB = 1 << 20


def test_a_text_file_is_one_document_or_its_paragraphs_or_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("é one\n  two\n\n \n\nthree\r\n\r\nfour".encode())
    assert texts(path, "file") == ["é one\n  two\n\n \n\nthree\r\n\r\nfour"]
    assert texts(path, "blank-line") == ["é one\n  two", "three", "four"]
    assert texts(path, "line") == ["é one", "  two", "three", "four"]
    assert [item.line for item in read(path, "blank-line")] == [1, 6, 8]


@pytest.mark.parametrize("text", [*DIFFICULT, "".join(fuzz(200, seed=2)), "\n\n".join(fuzz(50, seed=3))])
def test_no_character_of_a_text_file_is_lost_or_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode())
    assert texts(path) == [text]
    blank = [line for line in text.split("\n") if line.strip(" \t\r\n\v\f")]
    assert texts(path, "line") == [line.removesuffix("\r") for line in blank]
    # Paragraphs together hold every line that is not blank.
    assert [line.removesuffix("\r") for part in texts(path, "blank-line") for line in part.split("\n")] == [
        line.removesuffix("\r") for line in blank
    ]


def test_a_byte_order_mark_is_no_part_of_the_text_but_at_the_start_only(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\n\xef\xbb\xbftwo")
    assert texts(path) == ["one\n\n\ufefftwo"]
    assert texts(path, "line") == texts(path, "blank-line") == ["one", "\ufefftwo"]


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"good\ngood\n\nbad \xff\ngood")
    assert kept_and_bad(path) == ([], [(4, "not UTF-8: byte 0xff at offset 15")])
    assert kept_and_bad(path, "blank-line") == ([(1, "good\ngood")], [(4, "not UTF-8: byte 0xff at offset 4")])
    assert kept_and_bad(path, "line")[0] == [(1, "good"), (2, "good"), (5, "good")]


# Every row: a line of a .jsonl file, and its text, or a part of the reason why it has none.
ROWS: list[tuple[bytes, str | None, str]] = [
    (b'{"text": "plain"}', "plain", ""),
    (b'{"text": "tab\\t nul\\u0000 e\\u0301 \xc3\xa9"}', "tab\t nul\0 e\u0301 é", ""),
    (b'{"text": "pair \\ud83d\\ude00"}', "pair 😀", ""),
    (b'  {"text": "spaces around"}  \r', "spaces around", ""),
    (b'{"text": ""}', "", ""),
    (b'{"text": "a\xe2\x80\xa8b\\r\\n"}', "a\u2028b\r\n", ""),
    (b'{"text": "cut', None, "not JSON"),
    (b"", None, "blank"),
    (b" \t\r", None, "blank"),
    (b'{"text": "one"} {"text": "two"}', None, "not JSON: Extra data"),
    (b'["text"]', None, "expected a JSON object, got list"),
    (b'{"body": "x", "id": 1}', None, "no field 'text'; fields: body, id"),
    (b'{"text": null}', None, "field 'text' is NoneType"),
    (b'{"text": 3}', None, "field 'text' is int"),
    (b'{"text": "raw nul \0"}', None, "not JSON: Invalid control character"),
    (b"\0\0\0\0", None, "not JSON"),
    (b'{"text": "\xff"}', None, "not UTF-8: byte 0xff at offset 10"),
    (b'{"text": "\\ud83d"}', None, "half of a surrogate pair"),
    (b"[" * 100_000, None, "nested too deeply"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", None, "4300"),
    (b'{"text": "no line end after it"}', "no line end after it", ""),
]


def test_each_jsonl_line_is_kept_or_named_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(row[0] for row in ROWS))
    expected = [(i + 1, text, reason) for i, (_, text, reason) in enumerate(ROWS) if reason != "blank"]
    found = read(path)
    assert len(found) == len(expected)
    for item, (line, text, reason) in zip(found, expected, strict=True):
        assert item.line == line
        if isinstance(item, Document):
            assert item.text == text
        else:
            assert text is None and reason in item.reason and item.excerpt


def test_a_line_of_100_mb_costs_itself_alone_and_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "' + b"x" * (100 * MIB) + b'"}\n{"text": "b"}\n')
    assert read_within(400, path) == "[(1, 'a'), (2, 'longer than 64 MiB'), (3, 'b')]"


def test_a_line_at_the_bound_is_kept_and_one_byte_more_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "x" * n}) for n in (10, 987, 988, 989, 5000, 3)]
    path.write_text("\n".join(lines))
    assert [len(line) + 1 for line in lines][1:4] == [1000, 1001, 1002]
    assert [type(item) for item in read(path)] == [Document, Document, BadLine, BadLine, BadLine, Document]
    assert [item.line for item in read(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_any_cut_gives_each_document_once_with_its_line(tmp_path: Path, name: str, bom: bytes) -> None:
    path = tmp_path / name
    rows = [f"document {i} " + "é" * (i % 7) for i in range(12)]
    lines = [json.dumps({"text": row}, ensure_ascii=False) if name == "x.jsonl" else row for row in rows]
    lines[3:3] = ["", ""]
    lines[5] += "\r"
    path.write_bytes(bom + "\n".join(lines).encode())
    reading = Reading(documents="line")
    assert can_be_cut(path, "line")
    whole = [(item.line, item.text) for item in read(path, "line")]
    assert [text for _, text in whole] == rows
    size = path.stat().st_size
    for cut in range(1, size):
        for cuts in ([cut], [cut, min(size, cut + 1)], [max(1, cut - 40), cut]):
            found = in_pieces(path, cuts, reading)
            assert [(item.line + first_line_of(piece), item.text) for piece, item in found] == whole, cuts


def test_what_cannot_be_cut_says_so(tmp_path: Path) -> None:
    assert not any(
        can_be_cut(f"x.{kind}", "line") for kind in ("json", "csv", "tsv", "txt.gz", "jsonl.zst", "jsonl.bz2")
    )
    assert not can_be_cut("x.txt", "file") and not can_be_cut("x.txt", "blank-line")
    assert not can_be_cut("hf:somebody/name.jsonl", "line")


def large_text() -> str:
    """5 MB in words of many bytes, with one blank line in the middle and nothing that ends a line elsewhere."""
    words = random.Random(0).choices(["é漢字😀", "plain ", "\r", "\u2028"], k=400_000)
    return "".join(words[:200_000]) + "\n \n" + "".join(words[200_000:])


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
@pytest.mark.parametrize("documents", ["file", "blank-line", "line"])
def test_text_above_the_bound_comes_in_chunks_that_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, documents: formats.Documents
) -> None:
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", MIB)
    path = tmp_path / name
    text = large_text()
    content = b"\xef\xbb\xbfshort\n\n" + text.encode() + b"\r\n\nend\n"
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    expected = [content[3:].decode()] if documents == "file" else ["short", *text.split("\n \n"), "end"]
    found = read(path, documents)
    assert [item.line for item in found] == ([1] if documents == "file" else [1, 3, 5, 7])
    for item, whole in zip(found, expected, strict=True):
        assert isinstance(item, LargeDocument) == (len(whole.encode()) > MIB)
        for _ in range(2 if isinstance(item, LargeDocument) else 0):
            chunks = list(item.chunks())
            assert "".join(chunk.decode() for chunk in chunks) == whole
            assert max(map(len, chunks)) <= MIB + 4 and item.num_bytes == len(whole.encode())
        assert isinstance(item, LargeDocument) or item.text == whole


@pytest.mark.parametrize("place", [0, MIB - 1, MIB, 3 * MIB - 2])
def test_large_text_that_is_not_utf8_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", MIB)
    path = tmp_path / "x.txt"
    content = bytearray(b"0123456\n" * (3 * MIB // 8))
    content[place] = 0xFF
    path.write_bytes(content)
    ((line, reason),) = kept_and_bad(path)[1]
    assert line == place // 8 + 1 and "0xff" in reason
    path.write_bytes(b"x" * (2 * MIB) + "é".encode()[:1])
    ((line, reason),) = kept_and_bad(path)[1]
    assert line == 1 and "not UTF-8: byte 0xc3" in reason


def test_200_mb_without_a_line_end_are_one_large_document_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"some words " * (MIB // 11), 1) * 200)
    assert read_within(200, path) == "[(1, '')]"


def test_a_paragraph_of_very_many_short_lines_is_held_in_its_own_size(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\n" * (4 * MIB))
    assert len(read_within(180, path, "blank-line")) > 8 * MIB


# A .json file, its texts, and the (line, part of a reason) of what is bad.
JSON: dict[str, tuple[str, list[str], list[tuple[int, str]]]] = {
    "a list": ('[{"text": "a"}, {"text": "b"}]', ["a", "b"], []),
    "an empty list": ("[ ]\n", [], []),
    "over several lines": ('\n[\n  {\n "text": "a"\n},{"text":"b",\n"x":[{"y":[]}]}\n]\n', ["a", "b"], []),
    "brackets in strings": ('[{"text": "a]}\\"[,{\\\\"}, {"text": "b"}]', ['a]}"[,{\\', "b"], []),
    "one record": ('{\n "text":\n "a"\n}\n', ["a"], []),
    "one record in a line": ('{"text": "a"}', ["a"], []),
    "a record in each line": ('{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"], []),
    "records one after another": ('{\n"text": "a"\n}\n{"text": "b"}{"text": "c"}', ["a", "b", "c"], []),
    "lines, the first one bad": ('{"text": "a\n{"text": "b"}\n', ["b"], [(1, "not JSON")]),
    "bad elements": (
        '[{"text": "a"},\n{"text": 3}, 4,\n{"text" "b"}, {"text": "c"}]',
        ["a", "c"],
        [(2, "field 'text' is int"), (2, "expected a JSON object, got int"), (3, "not JSON")],
    ),
    "a comma too many": ('[{"text": "a"},\n,{"text": "b"}]', ["a", "b"], [(2, "not JSON")]),
    "no record": ('"text"', [], [(1, "expected a JSON object, got str")]),
    "nothing": (" \n", [], []),
}


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_each_json_file_gives_its_records_and_names_what_is_none(tmp_path: Path, name: str, bom: str) -> None:
    content, expected, bad = JSON[name]
    path = tmp_path / "x.json"
    path.write_text(bom + content)
    good, found_bad = kept_and_bad(path)
    assert [text for _, text in good] == expected
    assert [line for line, _ in found_bad] == [line for line, _ in bad]
    assert all(part in reason for (_, reason), (_, part) in zip(found_bad, bad, strict=True))


@pytest.mark.parametrize(
    "content", ['[{"text": "a"},\n{"te', '[{"text": "a"}', '[{"text": "a"}] x', '[{"text": "a}]', '[{"a": 1}]]']
)
def test_a_json_list_that_does_not_end_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_json_lists_are_read_as_json_reads_them_wherever_a_chunk_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(7)
    values = [
        {"text": text, "x": [rng.random(), {"y": None, "ä": text[::-1]}]} for text in [*DIFFICULT, *fuzz(30, seed=4)]
    ]
    path = tmp_path / "x.json"
    for indent in (None, 2):
        for ascii_only in (True, False):
            path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), "utf-8")
            for size in (*range(1, 12), 64, 1000):
                monkeypatch.setattr("dsgpt.data.texts._CHUNK_BYTES", size)
                assert [fields for _, fields in records(path)] == values, size


def test_a_json_element_above_the_bound_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", MIB)
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "x" * (3 * MIB)}, {"text": "b"}], indent=1))
    assert kept_and_bad(path) == ([(2, "a"), (8, "b")], [(5, "longer than 1 MiB")])


def test_tables_of_any_fields_are_read_as_csv_reads_them(tmp_path: Path) -> None:
    rng = random.Random(11)
    pieces = [*"ab,;\"'\n\t é", "\r\n", '""']
    rows = [["".join(rng.choices(pieces, k=rng.randrange(6))) for _ in range(3)] for _ in range(500)]
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        for quoting, end in ((csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\n")):
            file = io.StringIO(newline="")
            csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(
                [["a", "text", "c"], *rows]
            )
            path = tmp_path / f"x.{kind}"
            path.write_bytes(b"\xef\xbb\xbf" + file.getvalue().encode())
            assert texts(path) == [row[1] for row in rows]
            oracle = csv.DictReader(io.StringIO(file.getvalue(), newline=""), delimiter=delimiter)
            assert [fields for _, fields in records(path)] == list(oracle)


def test_bad_rows_of_a_table_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'id,text\r\n1,"one\n\ntwo"\r\n2,a,b\n3\n4,\xff\n"5",five\n6,"a\nb",c\n\n7,"x"y\n8,')
    good, bad = kept_and_bad(path)
    assert good == [(2, "one\n\ntwo"), (8, "five"), (13, "")]
    assert bad == [
        (5, "3 fields, not 2 as in the header"),
        (6, "1 fields, not 2 as in the header"),
        (7, "not UTF-8: byte 0xff at offset 2"),
        (9, "3 fields, not 2 as in the header (lines 9 to 10)"),
        (12, "not a row: ',' expected after '\"'"),
    ]


def test_a_quote_that_never_closes_costs_its_line_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = [f"{i},row {i}" for i in range(2, 3000)]
    rows[10] = '12,"opened'
    path.write_text("\n".join(["id,text", *rows]))
    good, bad = kept_and_bad(path)
    assert [line for line, _ in good] == [i for i in range(2, 3000) if i != 12]
    assert bad == [(12, "a quote opens here and never closes (looked for up to line 2999)")]


def test_a_quote_that_closes_in_another_row_costs_its_line_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = [f'{i},"row {i}"' if i % 5 == 0 else f"{i},row {i}" for i in range(2, 300)]
    rows[10] = '12,"opened'
    rows[100] = '102,"opened'
    path.write_text("\n".join(["id,text", *rows]))
    good, bad = kept_and_bad(path)
    assert [text for _, text in good] == [f"row {i}" for i in range(2, 300) if i not in (12, 102)]
    assert [line for line, _ in bad] == [12, 102]
    assert all(reason.startswith("a quote opens here and does not close rightly: line") for _, reason in bad)


def test_a_quote_is_looked_for_no_further_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 10_000)
    path = tmp_path / "x.csv"
    path.write_text(
        "\n".join(
            ["id,text", '2,"opened', *(f"{i},row {i}" for i in range(3, 5000)), '5000,"' + "x" * 20_000 + '"', "z,z"]
        )
    )
    good, bad = kept_and_bad(path)
    assert [line for line, _ in good] == [*range(3, 5000), 5001]
    assert [line for line, _ in bad] == [2, 5000] and "never closes (looked for up to line 8" in bad[0][1]
    assert bad[1][1].startswith("longer than")


def test_a_table_whose_quotes_are_hopeless_is_refused_and_not_read_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,text\n" + 'a","a\n' * 100_000)
    with pytest.raises(DataError, match="quotes of a table do not match") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a,b\n1,2\n", "no column text; columns: a, b"),
        (b"text,b,text\n1,2,3\n", "several columns text"),
        (b"text,\xff\n1,2\n", "not UTF-8"),
        (b'"text,b\n1,2\n', "unexpected end of data"),
    ],
)
def test_a_table_without_the_columns_asked_for_is_refused_with_its_path(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read(path)
    assert str(path) in str(caught.value)
