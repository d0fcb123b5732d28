"""Which tokenizers extend another one: what transformers saves after adding tokens does, any other difference is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dsgpt import errors
from dsgpt.tokenizer.extension import extension
from dsgpt.tokenizer.tokenizer import Tokenizer
from dsgpt.tokenizer.training import KINDS, train_on_texts
from tests.tokenizer.texts import DIFFICULT, fuzz

TEXTS, SIZE = [Path(errors.__file__).read_text("utf-8")] * 3, 400
NEW = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param) / "tokenizer"
    train_on_texts(TEXTS, SIZE, made, request.param, {})
    return made


def test_tokens_added_here_and_by_transformers_extend_and_leave_text_as_it_was(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": NEW})
    theirs.save_pretrained(tmp_path / "theirs")
    old = Tokenizer.load(folder)
    old.with_special_tokens(NEW).save(tmp_path / "ours")
    both = [Tokenizer.load(tmp_path / name) for name in ("ours", "theirs")]
    for new in both:
        assert extension(old, new) == (NEW, [])
        assert [new.backend.token_to_id(token) for token in NEW] == [SIZE, SIZE + 1]
        assert new.special_tokens == old.special_tokens and new.vocab_size == SIZE + 2
        for text in [*DIFFICULT, *fuzz(50, seed=1), f"a {NEW[1]} b"]:
            assert new.encode(text) == old.encode(text)
        added, differences = extension(new, old)
        assert added == [] and "other ids or are missing" in differences[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").encode("".join(NEW), add_special_tokens=False) == [
        SIZE,
        SIZE + 1,
    ]
    assert both[0].with_special_tokens(NEW) is both[0]
    assert old.with_special_tokens(NEW).sha256 == both[0].sha256 != old.sha256


def changed(folder: Path, into: Path, change) -> Tokenizer:
    shutil.copytree(folder, into)
    content = json.loads((into / "tokenizer.json").read_text("utf-8"))
    change(content)
    (into / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return Tokenizer.load(into)


def test_any_other_difference_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    train_on_texts(TEXTS, SIZE, base, "hf-bpe", {})
    old = Tokenizer.load(base)
    old.with_special_tokens(NEW).save(tmp_path / "more")

    def swap(content):
        vocab = content["model"]["vocab"]
        one, two = sorted(vocab, key=vocab.get)[100:102]
        vocab[one], vocab[two] = vocab[two], vocab[one]

    def added(number, content, special=True):
        token = {"id": number, "content": content, "special": special, "normalized": False}
        return dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | token

    last = max(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"].items(), key=lambda item: item[1])
    cases = {
        "swapped": (swap, "2 tokens have other ids"),
        "merged": (lambda content: content["model"]["merges"].pop(), "model's merges"),
        "cut": (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
        "normalised": (lambda content: content.update(normalizer={"type": "Lowercase"}), "normalizer"),
        "plain": (lambda content: content["added_tokens"].append(added(last[1], last[0], False)), "an added one"),
        "stripped": (lambda content: content["added_tokens"][0].update(lstrip=True), "other properties"),
    }
    for name, (change, said) in cases.items():
        new = changed(tmp_path / "more", tmp_path / name, change)
        differences = extension(old, new)[1]
        assert len(differences) == 1 and said in differences[0], (name, differences)
    # Neither what is only for inference, nor a token of the model that becomes special, changes an id of a text.
    harmless = changed(
        tmp_path / "more",
        tmp_path / "harmless",
        lambda content: content["added_tokens"].append(added(last[1], last[0])),
    )
    assert extension(old, harmless) == (NEW, [])


def test_a_new_token_among_the_old_ids_is_no_extension(tmp_path: Path) -> None:
    train_on_texts(TEXTS, SIZE, tmp_path / "base", "hf-bpe", {})
    gap = changed(tmp_path / "base", tmp_path / "gap", lambda content: content["model"]["vocab"].update(far=500))
    filled = changed(tmp_path / "gap", tmp_path / "filled", lambda content: content["model"]["vocab"].update(near=450))
    assert gap.vocab_size == 501
    added, differences = extension(gap, filled)
    assert added == ["near"] and differences == ["'near' is new and has the id 450, among those of the 501 there were"]
