"""What data a run finds, before anything is read of it: by path, by root, by tokenizer, and none of it twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dsgpt.config import load_config
from dsgpt.errors import DataError
from dsgpt.train.resolve import ResolvedRun, resolve_run
from dsgpt.train.sources import _distinct_names
from tests.data.test_dataset import make


def resolve(yaml: Path, *overrides: str) -> ResolvedRun:
    return resolve_run(load_config([yaml], overrides).config, world_size=1, device="cpu")


def train(*paths: Path) -> str:
    return f"data.train={json.dumps([{'path': str(path)} for path in paths])}"


def test_the_same_data_under_two_paths_is_refused(write_run, tmp_path, dataset):
    shutil.copytree(dataset, tmp_path / "copy")
    with pytest.raises(DataError, match="names the same data twice"):
        resolve(write_run(), train(dataset, tmp_path / "copy"))


def test_sources_of_different_tokenizers_are_refused(write_run, tmp_path, dataset):
    make(tmp_path / "other", [[list(range(5000))]])
    with pytest.raises(DataError, match=r"sources were tokenised with another tokenizer(.|\n)*other: 0"):
        resolve(write_run(), train(dataset, tmp_path / "other"))


def test_validation_on_training_data_is_refused_and_what_was_set_aside_of_it_is_not(write_run, tmp_path, dataset):
    named = f"data.validation=[{{path: {dataset}}}]"
    (found,) = resolve(write_run(), named).data.validation
    assert (found.name, found.split) == ("data", "validation")
    make(tmp_path / "whole", [[list(range(5000))]])
    shutil.copytree(dataset / "tokenizer", tmp_path / "whole" / "tokenizer")
    overrides = [train(tmp_path / "whole"), f"data.validation=[{{path: {tmp_path / 'whole'}}}]"]
    with pytest.raises(DataError, match="names training data, of which nothing was set aside"):
        resolve(write_run(), *overrides, "model.vocab_size=60000")


def test_a_share_too_small_to_be_read_is_refused(write_run, tmp_path, dataset):
    make(tmp_path / "a", [[list(range(5000))]])
    make(tmp_path / "b", [[list(range(6000))]])
    sources = [{"path": str(tmp_path / "a"), "weight": 1e6}, {"path": str(tmp_path / "b"), "weight": 1.0}]
    with pytest.raises(DataError, match="would never be read"):
        resolve(write_run(), f"data.train={json.dumps(sources)}")


def test_sources_from_another_machine_are_found_below_data_root(write_run, tmp_path, dataset):
    make(tmp_path / "root/corpora/web", [[list(range(5000))]])
    for kind in ("bin", "idx"):
        shutil.copy(tmp_path / f"root/corpora/web/train-0.{kind}", tmp_path / f"root/corpora/code_document.{kind}")
    elsewhere = [Path("/elsewhere/corpora/web"), Path("/elsewhere/corpora/code_document")]
    found = resolve(write_run(), train(*elsewhere), f"data.root={tmp_path / 'root'}")
    assert [one.path for one in found.data.train] == [tmp_path / "root/corpora" / path.name for path in elsewhere]
    assert found.data.foreign == [str(tmp_path / "root/corpora/code_document")]


def test_of_texts_and_chats_the_chats_tokenizer_is_kept_because_it_has_their_template(write_run, tmp_path, dataset):
    from dsgpt.data.chat import ChatChoices, prepare_chat

    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    prepare_chat([tmp_path / "chat.jsonl"], dataset / "tokenizer", tmp_path / "chats", ChatChoices(seq_length=96))
    found = resolve(write_run(), train(dataset, tmp_path / "chats"), "training.seq_length=96")
    assert (found.data.tokenizer_folder / "chat_template.jinja").is_file()
    assert found.data.tokenizer.sha256 == resolve(write_run()).data.tokenizer.sha256


def test_validation_sets_of_equal_names_are_told_apart() -> None:
    assert _distinct_names([Path("/d/a"), Path("/d/b")]) == ["a", "b"]
    assert _distinct_names([Path("/x/data"), Path("/y/data"), Path("/z")]) == ["x/data", "y/data", "/z"]
    assert _distinct_names([]) == []
