"""Files are found once each, in an order that does not depend on the machine, and what is not there is named."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsgpt.data.sources import (
    BadLine,
    Piece,
    Reading,
    extent_of,
    find_sources,
    first_line_of,
    read_documents,
    read_records,
)
from dsgpt.errors import DataError
from tests.data.reading import records


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def found_in(folder: Path, *inputs: str, exclude: Path | None = None) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_sources([folder / name for name in inputs], exclude)]


def test_sources_are_found_in_folders_globs_and_files_once_and_sorted(tmp_path: Path) -> None:
    write(tmp_path, "b/2.txt", "b/deep/er/3.jsonl", "a.txt", "c.parquet", "b/4.csv.zst", "b/5.md", "b/6.TXT")
    write(
        tmp_path, "b/.hidden.txt", ".git/x.txt", "set/train.txt", "set/dataset.json", "tok/x.txt", "tok/tokenizer.json"
    )
    everything = ["a.txt", "b/2.txt", "b/4.csv.zst", "b/6.TXT", "b/deep/er/3.jsonl", "c.parquet"]
    assert found_in(tmp_path, "") == everything
    assert found_in(tmp_path, "c.parquet", "b/**/*", "a.txt", "b", "[ab].txt") == everything
    assert found_in(tmp_path, "b/*/**/*.jsonl") == ["b/deep/er/3.jsonl"]
    assert found_in(tmp_path, "", exclude=tmp_path / "b") == ["a.txt", "c.parquet"]


def test_a_name_with_the_letters_of_a_glob_is_found(tmp_path: Path) -> None:
    write(tmp_path, "[a]*?.txt", "a1.txt")
    assert found_in(tmp_path, "[a]*?.txt") == ["[a]*?.txt"]


def test_links_are_followed_and_give_each_file_once_though_they_lead_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "in/a/1.txt", "elsewhere/2.txt")
    for name, target in {"in/a/up": "in", "in/b": "in", "in/c": "elsewhere", "in/d.txt": "in/a/1.txt"}.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    assert found_in(tmp_path, "in") == ["in/a/1.txt", "in/c/2.txt"]


def test_every_input_without_text_is_a_problem_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path, "x.md")
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "empty.jsonl").touch()
    wrong = {
        "empty": "an input holds no text files",
        "x.md": "an input is of a kind that is not read",
        "link.txt": "an input is a dangling link",
        "absent.txt": "an input does not exist",
        "*.csv": "an input does not exist",
        "empty.jsonl": "an input is empty",
    }
    with pytest.raises(DataError) as caught:
        find_sources([tmp_path / name for name in wrong])
    assert [problem.what for problem in caught.value.problems] == list(wrong.values())
    for name, problem in zip(wrong, caught.value.problems, strict=True):
        assert str(tmp_path / name) in problem.seen and problem.do


def test_a_folder_names_every_file_in_it_that_was_lost_on_its_way(tmp_path: Path) -> None:
    write(tmp_path, "in/good.txt")
    for name in ("empty.txt", "empty.jsonl.gz", "empty.parquet", "empty.arrow"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError) as caught:
        find_sources([tmp_path])
    names = ["empty.arrow", "empty.jsonl.gz", "empty.parquet", "gone.jsonl"]
    for name, problem in zip(names, caught.value.problems, strict=True):
        assert str(tmp_path / "in" / name) in problem.seen


def test_no_input_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no input given"):
        find_sources([])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_entered_is_named_and_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "in/a.txt", "in/locked/b.txt")
    (tmp_path / "in" / "locked").chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(0o755)
    code = (
        "import os, sys; from dsgpt.data.sources import find_sources\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "find_sources([sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "in")], capture_output=True, text=True)
    assert "a folder cannot be read" in done.stderr and str(tmp_path / "in" / "locked") in done.stderr


def test_the_extent_of_a_file_is_its_size(tmp_path: Path) -> None:
    write(tmp_path, "x.txt")
    assert extent_of(tmp_path / "x.txt") == (1, 1)
    with pytest.raises(FileNotFoundError):
        extent_of(tmp_path / "absent.txt")


def test_records_come_with_all_fields_and_bad_ones_between_them(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"messages": [{"role": "user"}], "n": 1}\n\n{"messages"\n{"a": null}\n'))
    (good, bad, other) = records(path)
    assert good == (1, {"messages": [{"role": "user"}], "n": 1}) and other == (4, {"a": None})
    assert isinstance(bad, BadLine) and (bad.line, bad.excerpt) == (3, '{"messages"')


def test_what_has_no_records_or_is_not_read_at_all_is_refused_with_its_path(tmp_path: Path) -> None:
    write(tmp_path, "x.txt", "x.md")
    with pytest.raises(DataError, match=r"plain text holds no records\n.*x.txt"):
        records(tmp_path / "x.txt")
    for reader in (lambda piece: read_documents(piece, Reading()), read_records):
        with pytest.raises(DataError, match=r"a kind that is not read\n.*x.md"):
            list(reader(Piece(str(tmp_path / "x.md"), 0, 1)))


def test_only_lines_that_are_cut_are_counted_from_their_piece(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{}\n{}\n{}\n")
    # A line that begins before a piece is not its; those behind are numbered from 1 in it.
    assert [first_line_of(Piece(str(path), start, 9)) for start in range(9)] == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert first_line_of(Piece("hf:somebody/name.jsonl", 1, 2)) == 0
    assert first_line_of(Piece("x.parquet", 1, 2)) == 0
