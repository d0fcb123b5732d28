"""Trains a tokenizer on texts and writes its folder.

    train_on_texts(texts, vocab_size=32000, output="tokenizers/bpe32k", kind="sentencepiece-bpe", record={...})

    sentencepiece-bpe       the default: seconds to train, its tokenizer.json gives exactly sentencepiece's ids
    sentencepiece-unigram   some twenty times slower to train; where two cuts of a text score the same, its
                            tokenizer.json, which alone decides, may choose the other one than sentencepiece
    hf-bpe                  byte-level BPE as GPT-2 has it: every text comes back exactly, U+2581 too

Whitespace is kept as it is: no normalisation, no added or removed spaces, runs of spaces are tokens, and characters
that are not in the vocabulary fall back to bytes. One character does not come back from the sentencepiece kinds: they
write a space as U+2581, so a literal U+2581 decodes to a space.

Sentencepiece is fed chunks of several lines, not lines, so that line ends take part in the merges: on Python sources
(vocabulary 4096) that gives 3.3 bytes per token where lines give 3.1. Letting a token mix letters with punctuation,
as in "self." or "):", gives 3.7.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tokenizers

from dsgpt.errors import ConfigError, DataError, DsgptError
from dsgpt.tokenizer.sentencepiece_json import convert
from dsgpt.tokenizer.sentencepiece_model import read_model
from dsgpt.tokenizer.tokenizer import Tokenizer

Kind = Literal["sentencepiece-bpe", "sentencepiece-unigram", "hf-bpe"]
KINDS: tuple[Kind, ...] = ("sentencepiece-bpe", "sentencepiece-unigram", "hf-bpe")
RECORD = "tokenizer_training.json"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
_CHUNK_CHARS = 4000
# Sentencepiece passes over a sentence with one of these: NUL and the mark it uses itself for what it does not know.
_WITHOUT_RESERVED = str.maketrans("", "", "\0▅")


def train_on_texts(
    texts: Sequence[str], vocab_size: int, output: str | Path, kind: Kind, record: dict[str, Any]
) -> Tokenizer:
    """Train, check on the texts that nothing is lost, write `output` and return the tokenizer loaded from there.

    Written: tokenizer.json, tokenizer_config.json, tokenizer.model (sentencepiece kinds) and tokenizer_training.json,
    the last, which holds `record` and what was measured. Raises ConfigError for an unknown kind, DataError where the
    texts are too few, or too varied, for `vocab_size`.
    """
    if kind not in KINDS:
        raise ConfigError("there is no such kind of tokenizer", seen=repr(kind), do=f"one of {', '.join(KINDS)}")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {}
    if kind == "hf-bpe":
        backend = _train_byte_level(texts, vocab_size)
    else:
        backend, model, measured = _train_sentencepiece(texts, vocab_size, kind)
        (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": None if kind == "hf-bpe" else UNK,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
    tokenizer = Tokenizer.load(folder)
    versions = {name: version(name) for name in ("tokenizers", "sentencepiece")}
    measured["bytes_per_token"] = _check_round_trip(tokenizer, texts, kind)
    _write_json(folder / RECORD, {**record, "sha256": tokenizer.sha256, "versions": versions, "measured": measured})
    return tokenizer


def _train_sentencepiece(
    texts: Sequence[str], vocab_size: int, kind: Kind
) -> tuple[tokenizers.Tokenizer, bytes, dict[str, Any]]:
    import sentencepiece

    unigram = kind == "sentencepiece-unigram"
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(texts),
            model_writer=model,
            model_type="unigram" if unigram else "bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            byte_fallback=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            # In bytes: a chunk of the longest characters, and some.
            max_sentence_length=_CHUNK_CHARS * 8,
            # Fixed, because unigram's sums depend on it.
            num_threads=4,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _too_large(vocab_size, texts, str(error)) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    backend = convert(read_model(model.getvalue()))
    backend.encode_special_tokens = True
    checked = _checked(texts)
    equal = sum(processor.encode(text) == backend.encode(text, add_special_tokens=False).ids for text in checked)
    if equal < len(checked) and not unigram:
        raise DsgptError(
            "the trained model and its tokenizer.json disagree",
            seen=f"{len(checked) - equal} of {len(checked)} texts, sentencepiece {version('sentencepiece')}, "
            f"tokenizers {version('tokenizers')}",
            do="use --kind hf-bpe, and report these versions",
        )
    return backend, model.getvalue(), {"texts_equal_to_sentencepiece": [equal, len(checked)]}


def _train_byte_level(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    if vocab_size < 256 + 2:
        raise _too_large(vocab_size, texts, "256 bytes and 2 special tokens are the least", too_small=True)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise _too_large(vocab_size, texts, f"they give {backend.get_vocab_size()} tokens")
    bos = backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return backend


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of some lines each. A line's end goes to the front of the next: sentencepiece drops it at the back."""
    for text in texts:
        chunk = ""
        for line in text.translate(_WITHOUT_RESERVED).split("\n"):
            chunk += "\n" + line
            if len(chunk) >= _CHUNK_CHARS:
                yield from (chunk[i : i + _CHUNK_CHARS] for i in range(0, len(chunk), _CHUNK_CHARS))
                chunk = ""
        if chunk:
            yield chunk


def _checked(texts: Sequence[str]) -> list[str]:
    """Texts to check a new tokenizer on: at most a hundred, from all over, cut to a bounded length."""
    return [text[:20_000] for text in texts[:: max(1, len(texts) // 100)]][:100]


def _check_round_trip(tokenizer: Tokenizer, texts: Sequence[str], kind: Kind) -> float:
    """Bytes per token on the checked texts. Raises DsgptError where decoding does not give a text back."""
    num_bytes = num_tokens = 0
    for text in _checked(texts):
        ids = tokenizer.encode(text)
        num_bytes += len(text.encode())
        num_tokens += len(ids)
        expected = text if kind == "hf-bpe" else text.replace("▁", " ")
        if tokenizer.decode(ids) != expected:
            raise DsgptError(
                "the trained tokenizer does not give a text back",
                seen=f"{text[:80]!r}..., tokenizers {version('tokenizers')}",
                do="use another --kind, and report this text and version",
            )
    return round(num_bytes / max(1, num_tokens), 3)


def _too_large(vocab_size: int, texts: Sequence[str], seen: str, too_small: bool = False) -> DataError:
    return DataError(
        f"no tokenizer of {vocab_size} tokens can be trained on these texts",
        seen=f"{sum(map(len, texts))} characters: {' '.join(seen.split())}",
        do="ask for a larger --vocab-size" if too_small else "give more text, or another --vocab-size",
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
