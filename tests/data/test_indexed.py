"""What we write, Megatron-Core reads, and what it writes, we read."""

from __future__ import annotations

import hashlib
import struct
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from dsgpt.data import indexed
from dsgpt.data.indexed import IndexedReader, IndexedWriter, bin_path, dtype_for, idx_path
from dsgpt.errors import DataError

DOCUMENTS = [[1, 2, 3], [65499], [], list(range(1000)), [7, 7]]


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> IndexedWriter:
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        writer.add_document(document)
    writer.finish()
    return writer


def test_documents_come_back(tmp_path: Path) -> None:
    writer = write(tmp_path / "x", DOCUMENTS)
    reader = IndexedReader(tmp_path / "x")
    assert [reader[i].tolist() for i in range(len(reader))] == DOCUMENTS
    assert (reader.num_documents, len(reader.tokens)) == (5, 1006) == (writer.num_documents, writer.num_tokens)


def test_the_bytes_are_the_documented_layout(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2], [3]])
    assert bin_path(tmp_path / "x").read_bytes() == struct.pack("<3H", 1, 2, 3)
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 2, 1) + struct.pack("<2q", 0, 4) + struct.pack("<3q", 0, 1, 2)
    assert idx_path(tmp_path / "x").read_bytes() == expected


def test_the_hashes_are_of_the_files(tmp_path: Path) -> None:
    writer = write(tmp_path / "x", DOCUMENTS)
    assert writer.sha256_bin == hashlib.sha256((tmp_path / "x.bin").read_bytes()).hexdigest()
    assert writer.sha256_idx == hashlib.sha256((tmp_path / "x.idx").read_bytes()).hexdigest()


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "x", "uint16")
    writer.add_document([1])
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "x.idx").exists()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_what_we_write(tmp_path: Path, dtype: str) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    write(tmp_path / "x", DOCUMENTS, dtype)
    theirs = megatron.IndexedDataset(str(tmp_path / "x"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert theirs.index.dtype == np.dtype(dtype).type


def test_we_read_what_megatron_writes(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    # A document of two sequences, then one of one.
    builder.add_item(torch.tensor([5, 6, 70000]))
    builder.add_item(torch.tensor([8]))
    builder.end_document()
    builder.add_document(torch.tensor([9, 10]), [2])
    builder.finalize(str(tmp_path / "x.idx"))
    reader = IndexedReader(tmp_path / "x")
    assert reader.tokens.tolist() == [5, 6, 70000, 8, 9, 10]
    assert [reader[i].tolist() for i in range(3)] == [[5, 6, 70000], [8], [9, 10]]
    assert reader.num_documents == 2
    assert reader.document_starts(0, 6).tolist() == [0, 4]


def test_document_starts_are_those_of_a_plain_search(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 6, size=60)
    write(tmp_path / "x", [[1] * n for n in lengths])
    reader = IndexedReader(tmp_path / "x")
    begins = np.concatenate(([0], np.cumsum(lengths)))[:-1]
    for start in range(0, int(lengths.sum()), 3):
        for stop in range(start, int(lengths.sum()) + 1, 5):
            expected = [int(b) - start for b in begins if start <= b < stop]
            assert reader.document_starts(start, stop).tolist() == expected


def numbers(kind: str) -> np.ndarray:
    rng = np.random.default_rng(4)
    return {
        "even": np.arange(0, 60_000, 7),
        "one": np.array([0]),
        "equal": np.zeros(3_000, np.int64),
        "repeated": np.sort(rng.integers(0, 500, 5_000)),
        "skewed": np.cumsum(rng.pareto(0.5, 9_000).clip(0, 10**9).astype(np.int64)),
        "a cliff": np.concatenate((np.arange(4_000), 10**12 + np.arange(4_000))),
    }[kind]


@pytest.mark.parametrize("most_kept", [2, 5, 1 << 16])
@pytest.mark.parametrize("piece", [pytest.param(1, marks=pytest.mark.slow), 3, 512])
@pytest.mark.parametrize("kind", ["even", "one", "equal", "repeated", "skewed", "a cliff"])
def test_a_search_in_a_file_finds_what_numpy_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, piece: int, most_kept: int
) -> None:
    values = numbers(kind)
    (tmp_path / "x").write_bytes(b"unaligned" + values.astype("<i8").tobytes() + b"more")
    monkeypatch.setattr(indexed._Ascending, "PIECE", piece)
    monkeypatch.setattr(indexed._Ascending, "MOST_KEPT", most_kept)
    highest = int(values[-1]) + 3
    with FileIO(tmp_path / "x") as file:
        column = indexed._Ascending(file, len(b"unaligned"), len(values), highest)
        rng = np.random.default_rng(5)
        lows = np.concatenate((rng.choice(values, 30), rng.integers(0, highest + 1, 30), [0, 1, highest]))
        for low in lows.tolist():
            for high in (low, low + 1, low + 50, highest):
                high = min(high, low + 3_000) if piece < 512 else high
                index, found = column.between(low, high)
                begin, end = np.searchsorted(values, (low, high))
                assert found.tolist() == values[begin:end].tolist()
                assert index == begin or begin == end
        assert len(column._pieces) <= max(2, most_kept)


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(256, "uint16"), (65499, "uint16"), (65500, "int32"), (151936, "int32")]
)
def test_the_dtype_is_megatrons_choice(vocab_size: int, name: str) -> None:
    assert dtype_for(vocab_size).name == name


def test_an_id_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "x", "uint16")
    for ids in ([70000], [-1]):
        with pytest.raises(DataError, match="do not fit uint16"):
            writer.add_document(ids)
    writer.discard()


def test_damage_is_an_error_and_not_other_tokens(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    index, tokens = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()
    for name, content in (
        ("x.idx", index[:-8]),
        ("x.idx", b"WRONG" + index[5:]),
        ("x.idx", index[:20]),
        ("x.bin", tokens[:-2]),
        ("x.bin", tokens[:-1]),
        ("x.bin", tokens + b"\0\0"),
        ("x.bin", b""),
    ):
        write(tmp_path / "x", DOCUMENTS)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            IndexedReader(tmp_path / "x")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        IndexedReader(tmp_path / "x")
