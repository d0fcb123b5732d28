"""The sample a tokenizer is trained on is bounded, uniform, repeatable and on record."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from dsgpt.cli.tokenizer import tokenizer as command
from dsgpt.data.train_tokenizer import draw_sample, train_tokenizer
from dsgpt.errors import DataError
from tests.tokenizer.texts import python_sources


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Two files of 3 and 1 MB whose lines say where they stand."""
    paths = []
    for name, lines in (("a.txt", 100_000), ("b.jsonl", 22_000)):
        path = tmp_path / name
        with open(path, "w") as stream:
            for i in range(lines):
                text = f"{name} line {i:08d} of a text"
                stream.write(json.dumps({"text": text}) + "\n" if name == "b.jsonl" else text + "\n")
        paths.append(str(path))
    return paths


def test_a_small_corpus_is_taken_whole(corpus: list[str]) -> None:
    texts, record = draw_sample(corpus, 10**9, seed=1, text_field="text")
    assert record["drawn"] == "all"
    assert texts[0] == Path(corpus[0]).read_text()
    assert texts[1:] == [json.loads(line)["text"] for line in Path(corpus[1]).read_text().splitlines()]


def test_a_large_corpus_is_sampled_to_the_bound_from_everywhere(corpus: list[str]) -> None:
    texts, record = draw_sample(corpus, 1_000_000, seed=1, text_field="text")
    assert 1_000_000 <= record["bytes"] < 1_070_000
    assert record["bytes"] == sum(len(text.encode()) for text in texts)
    lines = [line for text in texts for line in text.split("\n") if line]
    numbers = {name: [int(line.split()[2]) for line in lines if line.startswith(name)] for name in ("a.txt", "b.jsonl")}
    for name, total in (("a.txt", 100_000), ("b.jsonl", 22_000)):
        found = numbers[name]
        assert len(set(found)) == len(found)
        # From both halves, which a prefix of the corpus would not be.
        assert min(found) < total / 2 < max(found)
    assert all(line.endswith("of a text") for line in lines)


def test_the_seed_alone_decides_the_sample(corpus: list[str]) -> None:
    first, again, other = (draw_sample(corpus, 500_000, seed=seed, text_field="text")[1] for seed in (1, 1, 2))
    assert first["sha256"] == again["sha256"] != other["sha256"]


def test_files_that_are_read_from_the_front_are_sampled_from_everywhere_too(corpus: list[str]) -> None:
    packed = [f"{path}.gz" for path in corpus]
    for path, target in zip(corpus, packed, strict=True):
        Path(target).write_bytes(gzip.compress(Path(path).read_bytes(), 1, mtime=0))
    size = sum(Path(path).stat().st_size for path in packed)
    texts, record = draw_sample(packed, 3 * size // 4, seed=1, text_field="text")
    assert record["texts"] > 1 and record["bytes"] <= size
    lines = [line for text in texts for line in text.split("\n")]
    numbers = [int(line.split()[2]) for line in lines if line.startswith("a.txt") and line.endswith("of a text")]
    assert len(set(numbers)) == len(numbers) and min(numbers) < 50_000 < max(numbers)
    assert any(line.startswith("b.jsonl") for line in lines)
    assert record == draw_sample(packed, 3 * size // 4, seed=1, text_field="text")[1]


def numbered(name: str, count: int) -> list[str]:
    return [f"{name} {i:08d} of a text" for i in range(count)]


def shares(texts: list[str], count: int, parts: int = 10) -> list[float]:
    """Which share of the sampled lines stands in each tenth of the file."""
    whole = re.compile(r"^line (\d{8}) of a text$", re.MULTILINE)
    found = [int(number) for text in texts for number in whole.findall(text)]
    assert len(set(found)) == len(found)
    return [sum(part == number * parts // count for number in found) / len(found) for part in range(parts)]


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        pytest.param("a.jsonl", marks=pytest.mark.slow),
        pytest.param("a.jsonl.gz", marks=pytest.mark.slow),
        pytest.param("a.csv", marks=pytest.mark.slow),
        "a.parquet",
    ],
)
def test_every_tenth_of_a_file_is_drawn_alike_and_to_the_bound(name: str, tmp_path: Path) -> None:
    lines = numbered("line", 200_000)
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": lines}), path, row_group_size=25_000, compression="none")
    else:
        records = name.startswith("a.jsonl")
        content = "\n".join(f'{{"text": "{line}"}}' if records else line for line in ["text", *lines]) + "\n"
        path.write_bytes(gzip.compress(content.encode(), 1) if name.endswith("gz") else content.encode())
    texts, record = draw_sample([str(path)], 1_500_000, seed=3, text_field="text")
    # Of 23 blocks two or three are expected in a tenth; that nine or more come is less likely than one in a thousand.
    assert max(shares(texts, len(lines))) < 9 / 23
    assert sum(share > 0 for share in shares(texts, len(lines))) >= 7
    assert 1_200_000 < record["bytes"] < 1_500_000 + 65536
    assert record["bytes"] == sum(len(text.encode()) for text in texts)


def test_a_small_packed_file_that_holds_much_is_drawn_from_and_not_cut_off(tmp_path: Path) -> None:
    lines = numbered("line", 400_000)
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress("\n".join(lines).encode(), preset=0))
    assert path.stat().st_size < 1_000_000
    texts, record = draw_sample([str(path)], 1_000_000, seed=3, text_field="text")
    assert 900_000 < record["bytes"] < 1_000_000 + 65536
    assert max(shares(texts, len(lines))) < 8 / 15 and record["drawn"] != "all"


def bytes_read() -> int:
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


@pytest.mark.parametrize("character", [pytest.param("x", marks=pytest.mark.slow), "漢"])
def test_a_text_without_lines_is_drawn_from_everywhere_and_not_read_whole(character: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    word = character * 9
    path.write_text(" ".join(f"{word}{i:07d}" for i in range(2_000_000)), "utf-8")
    size, before = path.stat().st_size, bytes_read()
    texts, record = draw_sample([str(path)], 1_000_000, seed=1, text_field="text")
    # open() reads a megabyte ahead, for each of 16 blocks.
    assert bytes_read() - before < 17 * (1 << 20) < size
    assert record["bad_lines"] == 0 and 1_000_000 <= record["bytes"] < 1_070_000
    numbers = [int(item[9:]) for text in texts for item in text.split()[1:-1]]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) < 500_000 and max(numbers) > 1_500_000
    assert set("".join(texts)) == {character, " ", *"0123456789"}


def test_the_order_of_the_inputs_changes_nothing_and_they_are_on_record(tmp_path: Path) -> None:
    text = "".join(path.read_text("utf-8") for path in python_sources(30))
    names = [tmp_path / f"{name}.txt" for name in "abc"]
    for i, name in enumerate(names):
        name.write_text(text[i::2], "utf-8")
    for number, order in enumerate((names, names[::-1], [tmp_path / "*.txt"])):
        train_tokenizer(order, 300, tmp_path / f"out{number}", kind="hf-bpe", sample_bytes=100_000)
    first, *others = ((tmp_path / f"out{i}" / "tokenizer_training.json").read_text() for i in range(3))
    assert others == [first, first]
    record = json.loads(first)
    assert record["sources"] == [{"path": str(name), "bytes": name.stat().st_size} for name in names]
    assert record["sample"]["corpus_bytes"] == sum(name.stat().st_size for name in names)
    assert record["sample"]["bytes"] < record["sample"]["corpus_bytes"] and record["sample"]["seed"] == 1234


def test_bad_lines_are_counted_and_no_text_at_all_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n{bad\n{"other": 1}\n{"text": "\xff"}\n')
    assert draw_sample([str(path)], 1000, 1, "text")[1]["bad_lines"] == 3
    with pytest.raises(DataError, match="hold no text"):
        draw_sample([str(path)], 1000, 1, "body")


def test_training_twice_loads_what_is_there_and_refuses_to_overwrite(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("".join(path.read_text("utf-8") for path in python_sources(5)), "utf-8")
    first = train_tokenizer([source], 400, tmp_path / "out", kind="hf-bpe")
    changed = (tmp_path / "out" / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer([source], 400, tmp_path / "out", kind="hf-bpe").sha256 == first.sha256
    assert (tmp_path / "out" / "tokenizer.json").stat().st_mtime_ns == changed
    with pytest.raises(DataError, match="different vocab_size"):
        train_tokenizer([source], 401, tmp_path / "out", kind="hf-bpe")


def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    sources = [str(path) for path in python_sources(5)]
    text = tmp_path / "text.txt"
    text.write_text("".join(Path(source).read_text("utf-8") for source in sources), "utf-8")
    arguments = ["train", str(text), "--vocab-size", "420", "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["vocab_size"] == 420
    assert printed["sample"]["corpus_bytes"] == text.stat().st_size
