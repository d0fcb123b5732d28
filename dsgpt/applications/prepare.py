"""The files of an application: conversations to train on, and questions to measure with.

    output/
      train.jsonl  train-tenth.jsonl  validation.jsonl  test.jsonl     messages, as dsgpt data prepare-chat reads them
      test-KIND.jsonl     the same test examples as questions with answers, as dsgpt evaluate reads them
      summary.json                                          counts by kind and side, near copies, inputs that were cut

A tenth is a tenth of the groups. Of a conversation each answer of the assistant is a question of its own. What is longer than
a training sequence: conversations are divided between exchanges, inputs of single questions cut to their lead, both counted.
In the questions all is whole, so that evaluation can choose (--long-input).
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dsgpt.applications.records import Example, Shares, Split, place_of, split_examples, stretches
from dsgpt.data.sources import BadLine, Piece, extent_of, find_sources, read_records
from dsgpt.errors import DataError
from dsgpt.evaluate.questions import PromptWriter, Question
from dsgpt.generate.chat import Chat
from dsgpt.tokenizer.tokenizer import Tokenizer

SUMMARY = "summary.json"
_TENTH = 0.1
_ROOM = 2  # tokens that a cut elsewhere can make more


def application(name: str) -> ModuleType:
    """The module that knows an application's data."""
    return importlib.import_module(f"dsgpt.applications.{name}")


def prepare(
    name: str,
    sources: Mapping[str, Sequence[str]],
    output: Path,
    tokenizer: Tokenizer,
    seq_length: int,
    seed: int = 1234,
    shares: Shares | None = None,
    limits: Mapping[str, int] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the files; returns the summary. `limits` keeps only so many training examples of a kind.

    Raises DataError where a source has no records, or some of an unknown schema.
    """
    of = application(name)
    unknown = sorted(sources.keys() - of.SOURCES.keys())
    if unknown or not sources:
        known = ", ".join(f"{key} ({what})" for key, what in of.SOURCES.items())
        raise DataError(
            "an application's data have names", seen=", ".join(unknown) or "no source", do=f"those of {known}"
        )
    found = [one for key, places in sources.items() for one in of.examples(key, _records(key, places))]
    split = split_examples(found, shares or Shares(), seed)
    _limit(split, limits or {}, seed)
    writer = PromptWriter(tokenizer, Chat(tokenizer, "chatml"), seq_length + 1, _ROOM)
    cut, divided = Counter[str](), Counter[str]()
    output.mkdir(parents=True, exist_ok=True)
    sides = {
        "train": split.train,
        "train-tenth": [one for one in split.train if place_of(f"tenth {one.group}", seed) < _TENTH],
        "validation": split.validation,
        "test": split.test,
    }
    for side, examples in sides.items():
        counters = (cut, divided) if side == "train" else (Counter[str](), Counter[str]())
        _write(output / f"{side}.jsonl", (part for one in examples for part in _messages(one, writer, *counters)))
    for kind in sorted({one.kind for one in split.test}):
        choices = sorted({one.record["output"] for one in split.train if one.kind == kind}) if kind in of.CHOSEN else []
        rows = [row for one in split.test if one.kind == kind for row in _questions(one.record)]
        if choices:
            rows = [{**row, "choices": choices} for row in rows if row["output"] in choices]
        _write(output / f"test-{kind}.jsonl", rows)
    summary = {"application": name, "seed": seed, "kinds": split.counts(), "inputs_cut": dict(cut)}
    summary["divided"] = dict(divided)
    _write_text(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    for line in summary_lines(summary):
        report(line)
    return summary


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    for kind, counts in summary["kinds"].items():
        cut, divided = summary["inputs_cut"].get(kind, 0), summary["divided"].get(kind, 0)
        yield (
            f"{kind}: {counts['train']} to train on, {counts['validation']} for validation, {counts['test']} to test with; "
            f"{counts['near_copies']} near copies left out"
            + (f"; {cut} inputs ({cut / counts['train']:.0%}) cut to their lead" if cut else "")
            + (f"; {divided} ({divided / counts['train']:.0%}) divided, longer than a sequence" if divided else "")
        )


def _records(source: str, places: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of files, folders, globs and data sets of the Hub; a .json file may also be one object."""
    for file in find_sources(list(places)):
        if str(file).endswith(".json"):
            yield from _json_records(Path(file))
            continue
        for row in read_records(Piece(str(file), 0, extent_of(file)[0])):
            if isinstance(row, BadLine):
                raise DataError(f"a record of {source} cannot be read", seen=f"{file}:{row.line}: {row.reason}")
            yield row[1]


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError("a file is not JSON", seen=f"{path}: {error}") from error
    for one in found if isinstance(found, list) else [found]:
        if not isinstance(one, dict):
            raise DataError("a record is not an object", seen=f"{path}: {one!r:.80}")
        yield one


def _limit(split: Split, limits: Mapping[str, int], seed: int) -> None:
    """The same examples whatever their order in the files."""
    kept: list[Example] = []
    for kind in sorted({one.kind for one in split.train}):
        its = [one for one in split.train if one.kind == kind]
        if kind in limits:
            its = sorted(its, key=lambda one: place_of(f"limit {one.group}", seed))[: limits[kind]]
        kept += its
    split.train = kept


def _messages(one: Example, writer: PromptWriter, cut: Counter[str], divided: Counter[str]) -> Iterator[dict[str, Any]]:
    """As a conversation, divided or its input cut where the whole would be longer than a training sequence."""
    record, chat = one.record, writer.chat
    assert chat is not None
    if "messages" in record:
        parts = list(stretches(record["messages"], lambda part: chat.num_tokens(part) <= writer.context - 1))
        divided[one.kind] += len(parts) > 1
        yield from ({"messages": part} for part in parts)
        return
    question = Question((), record["instruction"], record["input"], record["output"])
    shortest = [{"role": "user", "content": question.asked("x")}, {"role": "assistant", "content": record["output"]}]
    writer.room = _ROOM + chat.num_tokens(shortest) - len(writer.write(question, "x").ids)
    try:
        given = writer.lead(question)
    except DataError:  # the answer alone is longer than a sequence: prepare-chat leaves it out and counts it
        given = question.input
    cut[one.kind] += given != question.input
    said = [("user", question.asked(given)), ("assistant", record["output"])]
    yield {"messages": [{"role": role, "content": text} for role, text in said]}


def _questions(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation up to each answer of the assistant; another record as it is."""
    messages = record.get("messages")
    if messages is None:
        return [record]
    ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
    return [{"messages": messages[:end]} for end in ends]


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    _write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _write_text(path: Path, text: str) -> None:
    """Through a second name: a killed call leaves no half file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
