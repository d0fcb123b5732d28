"""Ids of the parts of a text, cut where Cuts says, are the ids of the whole, for tokenizers of every make."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from dsgpt.tokenizer.cuts import CONTEXT, Cuts, NoSafeCut
from dsgpt.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.test_encoder import LLAMA3
from tests.tokenizer.texts import DIFFICULT, fuzz, python_sources

SHARED = Path(__file__).parents[3] / "shared" / "data"
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated"), pre_tokenizers.ByteLevel(False)]
)
BYTE_LEVEL = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt2-prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "llama3": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    "digits-from-the-back": DIGITS,
}
SPACES = {
    "metaspace-first": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace-always": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "llama2": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "no-prefix": (normalizers.Replace(" ", "▁"), None),
}


def byte_level(splitter: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<s>"])
    backend.train_from_iterator([path.read_text("utf-8") for path in python_sources(6)], trainer)
    return backend


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, object]:
    """Of a BPE model that never goes on from text into a space, and falls back to bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    backend.train_from_iterator([path.read_text("utf-8") for path in python_sources(6)], trainer)
    model = json.loads(backend.to_str())["model"]
    return model | {"unk_token": "<unk>", "byte_fallback": True}


def text_of_all_sorts(seed: int) -> str:
    rng = random.Random(seed)
    runs = [" " * 40, "\n\n\n", "1234567890" * 9, "ab" * 60, "\t \n" * 9, "é漢字" * 9, "I'll 1,234,567.89 it's"]
    kinds = [*DIFFICULT, *fuzz(60, seed), *runs, *python_sources(3)[0].read_text("utf-8").split("\n\n")[:60]]
    return " ".join(rng.choice(kinds) for _ in range(900))


def check(backend: tokenizers.Tokenizer, text: str) -> None:
    """Cut again and again, in windows of random sizes, as an encoder does."""
    backend.encode_special_tokens = True
    cuts, rng = Cuts(backend), random.Random(5)
    whole = backend.encode(text, add_special_tokens=False).ids
    parts: list[int] = []
    rest, num_cuts = text.encode(), 0
    while len(rest) > 30_000:
        window = rest[: rng.randrange(9_000, 30_000)]
        end, start = cuts.last(window)
        assert 0 < end <= start <= len(window)
        parts += backend.encode(rest[:end].decode(), add_special_tokens=False).ids
        rest, num_cuts = rest[start:], num_cuts + 1
    parts += backend.encode(rest.decode(), add_special_tokens=False).ids
    assert num_cuts > 1
    assert parts == whole


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_parts_have_the_ids_of_the_whole_for_byte_level_bpe(kind: str) -> None:
    backend = byte_level(BYTE_LEVEL[kind])
    for seed in range(3):
        check(backend, text_of_all_sorts(seed))


@pytest.mark.parametrize("kind", SPACES)
def test_parts_have_the_ids_of_the_whole_for_spaces_as_characters(kind: str, vocabulary: dict[str, object]) -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": vocabulary}))
    normalizer, splitter = SPACES[kind]
    if normalizer is not None:
        backend.normalizer = normalizer
    if splitter is not None:
        backend.pre_tokenizer = splitter
    for seed in range(2):
        check(backend, text_of_all_sorts(seed))


def test_parts_have_the_ids_of_the_whole_for_real_tokenizers(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((SHARED / "tokenizers" / f"gpt2_{name}").read_bytes())
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tokenizer.json").write_bytes((SHARED / "tokenizers" / "tiny_bpe_tokenizer.json").read_bytes())
    for folder in (tmp_path, tmp_path / "tiny", SHARED / "weights" / "stories260K-hf"):
        check(Tokenizer.load(folder).backend, text_of_all_sorts(1))


@pytest.mark.parametrize("counted", ["from the front", "from the back"])
def test_a_run_of_digits_is_not_cut_where_its_length_counts(counted: str) -> None:
    backend = byte_level(BYTE_LEVEL["gpt2"])
    for size in (2, 3):
        # As far as can be seen from within, groups could begin anywhere; seen from one place only, they seem to fit.
        groups = rf"\d{{1,{size}}}" + (rf"(?=(?:\d{{{size}}})*\b)" if counted == "from the back" else "")
        split = pre_tokenizers.Split(Regex(groups), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False)])
        text = b"a word " * 2000 + b"7" * 9_001
        end, start = Cuts(backend).last(text)
        assert end == start <= text.index(b"7")
        with pytest.raises(NoSafeCut):
            Cuts(backend).last(b"7" * 9_001)


def test_an_added_token_is_not_cut_through() -> None:
    backend = byte_level(BYTE_LEVEL["gpt2"])
    backend.add_tokens(["tool call here"])
    check(backend, "so the tool call here is a tool call here " * 3000)


@pytest.mark.parametrize("size", [0, 1, CONTEXT, 2 * CONTEXT - 1])
def test_a_text_too_short_for_a_neighbourhood_is_not_cut(size: int) -> None:
    with pytest.raises(NoSafeCut):
        Cuts(byte_level(BYTE_LEVEL["gpt2"])).last((b"a b " * CONTEXT)[:size])


def test_a_vocabulary_that_goes_beyond_spaces_offers_no_cut(vocabulary: dict[str, object]) -> None:
    model = json.loads(json.dumps(vocabulary))
    model["vocab"]["n▁t"] = len(model["vocab"])
    backend = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    backend.normalizer = normalizers.Replace(" ", "▁")
    with pytest.raises(NoSafeCut, match="goes beyond a space: 'n▁t'"):
        Cuts(backend).last(b"a b " * 9000)


def test_the_end_of_a_window_inside_a_character_is_no_harm() -> None:
    cuts = Cuts(byte_level(BYTE_LEVEL["gpt2"]))
    text = ("漢字 é 😀 wörter " * 900).encode()
    for length in range(len(text) - 8, len(text)):
        end, start = cuts.last(text[:length])
        assert text[:end].decode() + text[end:start].decode() + text[start:].decode() == text.decode()
