"""Tokenizers that others made are read with the ids their makers' programs give, and are saved so that they stay."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from dsgpt.errors import DataError
from dsgpt.tokenizer import Tokenizer
from dsgpt.tokenizer.training import KINDS, train_on_texts
from tests.tokenizer.texts import DIFFICULT, fuzz, python_sources

SHARED = Path(__file__).parents[3] / "shared" / "data"
SCRIPTS = [
    "Ελληνικό κείμενο",
    "Русский текст",
    "עברית ונקודות: שָׁלוֹם",
    "نص عربي ١٢٣",
    "हिन्दी में पाठ",
    "ข้อความภาษาไทย",
    "日本語のテキスト、漢字",
    "中文字",
    "한국어 텍스트",
    "ﬁne ﬂow ① ½ Å Å",
    "Tiếng Việt có dấu",
    "ქართული Հայերեն አማርኛ",
    "🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9d1\U0001f3fd",
]
OPTIONS: dict[str, dict[str, Any]] = {
    "as-it-comes": {},
    "byte-fallback": {"byte_fallback": True},
    "symbols": {"user_defined_symbols": ["<sep>", "<sep><cls>"]},
    "symbols-of-spaces": {
        "user_defined_symbols": ["\n", "\n\n", "▁▁", "▁▁▁"],
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    },
    "without-prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True},
    "spaces-kept": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True},
    "other-ids": {"control_symbols": ["<mask>"], "bos_id": -1, "pad_id": 3, "eos_id": 0, "unk_id": 2},
}


def texts() -> list[str]:
    symbols = ["a <sep> b<sep>", "<sep>x", "<sep>", "x  <sep><cls> y", "<c", "see a b, a  b", "<mask>", "</s>", "<unk>"]
    return [*DIFFICULT, *fuzz(400, seed=11), *SCRIPTS, *symbols]


def train_model(kind: str, **options: Any) -> bytes:
    model = io.BytesIO()
    # Docstrings only: many characters, "<" among them, stay unknown.
    lines = [
        line for path in python_sources(6) for line in path.read_text("utf-8").split("\n") if line and "<" not in line
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:1200]),
        model_writer=model,
        model_type=kind,
        vocab_size=600,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def same(ours: Tokenizer, folder: Path, texts: list[str]) -> None:
    """transformers gives the ids and the decoded text of `ours` out of the folder."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder))
    special = [token.content for token in ours.backend.get_added_tokens_decoder().values() if token.special]
    for text in texts:
        ids = ours.encode(text)
        if not any(token in text for token in special):
            assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_sentencepieces_ids(kind: str, options: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(proto := train_model(kind, **OPTIONS[options]))
    tokenizer, model = Tokenizer.load(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert tokenizer.vocab_size == model.get_piece_size() == 600
    assert (tokenizer.bos_id, tokenizer.eos_id) == tuple(None if i < 0 else i for i in (model.bos_id(), model.eos_id()))
    unlike = 0
    for text in texts():
        # Two characters that count as one, and are normalised to one space where sentencepiece makes two.
        if "\r\n" in text and options == "without-prefix":
            continue
        ours, theirs = tokenizer.encode(text), model.encode(text)
        if ours != theirs:
            unlike += 1
            names = [token for token in ("<s>", "</s>", "<unk>", "<0x41>", "<mask>") if token in text]
            score = sum(map(model.get_score, ours)) - sum(map(model.get_score, theirs))
            assert names or (kind == "unigram" and abs(score) < 1e-4 * len(theirs)), text
        elif model.unk_id() not in ours:
            assert tokenizer.decode(ours) == model.decode(theirs), text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ours), text
    assert unlike <= (0.02 * len(texts()) if kind == "unigram" else 2)
    tokenizer.save(tmp_path / "saved")
    same(tokenizer, tmp_path / "saved", texts())
    assert Tokenizer.load(tmp_path / "saved").sha256 == tokenizer.sha256


def test_a_published_sentencepiece_model_gives_its_ids_from_file_and_folder(tmp_path: Path) -> None:
    path = SHARED / "tokenizers" / "sp_botchan_1000.model"
    if not path.is_file():
        pytest.skip("../shared/data is absent")
    (tmp_path / "spiece.model").write_bytes(path.read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    story = (SHARED / "pretrain" / "sherlock_holmes_pg1661.txt").read_text("utf-8").split("\n\n")[:800]
    for place in (path, tmp_path):
        tokenizer = Tokenizer.load(place)
        assert [tokenizer.encode(text) for text in story] == [model.encode(text) for text in story]


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_sentencepiece_model_without_an_equal_is_refused(kind: str, tmp_path: Path) -> None:
    options = {"hard_vocab_limit": False} if kind == "char" else {}
    (tmp_path / "tokenizer.model").write_bytes(train_model(kind, **options))
    with pytest.raises(DataError, match=f"a {kind} model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("symbol", ["a b", "①"])
def test_a_symbol_that_normalisation_would_change_is_refused(symbol: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_model("bpe", user_defined_symbols=[symbol]))
    with pytest.raises(DataError, match="normalises text, and the symbol"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "half", "tiktoken", "noise"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(damage: str, tmp_path: Path) -> None:
    rng = random.Random(3)
    content = {
        "empty": b"",
        "half": train_model("bpe")[:5000],
        "tiktoken": b"IQ== 0\nIg== 1\nIw== 2\n" * 300,
        "noise": rng.randbytes(5000),
    }[damage]
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match="no sentencepiece model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_files_give_transformers_ids(names: tuple[str, str], tmp_path: Path) -> None:
    from transformers import GPT2TokenizerFast

    backend = byte_level(["<|endoftext|>"])
    content = json.loads(backend.to_str())["model"]
    (tmp_path / names[0]).write_text(json.dumps(content["vocab"]), "utf-8")
    merges = [" ".join(pair) for pair in content["merges"]]
    (tmp_path / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    oracle = GPT2TokenizerFast(vocab=content["vocab"], merges=[tuple(pair) for pair in content["merges"]])
    assert tokenizer.vocab_size == len(oracle) == 600
    assert tokenizer.bos_id == tokenizer.eos_id == content["vocab"]["<|endoftext|>"]
    plain = [text for text in texts() if "<|endoftext|>" not in text]
    assert [tokenizer.encode(text) for text in plain] == [oracle.encode(text) for text in plain]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts()] == texts()
    tokenizer.save(tmp_path / "saved")
    same(tokenizer, tmp_path / "saved", texts())


def test_gpt2_files_of_another_vocabulary_gain_no_token(tmp_path: Path) -> None:
    for special, expected in ((["<s>", "</s>"], "</s>"), ([], None)):
        model = json.loads(byte_level(special).to_str())["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
        (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]), "utf-8")
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.vocab_size == len(model["vocab"])
        assert tokenizer.eos_id == (model["vocab"][expected] if expected else None)


@pytest.mark.parametrize("named", ["LlamaTokenizer", "GPT2Tokenizer", "T5TokenizerFast", "BertTokenizerFast"])
def test_a_class_that_would_change_ids_is_not_exported(named: str, tmp_path: Path) -> None:
    """transformers builds such a class from the vocabulary alone, and sets the rest of tokenizer.json aside."""
    backend = byte_level(["<s>", "</s>", "<unk>", "<pad>"])
    # Tokens of a single digit are none of what those classes do.
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    source = tmp_path / "source"
    source.mkdir()
    backend.save(str(source / "tokenizer.json"))
    config = {
        "tokenizer_class": named,
        "auto_map": {"AutoTokenizer": ["remote.Code", None]},
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        "clean_up_tokenization_spaces": True,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(source)
    tokenizer.save(tmp_path / "saved")
    same(tokenizer, tmp_path / "saved", [*texts(), "12345 don 't , do n't ."])
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert theirs.pad_token == "<pad>"
    chat = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "<|im_start|>hi<|im_end|>"
    marked = theirs.encode("<|im_start|>hi<|im_end|>", add_special_tokens=False)
    assert (marked[0], marked[-1]) == (backend.token_to_id("<|im_start|>"), tokenizer.eos_id)
    assert json.loads((source / "tokenizer_config.json").read_text()) == config


def test_what_transformers_loads_keeps_its_special_tokens_and_template(tmp_path: Path) -> None:
    """A folder that is described, and has no tokenizer.json: as a name on the hub, it goes through transformers."""
    from transformers import AutoTokenizer

    content = json.loads(byte_level(["<|endoftext|>", "<pad>"]).to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]), "utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in content["merges"]), "utf-8")
    config = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", "chat_template": "{{ messages[0].content }}!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in (str(tmp_path), f"hf:{tmp_path}"):
        tokenizer = Tokenizer.load(name)
        saved = tmp_path / f"saved{len(name)}"
        tokenizer.save(saved)
        before, after = AutoTokenizer.from_pretrained(str(tmp_path)), AutoTokenizer.from_pretrained(str(saved))
        assert after.pad_token == before.pad_token == "<pad>"
        assert after.special_tokens_map == before.special_tokens_map
        assert after.chat_template == before.chat_template == Tokenizer.load(saved).chat_template
        assert [after.encode(text) for text in texts()] == [before.encode(text) for text in texts()]


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back_from_a_tokenizer_that_never_saw_its_script(kind: str, tmp_path: Path) -> None:
    train_on_texts([path.read_text("ascii", "ignore") for path in python_sources(4)], 600, tmp_path, kind, {})
    tokenizer, rng = Tokenizer.load(tmp_path), random.Random(9)
    points = [i for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000 and chr(i) != "▁"]
    anything = ["".join(map(chr, rng.sample(points, 40))) for _ in range(200)] + ["".join(map(chr, range(300)))]
    for text in anything + SCRIPTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    same(tokenizer, tmp_path, anything + SCRIPTS)


def test_text_that_names_a_special_token_is_text_though_its_characters_are_unknown(tmp_path: Path) -> None:
    """Hugging Face's unigram model would prefer the token "</s>" to an unknown "<"."""
    (tmp_path / "tokenizer.model").write_bytes(train_model("unigram", byte_fallback=True))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.backend.token_to_id("<") is None
    ids = tokenizer.encode("a </s> b <0x41> c <s><unk>")
    assert not {0, 1, 2, tokenizer.backend.token_to_id("<0x41>")} & set(ids)
    assert tokenizer.decode(ids) == "a </s> b <0x41> c <s><unk>"


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([path.read_text("utf-8") for path in python_sources(4)], trainer)
    return backend
