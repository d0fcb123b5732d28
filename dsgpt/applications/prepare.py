"""The files of an application: conversations to train on, and questions to measure with.

    output/
      train.jsonl  train-tenth.jsonl  validation.jsonl  test.jsonl     messages, as dsgpt data prepare-chat reads them
      test-KIND.jsonl     the same test examples as questions with answers, as dsgpt evaluate reads them, in random order
      summary.json                                          of each kind: how many on each side, what was left out or cut

A tenth is a tenth of the groups. Of a conversation each answer of the assistant is a question of its own. What is longer than
a training sequence: conversations are divided between exchanges, inputs of single questions cut to their lead; where the lead
lacks the passage that is the answer, the example is left out. In the questions all is whole, so that evaluation can choose
(--long-input).
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from dsgpt.applications.records import Example, Shares, Split, place_of, split_examples, stretches
from dsgpt.commands import write_text
from dsgpt.data.sources import BadLine, Piece, extent_of, find_sources, read_records
from dsgpt.errors import DataError
from dsgpt.evaluate.metrics import normalise
from dsgpt.evaluate.questions import PromptWriter, Question
from dsgpt.generate.chat import Chat
from dsgpt.tokenizer.tokenizer import Tokenizer

SUMMARY = "summary.json"
_TENTH = 0.1
_ROOM = 2  # tokens that a cut elsewhere can make more
_LONG_ANSWER = 95  # percentile of the training answers' tokens


def application(name: str) -> ModuleType:
    """The module that knows an application's data."""
    return importlib.import_module(f"dsgpt.applications.{name}")


def chat_of(tokenizer: Tokenizer) -> Chat:
    """By the tokenizer's own template, else ChatML: as dsgpt data prepare-chat writes conversations."""
    return Chat(tokenizer, None if tokenizer.chat_template else "chatml")


@dataclass
class _Counts:
    """Examples by kind for which something had to be done."""

    cut: Counter[str] = field(default_factory=Counter)
    divided: Counter[str] = field(default_factory=Counter)
    beyond: Counter[str] = field(default_factory=Counter)


def prepare(
    name: str,
    sources: Mapping[str, Sequence[str]],
    output: Path,
    tokenizer: Tokenizer,
    seq_length: int,
    seed: int = 1234,
    shares: Shares | None = None,
    limits: Mapping[str, int] | None = None,
    long_input: Literal["lead", "refuse"] = "lead",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the files; returns the summary. `limits` keeps only so many training examples of a kind.

    Raises DataError where a source has no records, or some of an unknown schema, where a side is empty, and with
    `long_input` refuse where an input is longer than a sequence.
    """
    of, limits = application(name), limits or {}
    _check_names(of, sources, limits)
    found = [one for key, places in sources.items() for one in of.examples(key, _records(key, places))]
    answered = [one for one in found if any(one.answers)]
    empty = Counter(one.kind for one in found) - Counter(one.kind for one in answered)
    split = split_examples(answered, shares or Shares(), seed)
    _refuse_empty_sides(split)
    choices = {kind: sorted({one.answers[0] for one in split.train if one.kind == kind}) for kind in of.CHOSEN}
    _limit(split, limits, seed)
    writer = PromptWriter(tokenizer, chat_of(tokenizer), seq_length + 1, _ROOM)
    output.mkdir(parents=True, exist_ok=True)
    for earlier in output.glob("test-*.jsonl"):
        earlier.unlink()
    counts = {side: _Counts() for side in ("train", "tenth", "validation", "test")}
    extracted = getattr(of, "EXTRACTED", ())
    sides = {"train": split.train, "tenth": _tenth(split.train, seed)}
    for side, examples in {**sides, "validation": split.validation, "test": split.test}.items():
        parts = (part for one in examples for part in _messages(one, writer, counts[side], one.kind in extracted))
        _write(output / f"{'train-tenth' if side == 'tenth' else side}.jsonl", parts)
    if long_input == "refuse":
        _refuse_cut([counts[side] for side in ("train", "validation", "test")])
    kinds = {kind: {**numbers, "empty": empty[kind]} for kind, numbers in split.counts().items()}
    for kind, numbers in kinds.items():
        train, test = ([one for one in side if one.kind == kind] for side in (split.train, split.test))
        numbers |= {name: count[kind] for name, count in vars(counts["train"]).items()}
        numbers["test_beyond"] = counts["test"].beyond[kind]
        numbers |= _facts_of_answers(train, tokenizer) if train else {}
        numbers |= _write_questions(output / f"test-{kind}.jsonl", train, test, choices.get(kind, []), seed)
    summary = {"application": name, "seed": seed, "seq_length": seq_length, "kinds": kinds}
    write_text(output / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    for line in summary_lines(summary):
        report(line)
    return summary


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What became of the examples of each kind."""
    for kind, numbers in summary["kinds"].items():
        train = numbers["train"]
        notes = {
            "near copies left out": numbers["near_copies"],
            "without an answer left out": numbers["empty"],
            f"({numbers['cut'] / max(1, train):.0%}) cut to their lead": numbers["cut"],
            f"({numbers['divided'] / max(1, train):.0%}) longer than a sequence divided": numbers["divided"],
            "whose passage is beyond the lead left out": numbers["beyond"],
            "questions whose class is in no training example left out": numbers["unknown_answers"],
            "test answers stand word for word in the training data": numbers["answers_seen"],
        }
        yield (
            f"{kind}: {train} to train on, {numbers['validation']} for validation, {numbers['test']} to test with "
            f"({numbers['questions']} questions of {numbers['groups']} groups)"
            + "".join(f"; {number} {note}" for note, number in notes.items() if number)
        )


def _check_names(of: ModuleType, sources: Collection[str], limits: Collection[str]) -> None:
    if not sources or not set(sources) <= set(of.SOURCES):
        known = "; ".join(f"{key}, {what} (public: {of.PUBLIC.get(key, 'none')})" for key, what in of.SOURCES.items())
        seen = ", ".join(sorted(set(sources) - set(of.SOURCES))) or "no source"
        raise DataError("an application's data have names", seen=seen, do=f"those of {known}")
    if unknown := set(limits) - set(of.METRICS):
        do = f"limit one of {', '.join(of.METRICS)}"
        raise DataError("there is no such kind of example to limit", seen=", ".join(sorted(unknown)), do=do)


def _refuse_empty_sides(split: Split) -> None:
    empty = [side for side in ("train", "validation", "test") if not getattr(split, side)]
    if empty:
        seen = f"{', '.join(empty)}; {', '.join(f'{kind}: {numbers}' for kind, numbers in split.counts().items())}"
        raise DataError("a side would have no example", seen=seen, do="give more conversations or documents")


def _refuse_cut(counts: Iterable[_Counts]) -> None:
    if cut := sum((count.cut + count.beyond for count in counts), Counter[str]()):
        seen = ", ".join(f"{kind}: {number}" for kind, number in sorted(cut.items()))
        do = "--long-input lead, or a larger --seq-length"
        raise DataError("inputs are longer than a training sequence", seen=seen, do=do)


def _records(source: str, places: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of files, folders, globs and data sets of the Hub."""
    for file in find_sources(list(places)):
        for row in read_records(Piece(str(file), 0, extent_of(file)[0])):
            if isinstance(row, BadLine):
                raise DataError(f"a record of {source} cannot be read", seen=f"{file}:{row.line}: {row.reason}")
            yield row[1]


def _limit(split: Split, limits: Mapping[str, int], seed: int) -> None:
    """The same examples whatever their order in the files."""
    kept: list[Example] = []
    for kind in sorted({one.kind for one in split.train}):
        its = [one for one in split.train if one.kind == kind]
        if kind in limits:
            its = sorted(its, key=lambda one: place_of(f"limit {one.group}", seed))[: limits[kind]]
        kept += its
    split.train = kept


def _tenth(examples: Sequence[Example], seed: int) -> list[Example]:
    """Those of a tenth of the groups; of one group at least."""
    places = {one.group: place_of(f"tenth {one.group}", seed) for one in examples}
    limit = max(_TENTH, min(places.values()))
    return [one for one in examples if places[one.group] <= limit]


def _messages(one: Example, writer: PromptWriter, counts: _Counts, extracted: bool) -> Iterator[dict[str, Any]]:
    """As conversations, divided or the input cut where the whole would be longer than a training sequence."""
    record, chat = one.record, writer.chat
    assert chat is not None
    if "messages" in record:
        parts = list(stretches(record["messages"], lambda part: chat.num_tokens(part) <= writer.context - 1))
        counts.divided[one.kind] += len(parts) > 1
        yield from ({"messages": part} for part in parts)
        return
    question = Question((), record["instruction"], record["input"], record["output"])
    shortest = [{"role": "user", "content": question.asked("x")}, {"role": "assistant", "content": record["output"]}]
    writer.room = _ROOM + chat.num_tokens(shortest) - len(writer.write(question, "x").ids)
    try:
        given = writer.lead(question)
    except DataError:  # the answer alone is longer than a sequence: prepare-chat leaves it out and counts it
        given = question.input
    if extracted and record["output"] not in given:
        counts.beyond[one.kind] += 1
        return
    counts.cut[one.kind] += given != question.input
    said = [("user", question.asked(given)), ("assistant", record["output"])]
    yield {"messages": [{"role": role, "content": text} for role, text in said]}


def _facts_of_answers(train: Sequence[Example], tokenizer: Tokenizer) -> dict[str, Any]:
    """The most frequent answer, and how many tokens nearly all of them have at most."""
    answers = [answer for one in train for answer in one.answers]
    lengths = [len(tokenizer.encode(answer)) for answer in answers]
    frequent = Counter(answers).most_common(1)[0][0]
    return {"answer_tokens": int(np.percentile(lengths, _LONG_ANSWER)), "most_frequent_answer": frequent}


def _write_questions(
    path: Path, train: Sequence[Example], test: Sequence[Example], choices: list[str], seed: int
) -> dict[str, int]:
    """The test examples of a kind, those of a group together; what is to be known of them."""
    taught = {normalise(answer) for one in train for answer in one.answers}
    rows, unknown = [], 0
    for one in sorted(test, key=lambda one: place_of(f"order {one.group}", seed)):
        for row, answer in zip(_questions(one.record), one.answers, strict=True):
            if choices and answer not in choices:
                unknown += 1
                continue
            more = {"choices": choices} if choices else {"seen": normalise(answer) in taught}
            rows.append({**row, "group": one.group, **more})
    _write(path, rows)
    seen = sum(row.get("seen", False) for row in rows)
    groups = len({row["group"] for row in rows})
    return {"questions": len(rows), "groups": groups, "unknown_answers": unknown, "answers_seen": seen}


def _questions(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation up to each answer of the assistant; another record as it is."""
    messages = record.get("messages")
    if messages is None:
        return [record]
    ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
    return [{"messages": messages[:end]} for end in ends]


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
