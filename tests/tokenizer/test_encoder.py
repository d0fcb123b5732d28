"""Fast ids are the ids of `tokenizers`, in batches and in parts, or the reference is used and says why."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dsgpt.tokenizer import Tokenizer
from dsgpt.tokenizer.cuts import CONTEXT, NoSafeCut
from dsgpt.tokenizer.encoder import Encoder, enclose_flat
from dsgpt.tokenizer.training import train_on_texts
from tests.tokenizer.texts import DIFFICULT, fuzz, python_sources

SHARED = Path(__file__).parents[3] / "shared" / "data"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ("hf-bpe", "llama3", "sentencepiece-bpe", "sentencepiece-unigram")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer of each kind, trained on some Python."""
    root = tmp_path_factory.mktemp("tokenizers")
    texts = [path.read_text("utf-8") for path in python_sources(8)]
    for kind in ("hf-bpe", "sentencepiece-bpe", "sentencepiece-unigram"):
        train_on_texts(texts, 600, root / kind, kind, {})  # type: ignore[arg-type]
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=special)
    )
    (root / "llama3").mkdir()
    backend.save(str(root / "llama3" / "tokenizer.json"))
    (root / "llama3" / "tokenizer_config.json").write_text('{"bos_token": "<|begin|>", "eos_token": "<|end|>"}')
    return {kind: root / kind for kind in KINDS}


def texts_of(kind: str) -> list[str]:
    special = ["<s>", "a</s>b", "<|begin|><|end|> x", "<unk>"]
    runs = [" " * 300, "\n" * 70, "1234567890" * 9, "ab" * 400, "é" * 90, "\t \n" * 30]
    return [*DIFFICULT, *fuzz(150, seed=7), *special, *runs, *(path.read_text("utf-8") for path in python_sources(4))]


def expected_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """What the library `tokenizers` gives for text that is nothing but text, straight from the file."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def by_text(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_batches_are_those_of_the_file(folders: dict[str, Path], kind: str, engine: str) -> None:
    encoder = Encoder.load(folders[kind], engine)  # type: ignore[arg-type]
    texts = texts_of(kind)
    found = by_text(*encoder.encode_batch([text.encode() for text in texts]))
    for text, ours, theirs in zip(texts, found, expected_ids(folders[kind], texts), strict=True):
        assert ours == theirs, text[:80]
    assert encoder.compare([text.encode() for text in texts]) is None


def test_the_fast_engine_is_used_where_it_can_be(folders: dict[str, Path]) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    for kind in ("hf-bpe", "llama3"):
        encoder = Encoder.load(folders[kind])
        assert (encoder.engine.split()[0], encoder.fallback) == ("gigatoken", ""), kind
    encoder = Encoder.load(folders["sentencepiece-unigram"])
    assert encoder.engine.startswith("tokenizers ") and "gigatoken" in encoder.fallback


def test_a_pretrained_llama_tokenizer_is_encoded_fast_and_equal() -> None:
    folder = SHARED / "weights" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    encoder = Encoder.load(folder)
    assert encoder.engine.startswith("gigatoken "), encoder.fallback
    texts = texts_of("sentencepiece-bpe")
    assert by_text(*encoder.encode_batch([text.encode() for text in texts])) == expected_ids(folder, texts)


def chunked(text: bytes, seed: int) -> Iterator[bytes]:
    rng, start = random.Random(seed), 0
    while start < len(text):
        stop = start + rng.choice([1, 7, 300, 5000, 40_000])
        yield text[start:stop]
        start = stop


@pytest.mark.parametrize("kind", ["hf-bpe", "llama3", "sentencepiece-bpe"])
def test_a_text_in_parts_has_the_ids_of_the_whole(folders: dict[str, Path], kind: str) -> None:
    rng = random.Random(4)
    words = [word for text in texts_of(kind) for word in text.replace("\n", " ").split(" ") if len(word) < CONTEXT // 4]
    encoder = Encoder.load(folders[kind])
    for seed in range(3):
        unbroken = " ".join(rng.choices(words, k=20_000)).encode()
        lines = "\n".join(rng.sample(texts_of(kind), len(texts_of(kind)))).encode()
        for text in (unbroken, lines):
            (whole,) = expected_ids(folders[kind], [text.decode()])
            parts = list(encoder.encode_chunks(chunked(text, seed), part_bytes=15_000))
            assert len(parts) > 3
            assert np.concatenate(parts).tolist() == whole


def test_a_text_without_a_place_for_a_cut_says_so(folders: dict[str, Path]) -> None:
    with pytest.raises(NoSafeCut, match="no safe place"):
        list(Encoder.load(folders["hf-bpe"]).encode_chunks([b"a" * 200_000], part_bytes=50_000))
    with pytest.raises(NoSafeCut, match="model is Unigram"):
        list(Encoder.load(folders["sentencepiece-unigram"]).encode_chunks([b"a b " * 50_000], part_bytes=50_000))


@pytest.mark.parametrize("text", [b"\xff", b"ab\xc3", b"\xed\xa0\x80"])
def test_what_is_not_utf8_is_an_error_and_not_a_crash(folders: dict[str, Path], text: bytes) -> None:
    encoder = Encoder.load(folders["hf-bpe"])
    with pytest.raises(UnicodeDecodeError):
        encoder.encode_batch([b"good", text])
    with pytest.raises(UnicodeDecodeError):
        list(encoder.encode_chunks([text]))


def test_special_tokens_in_text_are_counted_and_stay_text(folders: dict[str, Path]) -> None:
    encoder = Encoder.load(folders["llama3"])
    text = b"a <|begin|> and <|end|><|end|>, but no <|other|> and no <|beg in|>"
    assert encoder.special_in_text(text) == 3
    assert encoder.special_in_chunks(chunked(text, 1)) == 3
    assert encoder.special_in_chunks(text[i : i + 1] for i in range(len(text))) == 3
    ids, _ = encoder.encode_batch([text])
    special = {encoder.tokenizer.bos_id, encoder.tokenizer.eos_id}
    assert not special & set(ids.tolist())
    assert encoder.tokenizer.decode(ids) == text.decode()


def test_the_gate_finds_an_engine_that_is_wrong(folders: dict[str, Path]) -> None:
    """The fast engine gets the file of another tokenizer: the same but for one merge."""
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    import json

    from dsgpt.tokenizer.encoder import _Gigatoken, _source

    encoder = Encoder.load(folders["hf-bpe"])
    content = json.loads(_source(encoder.tokenizer))
    content["model"]["merges"].pop()
    encoder._encode = _Gigatoken(json.dumps(content))
    samples = [path.read_bytes() for path in python_sources(8)]
    difference = encoder.compare(samples)
    assert difference is not None and difference.expected != difference.seen
    reference = expected_ids(folders["hf-bpe"], [samples[difference.document].decode()])[0]
    assert reference[difference.position : difference.position + 8] == difference.expected
    encoder.fall_back(str(difference))
    assert encoder.compare(samples) is None and encoder.engine.startswith("tokenizers ")


def test_without_gigatoken_the_reference_encodes_and_says_why(folders: dict[str, Path]) -> None:
    program = (
        "import sys; sys.modules['gigatoken'] = None; from dsgpt.tokenizer.encoder import Encoder; "
        f"e = Encoder.load({str(folders['hf-bpe'])!r}); print(e.engine, '|', e.fallback)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    engine, fallback = ran.stdout.strip().split(" | ")
    assert engine.startswith("tokenizers ") and fallback == "gigatoken is not installed"


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (7, None), (None, 9), (7, 9)])
def test_documents_are_enclosed_as_the_tokenizer_encloses_one(bos: int | None, eos: int | None) -> None:
    documents = [[1, 2, 3], [], [4], []]
    flat = np.array([i for one in documents for i in one], np.uint16)
    ids, lengths = enclose_flat(flat, np.array([len(one) for one in documents]), bos, eos)
    expected = [[i for i in (bos, *one, eos) if i is not None] for one in documents]
    assert by_text(ids, lengths) == expected and ids.dtype == np.uint16


def test_an_encoder_is_for_the_tokenizer_it_was_loaded_with(folders: dict[str, Path]) -> None:
    encoder = Encoder.load(folders["hf-bpe"])
    tokenizer = Tokenizer.load(folders["hf-bpe"])
    assert encoder.tokenizer.sha256 == tokenizer.sha256
    assert encoder.encode_batch([b"def f(x):"])[0].tolist() == tokenizer.encode("def f(x):")
