"""Examples of an application: what kind of question it is, whose conversation or document it comes from, the record itself.

    split = split_examples(examples, Shares(validation=0.05, test=0.1), seed=1234)

Held out is by group, a conversation or a document, so that nothing of one is on both sides. Near copies are examples that
share nine in ten of their word triples with an earlier one; held-out ones come first, so what is left out is training data.
A group's side follows from its name and the seed alone: more data later moves nothing. All texts and their triples are in
memory, about 100 bytes a word: millions of words, not billions.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsgpt.data.near_copies import NearCopies
from dsgpt.errors import DataError

NEAR_COPY_SHARE = 0.9
_SIDES = ("test", "validation", "train")


@dataclass(frozen=True)
class Example:
    """`record` is a chat record (dsgpt.data.chat_formats). `kind` names the task.

    `document` is what all examples of a group are about, where that is what near copies are told by: a copied document goes
    with all its examples. Where it is empty, near copies are told by what is said.
    """

    kind: str
    group: str
    record: dict[str, Any]
    document: str = ""

    @property
    def answers(self) -> list[str]:
        """What the assistant says, in order."""
        if "messages" in self.record:
            return [one["content"] for one in self.record["messages"] if one["role"] == "assistant"]
        return [self.record["output"]]


@dataclass(frozen=True)
class Shares:
    """Of the groups of each kind."""

    validation: float = 0.05
    test: float = 0.10


@dataclass
class Split:
    """Examples by side, and how many were left out of each kind as near copies."""

    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    near_copies: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, dict[str, int]]:
        """{kind: {side: number}}."""
        sides = {side: Counter(one.kind for one in getattr(self, side)) for side in _SIDES}
        kinds = sorted({kind for counts in sides.values() for kind in counts} | set(self.near_copies))
        return {
            kind: {side: sides[side][kind] for side in _SIDES} | {"near_copies": self.near_copies[kind]}
            for kind in kinds
        }


def split_examples(examples: Iterable[Example], shares: Shares, seed: int) -> Split:
    """Every example on its group's side, those of the held-out sides first seen; near copies left out and counted."""
    sides: dict[str, list[Example]] = {side: [] for side in _SIDES}
    for one in examples:
        sides[_side(one, shares, seed)].append(one)
    split = Split()
    seen: dict[str, NearCopies] = defaultdict(lambda: NearCopies(lambda *sizes: NEAR_COPY_SHARE * max(sizes)))
    documents: dict[tuple[str, str], bool] = {}  # whether it is a near copy
    for side in _SIDES:
        for one in sides[side]:
            place = (one.kind, one.group)
            if not one.document or place not in documents:
                copied = seen[one.kind].add(_triples(one.document or text_of(one.record))) is not None
                documents[place] = copied
            if documents[place] if one.document else copied:
                split.near_copies[one.kind] += 1
            else:
                getattr(split, side).append(one)
    return split


def _side(one: Example, shares: Shares, seed: int) -> str:
    place = place_of(one.group, seed)
    if place < shares.test:
        return "test"
    return "validation" if place < shares.test + shares.validation else "train"


def place_of(group: str, seed: int) -> float:
    """Where in [0, 1) a group lies, the same in every kind: a document's summaries are on the side of its questions."""
    digest = hashlib.blake2b(f"{seed}\0{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _triples(text: str) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + 3])) for i in range(max(1, len(words) - 2))}


def text_of(record: dict[str, Any]) -> str:
    """All that is said in a chat record but the instruction, which is the same in many."""
    said = [message["content"] for message in record.get("messages", ())]
    return "\n".join([*said, *(str(record[name]) for name in ("input", "output") if name in record)])


def conversation(turns: Iterable[tuple[bool, str]]) -> list[dict[str, str]]:
    """Messages of (is an agent's, text): turns of one side in a row are one, and what an agent says first is left out."""
    messages: list[dict[str, str]] = []
    for is_agent, text in turns:
        role = "assistant" if is_agent else "user"
        if not text.strip():
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + text.strip()
        elif messages or not is_agent:
            messages.append({"role": role, "content": text.strip()})
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    return messages


def stretches(
    messages: Sequence[dict[str, Any]], fits: Callable[[list[dict[str, Any]]], bool]
) -> Iterator[list[dict[str, Any]]]:
    """One part of a conversation after another, each of as many exchanges as fit, with the system's messages before it.

    An exchange begins with a user after an assistant; one that alone does not fit is a part of its own.
    """
    begin = next((place for place, one in enumerate(messages) if one["role"] != "system"), len(messages))
    head, part = list(messages[:begin]), list[dict[str, Any]]()
    starts = [place for place in range(begin, len(messages)) if place == begin or _begins_exchange(messages, place)]
    for start, end in itertools.pairwise([*starts, len(messages)]):
        exchange = list(messages[start:end])
        if part and not fits([*head, *part, *exchange]):
            yield [*head, *part]
            part = []
        part += exchange
    yield [*head, *part]


def _begins_exchange(messages: Sequence[dict[str, Any]], place: int) -> bool:
    return messages[place]["role"] == "user" and messages[place - 1]["role"] == "assistant"


def text_in(record: Mapping[str, Any], name: str) -> str:
    """A field without the spaces around it; "" where it is empty. Raises DataError for anything but text."""
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError("a record holds something else than text", seen=f"{name}: {value!r:.80}")
    return (value or "").strip()


def name_of(record: Mapping[str, Any], *names: str) -> str:
    """What a record calls itself in the first of these fields, else what its content is."""
    given = next((record[name] for name in names if record.get(name) is not None), None)
    return str(given) if given is not None else hashlib.blake2b(repr(record).encode(), digest_size=8).hexdigest()


def task(instruction: str, given: str, answer: str, **more: Any) -> dict[str, Any]:
    """A record with one question: what to do, with what, and the answer."""
    return {"instruction": instruction, "input": given.strip(), "output": answer.strip(), **more}
