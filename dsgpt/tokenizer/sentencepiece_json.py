"""Turns a sentencepiece model into a tokenizer.json with the same ids.

    backend = convert(read_model(Path("tokenizer.model").read_bytes()))

What makes the ids equal, beside vocabulary and scores:

BPE      a merge for every way to put a piece together from two others, in the order of the scores.
unigram  Hugging Face's model would take "<s>" or "<0x41>" in plain text for the token of that name, sentencepiece's knows
         that they are none: such text is cut in two beforehand, where no token reaches over the cut if there is a place.

For BPE, symbols that a user defined are cut out of the text before the model sees it. Trade-offs: where two ways to cut
a text score the same, unigram may choose the other one than sentencepiece, whose sums are less exact. Where text is
normalised and runs of spaces are kept, "\\r\\n" becomes one space, for sentencepiece two; other characters of several
parts (an accent of its own, an emoji with a joiner) can differ so too, as with every conversion to this format. What is
unknown decodes to its token's name.
"""

from __future__ import annotations

import json
import re

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from dsgpt.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)

_SPACE = "▁"
_NO_CROSSING = re.compile(f"{_SPACE}*[^{_SPACE}]*", re.DOTALL)
# Spaces at the ends, and all but one of a run.
_EXTRA_SPACES = r"\A +| +\z| +(?= )"


def convert(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """The Hugging Face tokenizer of `model`. It adds BOS, where there is one, unless asked not to add special tokens.

    Raises ValueError for a model that this format has no words for.
    """
    if model.kind not in ("unigram", "bpe") or model.space_is_suffix or not model.escape_whitespaces:
        raise ValueError(f"a {model.kind} model, or one that marks spaces in an unusual way: it cannot be converted")
    defined = [model.pieces[i] for i in model.ids_of(USER_DEFINED)]
    if changed := [symbol for symbol in defined if _is_normalized(symbol, model)]:
        raise ValueError(f"it normalises text, and the symbol {changed[0]!r} too: it cannot be converted")
    backend = tokenizers.Tokenizer(_model_of(model, defined))
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(_EXTRA_SPACES), ""))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    backend.normalizer = normalizers.Sequence(steps) if len(steps) > 1 else steps[0]
    cuts = []
    if defined and model.kind == "bpe":
        longest_first = sorted(defined, key=len, reverse=True)
        cuts.append(pre_tokenizers.Split(Regex("|".join(map(_quoted, longest_first))), "isolated"))
    if defined or model.kind == "unigram":
        cuts.append(pre_tokenizers.Split(Regex(_inside_names(model)), "merged_with_previous"))
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts) if len(cuts) > 1 else cuts[0]
    # One space at the start stands for the prefix.
    leading = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *leading]
    )
    control = [model.pieces[i] for i in sorted(model.ids_of(CONTROL) + model.ids_of(UNKNOWN))]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    if model.bos_id is not None:
        bos = model.pieces[model.bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, model.bos_id)]
        )
    return backend


def _model_of(model: SentencePieceModel, defined: list[str]) -> models.Model:
    unknown = model.ids_of(UNKNOWN)[0]
    normal = model.ids_of(NORMAL)
    if model.kind == "unigram":
        # What is unknown scores ten less than the least of all entries, in both libraries.
        known = [model.scores[i] for i in normal] or [0.0]
        scores = dict.fromkeys(range(len(model.pieces)), min(known))
        scores |= {i: model.scores[i] for i in normal}
        # Theirs is 0 and sentencepiece takes a little off, so that the fewest symbols win.
        scores |= {i: model.scores[i] - 0.1 for i in model.ids_of(USER_DEFINED)}
        entries = [(piece, scores[i]) for i, piece in enumerate(model.pieces)]
        return models.Unigram(entries, unk_id=unknown, byte_fallback=model.byte_fallback)
    return models.BPE(
        {piece: i for i, piece in enumerate(model.pieces)},
        _merges({model.pieces[i]: model.scores[i] for i in normal}),
        unk_token=model.pieces[unknown],
        byte_fallback=model.byte_fallback,
        fuse_unk=not model.byte_fallback,
        ignore_merges=bool(defined),
    )


def _is_normalized(symbol: str, model: SentencePieceModel) -> bool:
    """Whether text could be, or not be, a symbol after normalisation only; sentencepiece looks for symbols before it."""
    if not model.charsmap and not model.remove_extra_whitespaces:
        return " " in symbol
    mapped = normalizers.Precompiled(model.charsmap).normalize_str(symbol) if model.charsmap else symbol
    return mapped != symbol or _SPACE in symbol or any(map(str.isspace, symbol))


def _inside_names(model: SentencePieceModel) -> str:
    """Matches the first part of every name that is no text, where the rest follows."""
    pairs = {
        piece[i : i + 2] for n in model.ids_of(NORMAL) for piece in [model.pieces[n]] for i in range(len(piece) - 1)
    }

    def place(name: str) -> int:
        return next((i for i in range(1, len(name)) if name[i - 1 : i + 1] not in pairs), 1)

    names = [model.pieces[i] for kind in (CONTROL, UNKNOWN, UNUSED) for i in model.ids_of(kind)]
    cut = [(name[: place(name)], name[place(name) :]) for name in names if len(name) > 1]
    patterns = [f"{_quoted(left)}(?={_quoted(right)})" for left, right in cut]
    if model.ids_of(BYTE):
        patterns.append("<(?=0x[0-9A-F]{2}>)" if place("<0x") == 1 else "<0(?=x[0-9A-F]{2}>)")
    return "|".join(patterns)


def _quoted(text: str) -> str:
    """A regular expression for a text as the normaliser leaves it."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text.replace(" ", _SPACE))


def cut_at_spaces(backend: tokenizers.Tokenizer) -> None:
    """Let a sentencepiece-like BPE tokenizer work on words instead of whole texts: equal ids, about 1.6 times as fast.

    Where no entry of the vocabulary goes on from text into a space, no merge can either, so text may be cut before
    spaces. That is done in memory and not in tokenizer.json, because other readers of such files expect no
    pre-tokenizer. A tokenizer of another kind is left as it is.
    """
    if backend.pre_tokenizer is not None:
        return
    content = json.loads(backend.to_str())
    kind = (content["normalizer"], content["pre_tokenizer"], content["model"]["type"])
    if kind != ({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}, None, "BPE"):
        return
    if all(_NO_CROSSING.fullmatch(piece) for piece in content["model"]["vocab"]):
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{_SPACE}+[^{_SPACE}]*"), "isolated")


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first; within a piece the shortest left part first."""
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    return merges
