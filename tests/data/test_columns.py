"""Rows of tables, saved data sets and data sets of the Hub are read as datasets and pyarrow read them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsgpt.data.sources import (
    BadLine,
    Document,
    Piece,
    Reading,
    can_be_cut,
    extent_of,
    find_sources,
    read_documents,
    read_records,
)
from dsgpt.errors import DataError
from tests.data.reading import in_pieces, kept_and_bad, read, records, texts
from tests.tokenizer.texts import DIFFICULT, fuzz

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [*DIFFICULT, *fuzz(40, seed=6)]


def write_parquet(path: Path, table: Any, rows: int) -> None:
    pq.write_table(table, path, row_group_size=rows, write_statistics=False, store_schema=False)


def write_arrow(path: Path, table: Any, rows: int, new: Callable[..., Any] | None = None) -> None:
    with (new or pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, rows)


def write_arrow_file(path: Path, table: Any, rows: int) -> None:
    write_arrow(path, table, rows, pa.ipc.new_file)


WRITERS = {"x.parquet": write_parquet, "stream.arrow": write_arrow, "file.arrow": write_arrow_file}


@pytest.mark.parametrize("name", WRITERS)
def test_any_cut_of_a_table_gives_each_row_once_with_its_number(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [f"row {i}" for i in range(5)]
    WRITERS[name](path, pa.table({"text": rows}), 2)
    assert can_be_cut(path, "file")
    size = path.stat().st_size
    for cut in range(1, size):
        for cuts in ([cut], [cut, min(size, cut + 1)]):
            found = [item for _, item in in_pieces(path, cuts, Reading())]
            assert [(item.line, item.text) for item in found] == [(i + 1, row) for i, row in enumerate(rows)], cuts


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "string_view", "dictionary"])
def test_columns_of_every_kind_of_text_are_read(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    column = pa.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    WRITERS[name](path, pa.table({"n": range(len(TEXTS)), "text": column}), 10)
    assert texts(path) == TEXTS


@pytest.mark.parametrize("name", WRITERS)
def test_rows_that_are_null_or_not_utf8_are_named_with_their_number(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, pa.table({"text": pa.array([b"a", None, b"b \xff", b"c"])}), 3)
    assert kept_and_bad(path) == (
        [(1, "a"), (4, "c")],
        [(2, "field 'text' is NoneType, not a string"), (3, "not UTF-8: byte 0xff at offset 2")],
    )


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_without_the_column_asked_for_is_refused_with_those_it_has(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, pa.table({"n": [1], "body": ["b"]}), 1)
    with pytest.raises(DataError, match="no column text; columns: n, body"):
        read(path)
    with pytest.raises(DataError, match="column n is int64, not text"):
        read(path, text="{body}{n}")
    assert texts(path, text="<{body}>") == ["<b>"]


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_table_has_no_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, pa.table({"text": pa.array([], pa.string())}), 1)
    assert read(path) == records(path) == []


CHAT = [
    {"messages": [{"role": "user", "content": f"é {i}"}, {"role": "assistant", "content": "b"}], "meta": {"n": i}}
    for i in range(7)
]


@pytest.mark.parametrize("name", WRITERS)
def test_records_keep_lists_and_objects_as_pyarrow_gives_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, pa.Table.from_pylist(CHAT), 3)
    assert records(path) == [(i + 1, record) for i, record in enumerate(CHAT)]


_PEAK = """
import sys
from dsgpt.data.sources import Piece, Reading, read_documents
count = sum(1 for _ in read_documents(Piece(sys.argv[1], 0, 1 << 40), Reading()))
peak, = (int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(count, peak >> 10)
"""


@pytest.mark.parametrize("name", [pytest.param("x.parquet", marks=pytest.mark.slow), "x.arrow"])
def test_a_table_of_one_row_group_is_read_some_megabytes_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    num_rows = 40_000
    table = pa.table({"text": [chr(97 + i % 26) * 10_000 for i in range(num_rows)]})
    if name == "x.parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    else:
        write_arrow(path, table, num_rows)
    assert path.stat().st_size > 380 << 20
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == num_rows and peak < 280  # read at once it would be more than the file


def dataset(columns: dict[str, list[Any]]) -> Any:
    """As Dataset.from_dict, with a fingerprint: some versions of dill cannot compute one of what pyarrow makes."""
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)), fingerprint="0123456789abcdef")


def saved(folder: Path, shards: int = 3) -> Any:
    data = dataset({"id": list(range(len(TEXTS))), "text": TEXTS})
    data.save_to_disk(str(folder), num_shards=shards)
    return data


def test_a_saved_data_set_is_read_in_its_order_as_datasets_reads_it(tmp_path: Path) -> None:
    saved(tmp_path / "in" / "set", shards=12)
    files = find_sources([tmp_path / "in"])
    assert len(files) == 12
    assert [text for path in files for text in texts(path)] == datasets.load_from_disk(str(tmp_path / "in" / "set"))[
        "text"
    ][:]
    assert find_sources([tmp_path / "in" / "set"]) == files


def test_a_saved_selection_of_rows_holds_those_rows(tmp_path: Path) -> None:
    saved(tmp_path / "all")
    datasets.load_from_disk(str(tmp_path / "all")).shuffle(seed=1).select(range(9)).save_to_disk(str(tmp_path / "some"))
    found = [text for path in find_sources([tmp_path / "some"]) for text in texts(path)]
    assert found == datasets.load_from_disk(str(tmp_path / "some"))["text"][:] and len(found) == 9


def test_a_saved_data_set_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    splits = {name: dataset({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match="several splits") as caught:
        find_sources([tmp_path / "both"])
    assert "train, test" in str(caught.value)
    assert texts(find_sources([tmp_path / "both" / "test"])[0]) == ["test"]
    datasets.DatasetDict({"train": splits["train"]}).save_to_disk(str(tmp_path / "one"))
    assert texts(find_sources([tmp_path / "one"])[0]) == ["train"]


def test_a_saved_data_set_that_lacks_a_file_or_is_damaged_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "set")
    (lost, *_) = find_sources([tmp_path / "set"])
    lost.unlink()
    with pytest.raises(DataError, match="lacks files") as caught:
        find_sources([tmp_path])
    assert str(lost) in str(caught.value)
    for damage in ("{", '{"_data_files": 3}', '{"_data_files": [{}]}'):
        (tmp_path / "set" / "state.json").write_text(damage)
        with pytest.raises(DataError, match="damaged"):
            find_sources([tmp_path / "set"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of three files that datasets.load_dataset takes like a name of the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(3):
        lines = [json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(TEXTS[i::3])]
        (tmp_path / "name").mkdir(exist_ok=True)
        (tmp_path / "name" / f"train-{i:05d}.jsonl").write_text("".join(lines))
        (tmp_path / "name" / f"test-{i:05d}.jsonl").write_text(json.dumps({"text": f"test {i}", "n": i}))
    return f"hf:{tmp_path / 'name'}"


def hub_texts(piece: Piece) -> list[str]:
    found = list(read_documents(piece, Reading()))
    assert all(isinstance(item, Document) for item in found)
    assert [item.line for item in found] == list(range(1, len(found) + 1))
    return [item.text for item in found if isinstance(item, Document)]


def test_a_hub_name_is_streamed_as_datasets_streams_it_in_pieces_of_files(hub: str) -> None:
    assert find_sources([hub, hub]) == [Path(hub)]
    stop, size = extent_of(Path(hub))
    assert (stop, size) == (3, 0)
    oracle = list(datasets.load_dataset(hub[3:], split="train", streaming=True))
    assert hub_texts(Piece(hub, 0, stop)) == hub_texts(Piece(hub, 0, 0)) == [record["text"] for record in oracle]
    assert [text for i in range(3) for text in hub_texts(Piece(hub, i, i + 1))] == [record["text"] for record in oracle]
    assert hub_texts(Piece(hub, 1, 2)) == TEXTS[1::3]
    assert list(read_records(Piece(hub, 0, 0))) == [(i, record) for i, record in enumerate(oracle, 1)]


def test_a_split_of_a_hub_name_is_read_alone(hub: str) -> None:
    assert extent_of(Path(f"{hub}#test")) == (3, 0)
    assert hub_texts(Piece(f"{hub}#test", 0, 0)) == ["test 0", "test 1", "test 2"]


def test_a_hub_name_that_cannot_be_opened_or_lacks_the_field_is_refused(hub: str) -> None:
    for name in (f"{hub}#nope", f"{hub}/absent", "hf:#train", "hf:"):
        with pytest.raises(DataError) as caught:
            extent_of(Path(name))
        assert name in str(caught.value)
    with pytest.raises(DataError, match="no column body; columns: text, n"):
        list(read_documents(Piece(hub, 0, 0), Reading("{body}")))
    (bad, *_) = read_documents(Piece(hub, 0, 0), Reading("n"))
    assert isinstance(bad, BadLine) and bad.reason == "field 'n' is int, not a string"


def test_a_hub_data_set_that_breaks_off_is_refused_with_its_name(hub: str) -> None:
    stop, _ = extent_of(Path(hub))
    file = Path(hub[3:], "train-00001.jsonl")
    file.write_text(file.read_text() + '{"text": "cut')
    with pytest.raises(DataError, match="broke off") as caught:
        list(read_documents(Piece(hub, 0, stop), Reading()))
    assert hub in str(caught.value)
