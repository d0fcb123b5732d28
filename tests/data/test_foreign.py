"""Files of Megatron's own writer train as they are: same tokens, same documents, known again, and refused where they lie."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dsgpt.data.dataset import IGNORED
from dsgpt.data.foreign import find_manifest, is_foreign
from dsgpt.data.indexed import IndexedWriter, idx_path
from dsgpt.data.mixture import open_samples
from dsgpt.errors import DataError
from tests.data.test_dataset import make

# Documents as lists of sequences.
DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[11], [12], [13, 14, 15]], [[16, 17, 18, 19]]]


def megatron_files(prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> None:
    """As Megatron-LM's tools/preprocess_data.py writes them."""
    reason = "megatron-core is not installed"
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason=reason)
    import torch

    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        flat = torch.tensor([token for sequence in document for token in sequence], dtype=torch.int64)
        builder.add_document(flat, [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")


def blocks(path: Path, seq_length: int, vocab_size: int = 10**6) -> dict[str, np.ndarray]:
    samples = open_samples(path, find_manifest(path), "train", seq_length, vocab_size=vocab_size)
    return samples.read(np.arange(samples.num_samples))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.int64])
def test_files_of_megatron_train_as_they_are(tmp_path: Path, dtype: type) -> None:
    """Documents of several sequences are one piece of text: attention and labels go through, as in Megatron."""
    megatron_files(tmp_path / "c_text_document", DOCUMENTS, dtype)
    manifest = find_manifest(tmp_path / "c_text_document")
    assert is_foreign(manifest) and manifest.dtype == np.dtype(dtype).name
    assert (manifest.splits["train"].documents, manifest.splits["train"].tokens) == (4, 15)
    batch = blocks(tmp_path / "c_text_document", 7)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]
    no = IGNORED
    assert batch["labels"].tolist() == [[6, 7, 8, no, 10, no, 12], [13, 14, 15, no, 17, 18, 19]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 3, 0, 1, 2]]


def test_tokens_and_documents_are_those_of_megatrons_own_reader(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    documents = [
        [rng.integers(0, 70_000, rng.integers(1, 30)).tolist() for _ in range(rng.integers(1, 4))] for _ in range(300)
    ]
    megatron_files(tmp_path / "x", documents)
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = module.IndexedDataset(str(tmp_path / "x"))
    edges = theirs.document_indices
    tokens = np.concatenate([theirs[i] for i in range(len(theirs))])
    owners = np.repeat(np.arange(300), [sum(len(theirs[i]) for i in range(edges[d], edges[d + 1])) for d in range(300)])
    batch = blocks(tmp_path / "x", 64)
    used = batch["input_ids"].size
    assert len(tokens) - used <= 64, "only what is too short for a block is left"
    assert np.array_equal(batch["input_ids"].ravel(), tokens[:used])
    same = owners[1 : used + 1] == owners[:used]
    assert np.array_equal(batch["labels"].ravel(), np.where(same, tokens[1 : used + 1], IGNORED))


def test_a_prefix_its_files_and_their_folder_name_the_same_data(tmp_path: Path) -> None:
    megatron_files(tmp_path / "x.v1_document", DOCUMENTS)
    prints = {
        find_manifest(path).fingerprint
        for path in (
            tmp_path,
            tmp_path / "x.v1_document",
            tmp_path / "x.v1_document.bin",
            tmp_path / "x.v1_document.idx",
        )
    }
    assert len(prints) == 1
    megatron_files(tmp_path / "y", DOCUMENTS[:2])
    manifest = find_manifest(tmp_path)
    assert [shard.path for shard in manifest.splits["train"].shards] == ["x.v1_document", "y"]
    assert blocks(tmp_path, 20)["input_ids"].ravel().tolist() == [*range(5, 20), *range(5, 10)]


def test_other_content_has_another_fingerprint_and_another_place_has_not(tmp_path: Path) -> None:
    def fingerprint(folder: str, ids: np.ndarray, lengths: list[int]) -> str:
        (tmp_path / folder).mkdir()
        writer = IndexedWriter(tmp_path / folder / "x", "int32")
        writer.add_documents(ids, np.array(lengths))
        writer.finish()
        return find_manifest(tmp_path / folder / "x").fingerprint

    # 8 MB: more than is hashed whole.
    ids = np.random.default_rng(0).integers(0, 1000, 2_000_000)
    changed = ids.copy()
    changed[1_000_000:] += 1
    first = fingerprint("a", ids, [1_000_000, 1_000_000])
    assert fingerprint("b", ids, [1_000_000, 1_000_000]) == first
    assert fingerprint("c", changed, [1_000_000, 1_000_000]) != first
    assert fingerprint("d", ids, [1_000_001, 999_999]) != first
    assert fingerprint("e", ids[:-1], [1_000_000, 999_999]) != first


def test_ids_outside_the_vocabulary_are_refused_when_they_are_read(tmp_path: Path) -> None:
    megatron_files(tmp_path / "x", DOCUMENTS)
    assert blocks(tmp_path / "x", 7, vocab_size=20)["input_ids"].max() == 18
    with pytest.raises(DataError, match=r"outside the model's vocabulary\n.*5 to 19.*vocab_size=19"):
        blocks(tmp_path / "x", 7, vocab_size=19)
    megatron_files(tmp_path / "y", [[[3, -1, 4, 5]]])
    with pytest.raises(DataError, match=r"ids from -1"):
        blocks(tmp_path / "y", 3)


def test_a_dataset_of_dsgpt_is_read_by_its_dataset_json_and_an_unfinished_one_not_at_all(tmp_path: Path) -> None:
    make(tmp_path / "d", [[[1, 2, 3, 4]]])
    assert not is_foreign(find_manifest(tmp_path / "d"))
    (tmp_path / "d" / "dataset.json").unlink()
    for sign in (".prepare", "tokenizer"):
        (tmp_path / "d" / sign).mkdir()
        with pytest.raises(DataError, match="holds no finished dataset"):
            find_manifest(tmp_path / "d")
        (tmp_path / "d" / sign).rmdir()
    with pytest.raises(DataError, match="there is no such folder"):
        find_manifest(tmp_path / "absent")


def test_damage_and_mixed_types_are_errors(tmp_path: Path) -> None:
    megatron_files(tmp_path / "x", DOCUMENTS)
    megatron_files(tmp_path / "y", DOCUMENTS, np.uint16)
    with pytest.raises(DataError, match="different types"):
        find_manifest(tmp_path)
    os.truncate(idx_path(tmp_path / "y"), 60)
    with pytest.raises(DataError, match="damaged"):
        find_manifest(tmp_path / "y")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        find_manifest(tmp_path / "x")
    megatron_files(tmp_path / "z", DOCUMENTS)
    os.truncate(tmp_path / "z.bin", 40)
    with pytest.raises(DataError, match="damaged"):
        blocks(tmp_path / "z", 4)
