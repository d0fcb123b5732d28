"""The corpus of the quickstart: complete, without near copies, the same on every call."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from dsgpt.errors import DataError
from dsgpt.quickstart.corpus import HELDOUT, build_corpus, near_duplicates, xz_bits_per_byte


def _lines(name: str, count: int) -> str:
    return "".join(f"{name}_{i} = {i}\n" for i in range(count))


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A standard library in small: every kind of file that build_corpus decides about."""
    root = tmp_path / "lib"
    files = {
        "ast.py": _lines("ast", 40),
        "copy_of_ast.py": _lines("ast", 39) + "last = 1\n",
        "json/__init__.py": _lines("json", 30),
        "json/decoder.py": _lines("decoder", 30),
        "copied_from_json.py": _lines("decoder", 30) + _lines("more", 8),
        "json/tests/test_json.py": _lines("test_json", 30),
        "site-packages/other.py": _lines("other", 30),
        "__pycache__/cached.py": _lines("cached", 30),
        "_sysconfigdata__linux.py": _lines("build", 30),
        "email/__init__.py": "\n",
        "notes.txt": _lines("notes", 30),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "latin.py").write_bytes("name = 'Ærø'\n".encode("latin-1"))
    return root


def _read(path: Path) -> dict[str, str]:
    return {(entry := json.loads(line))["path"]: entry["text"] for line in path.read_text("utf-8").splitlines()}


def test_every_file_is_written_held_out_dropped_or_counted(stdlib: Path, tmp_path: Path) -> None:
    summary = build_corpus(tmp_path / "out", holdout=("json",), source=stdlib)
    assert _read(summary.train) == {"ast.py": _lines("ast", 40)}
    assert _read(summary.heldout) == {"json/__init__.py": _lines("json", 30), "json/decoder.py": _lines("decoder", 30)}
    assert (summary.train_files, summary.heldout_files) == (1, 2)
    assert (summary.duplicate_files, summary.undecodable_files, summary.empty_files) == (2, 1, 1)
    assert summary.train_bytes == len(_lines("ast", 40))
    assert summary.heldout_bytes == len(_lines("json", 30)) + len(_lines("decoder", 30))


def test_two_calls_write_the_same_bytes_and_leave_nothing_else(stdlib: Path, tmp_path: Path) -> None:
    first = build_corpus(tmp_path / "a", holdout=("json",), source=stdlib)
    second = build_corpus(tmp_path / "b", holdout=("json",), source=stdlib)
    assert first.train.read_bytes() == second.train.read_bytes()
    assert first.heldout.read_bytes() == second.heldout.read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["heldout.jsonl", "train.jsonl"]


def test_a_library_without_the_held_out_packages_is_refused(stdlib: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no held-out text"):
        build_corpus(tmp_path / "out", holdout=("tomllib",), source=stdlib)


def test_half_of_the_smaller_file_makes_a_copy_and_less_does_not() -> None:
    base = _lines("base", 42)  # 40 shingles
    half = _lines("base", 22) + _lines("new", 20)  # shares 20 of its 40 shingles
    less = _lines("base", 21) + _lines("new", 21)  # shares 19 of 40
    assert near_duplicates({"base": base, "half": half}) == {"half": "base"}
    assert near_duplicates({"base": base, "less": less}) == {}


def test_an_excerpt_is_found_from_either_side_and_indentation_hides_nothing() -> None:
    whole, excerpt = _lines("x", 100), "".join(f"    x_{i} = {i}\n\n" for i in range(20))
    assert near_duplicates({"whole": whole, "excerpt": excerpt}) == {"excerpt": "whole"}
    assert near_duplicates({"excerpt": excerpt, "whole": whole}) == {"whole": "excerpt"}


def test_xz_bits_per_byte_is_the_size_of_an_xz_file_of_the_text() -> None:
    text = _lines("α", 500)
    packed = lzma.compress(text.encode(), format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    assert lzma.decompress(packed) == text.encode()
    assert xz_bits_per_byte(text) == 8 * len(packed) / len(text.encode())


def test_the_real_standard_library_gives_a_corpus_without_leaks(tmp_path: Path) -> None:
    summary = build_corpus(tmp_path)
    train, heldout = _read(summary.train), _read(summary.heldout)
    assert summary.train_bytes > 5_000_000
    assert 0.03 < summary.heldout_bytes / (summary.train_bytes + summary.heldout_bytes) < 0.1
    assert {name.split("/")[0] for name in heldout} == set(HELDOUT)
    assert not {name.split("/")[0].removesuffix(".py") for name in train} & set(HELDOUT)
    # The oracle is another measure than the shingles: whole lines of some length that both sides have.
    seen = {line.strip() for text in train.values() for line in text.splitlines()}
    long = [line.strip() for text in heldout.values() for line in text.splitlines() if len(line.strip()) > 40]
    assert sum(line in seen for line in long) / len(long) < 0.05
    assert 1.0 < summary.xz_bits_per_byte < 2.5
