"""A trained tokenizer gives back every text, and its ids are those of sentencepiece and of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsgpt.data.train_tokenizer import train_tokenizer
from dsgpt.errors import ConfigError, DataError
from dsgpt.tokenizer import Tokenizer
from dsgpt.tokenizer.sentencepiece_json import cut_at_spaces
from dsgpt.tokenizer.training import train_on_texts
from tests.tokenizer.texts import DIFFICULT, fuzz, python_sources

SHARED = Path(__file__).parents[3] / "shared" / "data"
KINDS = ("sentencepiece-bpe", "sentencepiece-unigram", "hf-bpe")
VOCAB_SIZE = 700


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("tokenizers") / kind for kind in KINDS}
    for kind, folder in folders.items():
        # Unigram training is slow: a few sources are enough for it.
        sources = [str(path) for path in python_sources(4 if kind == "sentencepiece-unigram" else 25)]
        copies = folder.parent / f"{kind}.txt"
        copies.write_text("\n".join(Path(source).read_text("utf-8") for source in sources), "utf-8")
        train_tokenizer([copies], VOCAB_SIZE, folder, kind=kind)  # type: ignore[arg-type]
    return folders


def texts() -> list[str]:
    return DIFFICULT + fuzz(1500, seed=7) + [path.read_text("utf-8") for path in python_sources(40)[25:]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_exactly(trained: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.load(trained[kind])
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts()] == texts()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_folder_with_the_same_ids(trained: dict[str, Path], kind: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(trained[kind])
    theirs = AutoTokenizer.from_pretrained(str(trained[kind]))
    plain = [text for text in texts() if "<s>" not in text and "</s>" not in text]
    assert len(theirs) == tokenizer.vocab_size == VOCAB_SIZE
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert [theirs.encode(text, add_special_tokens=False) for text in plain] == [tokenizer.encode(t) for t in plain]
    # As in training, a text begins with BOS there unless it is told otherwise.
    assert theirs("x = 1").input_ids == [tokenizer.bos_id, *tokenizer.encode("x = 1")]
    assert theirs.decode(tokenizer.encode("  x = 1\n")) == "  x = 1\n"


def test_the_ids_are_those_of_sentencepiece_bpe(trained: dict[str, Path]) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(trained["sentencepiece-bpe"] / "tokenizer.model"))
    tokenizer = Tokenizer.load(trained["sentencepiece-bpe"])
    assert [tokenizer.encode(text) for text in texts()] == [model.encode(text) for text in texts()]


def test_the_ids_are_those_of_sentencepiece_unigram_or_score_the_same(trained: dict[str, Path]) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(trained["sentencepiece-unigram"] / "tokenizer.model"))
    tokenizer = Tokenizer.load(trained["sentencepiece-unigram"])
    different = [(tokenizer.encode(t), model.encode(t)) for t in texts() if tokenizer.encode(t) != model.encode(t)]
    assert len(different) < 0.05 * len(texts())
    for ours, theirs in different:
        assert sum(map(model.get_score, ours)) == pytest.approx(sum(map(model.get_score, theirs)), rel=1e-6)


def test_text_that_looks_like_a_special_token_is_text(trained: dict[str, Path]) -> None:
    for folder in trained.values():
        tokenizer = Tokenizer.load(folder)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode("a <s> b </s> c"))


def test_a_document_stands_between_bos_and_eos(trained: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(trained["sentencepiece-bpe"])
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode_document("x = 1") == [1, *tokenizer.encode("x = 1"), 2]
    assert tokenizer.encode_document("") == [1, 2]
    assert tokenizer.decode(tokenizer.encode_document("x = 1")) == "<s>x = 1</s>"
    assert tokenizer.decode(tokenizer.encode_document("x = 1"), skip_special_tokens=True) == "x = 1"


def test_line_ends_and_indentation_are_part_of_tokens(trained: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(trained["sentencepiece-bpe"])
    assert len(tokenizer.encode(" " * 8)) == 1
    assert len(tokenizer.encode(":\n")) == 1


def test_cutting_at_spaces_beforehand_changes_no_id(trained: dict[str, Path]) -> None:
    import tokenizers

    path = trained["sentencepiece-bpe"] / "tokenizer.json"
    whole, cut = (tokenizers.Tokenizer.from_file(str(path)) for _ in range(2))
    cut_at_spaces(cut)
    assert (whole.pre_tokenizer, type(cut.pre_tokenizer).__name__) == (None, "Split")
    assert [cut.encode(text).ids for text in texts()] == [whole.encode(text).ids for text in texts()]
    # With a piece that goes on after a space it would, so then nothing is cut.
    content = json.loads(path.read_text("utf-8"))
    content["model"]["vocab"]["x▁y"] = VOCAB_SIZE
    crossing = tokenizers.Tokenizer.from_str(json.dumps(content))
    cut_at_spaces(crossing)
    assert crossing.pre_tokenizer is None


def test_encode_batch_gives_what_encode_gives(trained: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(trained["sentencepiece-bpe"])
    assert tokenizer.encode_batch(DIFFICULT) == [tokenizer.encode(text) for text in DIFFICULT]


def test_a_saved_copy_is_the_same_tokenizer(trained: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in trained.items():
        tokenizer = Tokenizer.load(folder)
        tokenizer.save(tmp_path / kind)
        copy = Tokenizer.load(tmp_path / kind)
        assert copy.sha256 == tokenizer.sha256
        assert (copy.bos_id, copy.eos_id, copy.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, VOCAB_SIZE)
        assert {path.name for path in (tmp_path / kind).iterdir()} == {path.name for path in folder.iterdir()}


def test_the_hash_is_of_the_content_and_not_of_the_layout(trained: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(trained["hf-bpe"])
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).sha256 != tokenizer.sha256


def test_settings_for_inference_batches_change_no_ids(trained: dict[str, Path], tmp_path: Path) -> None:
    import tokenizers

    tokenizer = Tokenizer.load(trained["hf-bpe"])
    tokenizer.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a text of more than four tokens, and of fewer than sixty-four"
    assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256


def test_the_same_text_trains_the_same_tokenizer(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = trained["sentencepiece-bpe"]
    again = train_tokenizer([folder.parent / "sentencepiece-bpe.txt"], VOCAB_SIZE, tmp_path / "again")
    assert again.sha256 == Tokenizer.load(folder).sha256
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_gpt2_files_alone_make_gpt2s_tokenizer(tmp_path: Path) -> None:
    files = SHARED / "tokenizers"
    if not files.is_dir():
        pytest.skip("../shared/data is absent")
    (tmp_path / "vocab.json").write_bytes((files / "gpt2_vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((files / "gpt2_merges.txt").read_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    # Ids as published with GPT-2.
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, 50256, 50256)
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").sha256 == tokenizer.sha256


def test_a_pretrained_llama_tokenizer_gives_transformers_ids() -> None:
    folder = SHARED / "weights" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    from transformers import AutoTokenizer

    tokenizer, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder))
    story = "Once upon a time, there was a little girl named Lily.\nShe said: “no”."
    assert tokenizer.encode(story) == theirs.encode(story, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(story)) == story
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)


def test_what_is_no_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer folder"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(DataError, match=r"cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_special_token_outside_the_vocabulary_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    Tokenizer.load(trained["hf-bpe"]).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<begin>"}}))
    with pytest.raises(DataError, match="bos_token is not in its vocabulary"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_text_for_the_vocabulary_is_an_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer of 5000 tokens"):
        train_on_texts(["one two three"], 5000, tmp_path, kind, {})  # type: ignore[arg-type]


def test_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such kind"):
        train_on_texts(["text"], 300, tmp_path, "wordpiece", {})  # type: ignore[arg-type]
