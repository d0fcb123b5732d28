"""Damage to a dataset is found, and what inspect shows is what is there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dsgpt.cli.data import data as command
from dsgpt.data.manifest import Split, fingerprint_of, load_manifest
from dsgpt.data.prepare import prepare
from dsgpt.data.summary import Span, inspect_split
from dsgpt.data.verify import verify_dataset
from dsgpt.errors import DataError
from dsgpt.tokenizer import Tokenizer

TEXTS = ["the cat", "the end.", "sat on the mat", "x" * 50]


@pytest.fixture
def dataset(tmp_path: Path, tokenizer_folder: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([tmp_path / "in"], tokenizer_folder, tmp_path / "out")
    return tmp_path / "out"


def test_a_sound_dataset_has_no_problems(dataset: Path) -> None:
    assert verify_dataset(dataset) == []
    result = CliRunner().invoke(command, ["verify", str(dataset)], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, f"{dataset}: sound\n")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_tokenizer(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))


def edit_tokens(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    content["splits"]["train"]["tokens"] += 1
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("train-00000.bin", flip, "has changed"),
        ("train-00000.idx", flip, "has changed"),
        ("train-00000.bin", Path.unlink, "cannot be read"),
        ("tokenizer/tokenizer.json", edit_tokenizer, "not the tokenizer the dataset was made with"),
        ("dataset.json", edit_tokens, "not the sums of its shards"),
    ],
)
def test_damage_is_found(dataset: Path, name: str, damage: object, expected: str) -> None:
    damage(dataset / name)  # type: ignore[operator]
    assert any(expected in problem.what for problem in verify_dataset(dataset))
    result = CliRunner().invoke(command, ["verify", str(dataset), "--json"])
    assert isinstance(result.exception, DataError)
    assert json.loads(result.stdout)["problems"]


def test_ids_outside_the_vocabulary_are_found(dataset: Path) -> None:
    content = json.loads((dataset / "dataset.json").read_text("utf-8"))
    content["tokenizer"]["vocab_size"] = 100
    (dataset / "dataset.json").write_text(json.dumps(content))
    assert any("ids outside the vocabulary" in problem.what for problem in verify_dataset(dataset))


def test_a_manifest_that_is_not_whole_or_not_ours_is_an_error(dataset: Path) -> None:
    path = dataset / "dataset.json"
    content = json.loads(path.read_text("utf-8"))
    for broken, expected in (
        (path.read_text("utf-8")[:-20], "cannot be read"),
        ("[]", "a format this dsgpt does not know"),
        (json.dumps({**content, "format_version": 2}), "a format this dsgpt does not know"),
        (json.dumps({**content, "splits": 3}), "is damaged"),
        (json.dumps({**content, "unknown": 3}), "is damaged"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "cannot be read"),
        # T917: paths that lead out of the folder, of the tokenizer's copy and of a shard.
        (json.dumps({**content, "tokenizer": {**content["tokenizer"], "path": "../../elsewhere"}}), "is damaged"),
        (json.dumps(content).replace('"train-00000"', '"/etc/train-00000"'), "is damaged"),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=expected):
            load_manifest(dataset)


def test_inspect_counts_what_is_there(dataset: Path, tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    documents = [tokenizer.encode_document(text) for text in TEXTS]
    summary = inspect_split(dataset, "train", num_samples=4)
    lengths = [len(document) for document in documents]
    assert (summary.documents, summary.tokens) == (4, sum(lengths))
    assert (summary.shortest, summary.longest) == (min(lengths), max(lengths))
    assert sum(count for _, count in summary.histogram) == 4
    for bound, count in summary.histogram:
        assert count == sum(bound / 2 <= length < bound for length in lengths)
    edge, end = Span("<s>", "boundary"), Span("</s>", "boundary")
    assert summary.samples == [[edge, Span(text, "learned"), end] for text in TEXTS]
    counts = np.bincount(np.concatenate(documents))
    assert dict(summary.common)["x"] == counts[tokenizer.encode("x")[0]] == 50
    result = CliRunner().invoke(command, ["inspect", str(dataset)], catch_exceptions=False)
    assert "4 documents" in result.stdout and "|<s>|the cat|</s>|" in result.stdout


def make_chat(folder: Path, learned: list[int]) -> None:
    """Give a dataset the mask that chat data has."""
    content = json.loads((folder / "dataset.json").read_text("utf-8"))
    shard = content["splits"]["train"]["shards"][0]
    (folder / "train-00000.mask").write_bytes(bytes(learned))
    shard |= {"sha256_mask": hashlib.sha256(bytes(learned)).hexdigest(), "trained_tokens": sum(learned)}
    splits = {"train": Split.model_validate(content["splits"]["train"])}
    content |= {"kind": "chat", "fingerprint": fingerprint_of(content["tokenizer"]["sha256"], splits)}
    (folder / "dataset.json").write_text(json.dumps(content))


def test_a_mask_is_shown_in_colour_and_its_damage_found(dataset: Path, tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    learned = []
    for text in TEXTS:
        half = len(tokenizer.encode(text)) // 2
        learned += [0] + [0] * half + [1] * (len(tokenizer.encode(text)) - half) + [1]
    make_chat(dataset, learned)
    assert verify_dataset(dataset) == []
    summary = inspect_split(dataset, "train", num_samples=4)
    assert summary.trained_tokens == sum(learned)
    for text, sample in zip(TEXTS, summary.samples, strict=True):
        assert [span.kind for span in sample] == ["boundary", "context", "learned", "boundary"]
        assert sample[1].text + sample[2].text == text
    shown = CliRunner().invoke(command, ["inspect", str(dataset), "--samples", "4"], color=True)
    assert "\x1b[32m" in shown.output and f"learned from: {sum(learned)} of {len(learned)} tokens" in shown.output
    flip(dataset / "train-00000.mask")
    found = {problem.what.split(" ", 1)[1] for problem in verify_dataset(dataset)}
    assert found == {
        "has changed",
        "is not a mask of these tokens",
    }


def test_of_a_long_document_both_ends_are_shown(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "x.txt").write_text("begin " + "- " * 500 + " finish")
    prepare([tmp_path / "x.txt"], tokenizer_folder, tmp_path / "out")
    (sample,) = inspect_split(tmp_path / "out", "train").samples
    assert sample[0] == Span("<s>", "boundary") and sample[1].text.startswith("begin - ")
    assert sample[2].kind == "context" and "tokens ..." in sample[2].text
    assert sample[3].text.endswith(" finish") and sample[4] == Span("</s>", "boundary")
