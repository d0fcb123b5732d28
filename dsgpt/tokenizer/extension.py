"""Whether a tokenizer is another one with tokens added: then a model of the other one can grow.

    added, differences = extension(old, new)          # tokens in the order of their ids; nothing may differ otherwise

Every old token keeps its id, and text without new tokens keeps its ids: the parts that cut text are equal, the vocabulary is
only longer. Settings of inference, and what is put around a text (`post_processor`), are not used here and do not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dsgpt.tokenizer.tokenizer import Tokenizer

_UNUSED = {"padding", "truncation", "post_processor"}
_COMPARED_BELOW = {"added_tokens", "model"}


def extension(old: Tokenizer, new: Tokenizer) -> tuple[list[str], list[str]]:
    """(tokens that `new` adds to `old`, in words what else differs)."""
    before, after = (one.backend.get_vocab(with_added_tokens=True) for one in (old, new))
    added = sorted(after.keys() - before.keys(), key=after.__getitem__)
    return added, list(_differences(old, new, before, after, added))


def _differences(
    old: Tokenizer, new: Tokenizer, before: Mapping[str, int], after: Mapping[str, int], added: list[str]
) -> Iterator[str]:
    moved = [token for token, number in before.items() if after.get(token) != number]
    if moved:
        yield f"{len(moved)} tokens have other ids or are missing, e.g. {min(moved)!r}"
    inside = [token for token in added if after[token] < old.vocab_size]
    if inside:
        yield f"{inside[0]!r} is new and has the id {after[inside[0]]}, among those of the {old.vocab_size} there were"
    ours, theirs = (json.loads(one.backend.to_str()) for one in (old, new))
    for key in sorted((ours.keys() | theirs.keys()) - _UNUSED - _COMPARED_BELOW):
        if ours.get(key) != theirs.get(key):
            yield f"its {key} is another one"
    one, two = ours["model"], theirs["model"]
    for key in sorted((one.keys() | two.keys()) - {"vocab"}):
        if one.get(key) != two.get(key):
            yield f"its model's {key} is another one"
    # Unigram has a list of (token, score): scores decide how text is cut.
    if isinstance(one["vocab"], list) and two["vocab"][: len(one["vocab"])] != one["vocab"]:
        yield "its model's scores are others"
    known = _by_id(ours)
    for number, token in _by_id(theirs).items():
        # One that is special cuts no text here, so it may have been a plain token before.
        if number in known and known[number] != token:
            yield f"the added token {token['content']!r} has other properties"
        elif number not in known and number < old.vocab_size and not token["special"]:
            yield f"{token['content']!r} was a token of the model and is an added one"


def _by_id(tokenizer_json: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    return {token["id"]: token for token in tokenizer_json.get("added_tokens") or []}
