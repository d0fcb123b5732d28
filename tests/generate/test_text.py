"""Texts of rows: whole characters, stop strings, prompts of chats; against decoding everything at once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from dsgpt.data.chat_template import DEFAULT, ChatTemplate
from dsgpt.errors import DataError
from dsgpt.generate.chat import Chat
from dsgpt.generate.decoder import Decoder
from dsgpt.generate.sampling import Sampling
from dsgpt.generate.text import TextStream, complete, stream, text_prompt
from dsgpt.tokenizer.tokenizer import Tokenizer
from tests.model import test_gpt

TEXT = "Grüße 你好 👩‍👩‍👧 naïve \u200bcafé… <b>end</b>\n\n\tx"


def byte_tokenizer(special=("<eos>", "<|im_start|>", "<|im_end|>"), template=None):
    """One token for each byte: every character beyond ASCII comes in pieces."""
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, {"eos_token": "<eos>"} if "<eos>" in special else {}, template=template)


def pieces(tokenizer, prompt, text, stop=(), at_once=1):
    ids, found = tokenizer.encode(text), []
    stream_ = TextStream(tokenizer, tokenizer.encode(prompt), stop)
    for start in range(0, len(ids), at_once):
        found.append(stream_.add(ids[start : start + at_once]))
    return [*found, stream_.rest()], stream_.stopped


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_pieces_make_up_the_text_and_none_ends_within_a_character(at_once):
    found, _ = pieces(byte_tokenizer(), "Once ", TEXT, at_once=at_once)
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)


def test_pieces_of_words_keep_their_spaces(dataset):
    tokenizer = Tokenizer.load(dataset.parent / "tokenizer")
    text = "def f(x):\n    return x  # a  comment\n" + TEXT
    found, _ = pieces(tokenizer, "import os\n", text)
    assert "".join(found) == text


def test_bytes_that_are_no_character_come_at_the_end():
    tokenizer = byte_tokenizer()
    stream_ = TextStream(tokenizer, [], ())
    half = tokenizer.encode("é")[:1]
    assert stream_.add(tokenizer.encode("a")) == "a"
    assert stream_.add(half) == "" and stream_.rest() == "\ufffd"


@pytest.mark.parametrize(
    "stop, expected",
    [
        (("</b>",), TEXT.partition("</b>")[0]),
        (("zzz", "é…"), TEXT.partition("é…")[0]),
        (("end", "<b>"), TEXT.partition("<b>")[0]),
        (("\n\n\tx!",), TEXT),
        (("G",), ""),
    ],
    ids=["across-tokens", "second", "first-in-text", "only-its-beginning", "at-once"],
)
def test_a_stop_string_ends_the_text_and_nothing_of_it_is_given(stop, expected):
    found, stopped = pieces(byte_tokenizer(), "", TEXT, stop)
    assert "".join(found) == expected and stopped == (expected != TEXT)


def test_a_special_token_can_be_a_stop_string():
    tokenizer = byte_tokenizer()
    model, prompt = small_model(tokenizer), text_prompt(tokenizer, "ab")
    special = {tokenizer.special_id(text): text for text in ("<|im_start|>", "<|im_end|>")}
    for seed in range(100):
        chosen = Sampling(40, temperature=3.0, top_k=0, seed=seed)
        decoder = Decoder(model)
        row = decoder.add(prompt.ids, chosen)
        while decoder.step():
            pass
        if first := next((token for token in row.new if token in special), None):
            break
    (ended,) = complete(model, tokenizer, [prompt], replace(chosen, stop=(special[first],)))
    assert ended.finish == "stop" and ended.tokens == row.new.index(first)


def test_a_window_of_the_prompt_does_not_begin_in_a_character():
    """Bytes of characters as tokens of their own, as sentencepiece falls back to: the run is decoded as one."""
    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend, {})
    prompt, new = list("你好吗们".encode()), list("呢 hello".encode())
    stream_ = TextStream(tokenizer, prompt, ())
    assert "".join(stream_.add([token]) for token in new) + stream_.rest() == "呢 hello"


def small_model(tokenizer):
    config = test_gpt.LLAMA.model_copy(update={"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64})
    return test_gpt.make(config, scale=3.0).eval()


def test_streamed_and_together_are_the_same_texts_in_the_order_of_their_prompts():
    tokenizer = byte_tokenizer()
    model = small_model(tokenizer)
    prompts = [text_prompt(tokenizer, text) for text in ("a", "Grüße an alle", "", "x y z", "abc" * 9)]
    chosen = Sampling(24, temperature=1.0, top_k=0, seed=4)
    alone = ["".join(stream(model, tokenizer, prompt, chosen)) for prompt in prompts]
    together = complete(model, tokenizer, prompts, chosen, batch_size=2)
    assert [one.text for one in together] == alone and len(set(alone)) == 5
    assert complete(model, tokenizer, [], chosen) == []
    stop = next(text[3:5] for text in alone if len(text) > 6)
    ended = complete(model, tokenizer, prompts, Sampling(24, 1.0, 0, seed=4, stop=(stop,)), batch_size=3)
    assert [one.text for one in ended] == [text.partition(stop)[0] for text in alone]
    assert {one.finish for one, text in zip(ended, alone, strict=True) if stop in text} == {"stop"}


def test_an_empty_prompt_begins_after_the_end_of_another_text_or_is_an_error():
    assert text_prompt(byte_tokenizer(), "").ids == [byte_tokenizer().eos_id]
    bare = byte_tokenizer(special=())
    with pytest.raises(DataError, match="empty"):
        complete(small_model(bare), bare, [text_prompt(bare, "")], Sampling())


def test_a_chat_prompt_is_the_beginning_of_what_was_trained_on():
    tokenizer = byte_tokenizer(template=DEFAULT)
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Is <|im_end|> a word?"}]
    answer = {"role": "assistant", "content": "Yes.", "train": True}
    prompt = Chat(tokenizer).prompt(asked)
    whole = ChatTemplate(tokenizer).encode([*({**one, "train": False} for one in asked), answer], [])
    assert whole.ids[: len(prompt.ids)].tolist() == prompt.ids
    assert int(whole.learned.argmax()) == len(prompt.ids)
    ends = {tokenizer.eos_id, tokenizer.backend.token_to_id("<|im_end|>")}
    assert set(prompt.end_ids) == ends and prompt.stop == ()
    assert int(whole.ids[len(prompt.ids) + len(tokenizer.encode("Yes."))]) in ends


def test_where_the_tokenizer_has_no_token_for_the_end_of_a_turn_its_text_ends_the_answer():
    tokenizer = byte_tokenizer(special=("<eos>",), template=DEFAULT)
    prompt = Chat(tokenizer).prompt([{"role": "user", "content": "Hello"}])
    assert set(prompt.end_ids) == {tokenizer.eos_id} and prompt.stop == ("<|im_end|>",)


def test_prompts_agree_with_transformers(tmp_path):
    from transformers import AutoTokenizer

    byte_tokenizer(template=DEFAULT).save(tmp_path)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "é"},
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True)
    assert Chat(Tokenizer.load(tmp_path)).prompt(messages).ids == list(theirs["input_ids"])


@pytest.mark.parametrize(
    "messages, seen",
    [
        ([], "no message"),
        ([{"role": "wizard", "content": "x"}], "wizard"),
        ([{"role": "user", "content": " "}], "empty"),
        (
            [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, {"role": "user", "content": ""}],
            "message 0",
        ),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "assistant"),
        ([{"role": "user", "content": 3}], "not a text"),
        (["hello"], "not an object"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
    ],
    ids=["none", "role", "empty", "empty-before", "answered", "number", "text", "image"],
)
def test_what_cannot_be_answered_says_why(messages, seen):
    with pytest.raises(DataError, match=seen):
        Chat(byte_tokenizer(), "chatml").prompt(messages)


def test_a_tokenizer_without_template_is_not_guessed_at():
    with pytest.raises(DataError, match="no chat template"):
        Chat(byte_tokenizer())
    with pytest.raises(DataError, match="is not one"):
        Chat(byte_tokenizer(), "{% for %}")


def test_vocabulary_of_the_model_may_be_larger_than_the_tokenizers():
    tokenizer = byte_tokenizer()
    config = test_gpt.LLAMA.model_copy(update={"vocab_size": tokenizer.vocab_size + 40})
    model = test_gpt.make(config).eval()
    with torch.no_grad():
        model.lm_head.weight[-1] += 100.0 * model.lm_head.weight.abs().max()
    done = complete(model, tokenizer, [text_prompt(tokenizer, "ab")], Sampling(5, 1.0, 0))
    assert done[0].tokens == 5 and json.dumps(done[0].text)
