"""Documents are read exactly, however a file is cut, and what cannot be read is named by line and reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsgpt.data import sources
from dsgpt.data.sources import BadLine, Document, Documents, Piece, find_sources, first_line_of, read_documents
from dsgpt.errors import DataError


def read(path: Path, documents: Documents = "file", field: str = "text") -> list[Document | BadLine]:
    return list(read_documents(Piece(str(path), 0, path.stat().st_size), field, documents))


def texts(path: Path, documents: Documents = "file") -> list[str]:
    found = read(path, documents)
    assert all(isinstance(item, Document) and item.utf8 == item.text.encode() for item in found)
    return [item.text for item in found if isinstance(item, Document)]


def test_a_text_file_is_one_document_a_paragraph_or_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("é one\n  two\n\n \n\nthree\r\n\r\nfour".encode())
    assert texts(path, "file") == ["é one\n  two\n\n \n\nthree\r\n\r\nfour"]
    assert texts(path, "blank-line") == ["é one\n  two", "three", "four"]
    assert texts(path, "line") == ["é one", "  two", "three", "four"]
    assert [item.line for item in read(path, "blank-line")] == [1, 6, 8]


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
    (b'{"text": "one"} {"text": "two"}', None, "not JSON: Extra data"),
    (b'["text"]', None, "expected a JSON object, got list"),
    (b'{"body": "x", "id": 1}', None, "no field 'text'; fields: body, id"),
    (b'{"text": null}', None, "field 'text' is NoneType"),
    (b'{"text": 3}', None, "field 'text' is int"),
    (b'{"text": "\xff"}', None, "not UTF-8: byte 0xff at offset 10"),
    (b'{"text": "\\ud83d"}', None, "half of a surrogate pair"),
    (b"[" * 100_000, None, "nested too deeply"),
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
            assert text is None and reason in item.reason


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"good\ngood\nbad \xff\ngood")
    (whole,) = read(path, "file")
    assert isinstance(whole, BadLine) and whole.line == 3 and "0xff" in whole.reason
    assert [type(item) for item in read(path, "line")] == [Document, Document, BadLine, Document]


def test_a_line_beyond_the_bound_is_named_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "x" * n}) for n in (10, 986, 5000, 3)]
    path.write_text("\n".join(lines))
    found = read(path)
    assert [type(item) for item in found] == [Document, Document, BadLine, Document]
    assert [item.line for item in found] == [1, 2, 3, 4]
    path = tmp_path / "x.txt"
    path.write_text("\n".join(["short"] + ["y" * 300] * 5) + "\n\nlast")
    assert [type(item) for item in read(path, "blank-line")] == [BadLine, Document]


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_any_cut_gives_each_document_once_with_its_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [f"document {i} " + "é" * (i % 7) for i in range(12)]
    lines = [json.dumps({"text": row}, ensure_ascii=False) if name == "x.jsonl" else row for row in rows]
    lines[3:3] = ["", ""]
    path.write_text("\n".join(lines))
    size = path.stat().st_size
    whole = [(item.line, item.text) for item in read(path, "line") if isinstance(item, Document)]
    assert [text for _, text in whole] == rows
    for cut in range(1, size):
        pieces = [Piece(str(path), 0, cut), Piece(str(path), cut, size)]
        found = [(p, item) for p in pieces for item in read_documents(p, "text", "line")]
        numbered = [(item.line + first_line_of(p), item.text) for p, item in found if isinstance(item, Document)]
        assert numbered == whole, cut


def test_sources_are_found_in_folders_globs_and_files_once_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/deep/3.jsonl", "a.txt", "c.parquet", "b/.hidden.txt", ".git/x.txt", "set/train.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "set" / "dataset.json").write_text("{}")
    found = find_sources([tmp_path, tmp_path / "a.txt", f"{tmp_path}/b/**/*.jsonl"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.txt", "b/2.txt", "b/deep/3.jsonl"]
    assert find_sources([tmp_path], exclude=tmp_path / "b") == [tmp_path / "a.txt"]


def test_every_input_without_text_is_a_problem_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_text("x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    inputs = [tmp_path / name for name in ("empty", "x.parquet", "link.txt", "absent.txt", "*.csv")]
    with pytest.raises(DataError) as caught:
        find_sources(inputs)
    what = [problem.what for problem in caught.value.problems]
    assert what == [
        "an input holds no text files",
        "an input is of a kind that is not read",
        "an input is a dangling link",
        "an input does not exist",
        "an input does not exist",
    ]
    assert all(str(path) in problem.seen for path, problem in zip(inputs, caught.value.problems, strict=True))
