"""Records with a question and its answer, as prompts for a model; what is done with an input beyond the context.

    questions = read_questions(Path("heldout.jsonl"))        # any chat format of dsgpt.data.chat_formats
    writer = PromptWriter(tokenizer, chat, context=1024, room=80, long_input="lead")
    prompts = writer.prompts(questions[0])                       # one; several of an input that is read in pieces

The answer is what the assistant says last; what it is asked is everything before. An alpaca record has its input apart from
the instruction; else the last message is the input. Of a conversation that is too long the oldest exchanges are left out; then
the input is shortened:

    lead               its beginning, as much as fits
    chunk_and_merge    each piece that fits is asked for itself, and then the answers together, as one input
    refuse             DataError

`writer.told()` says how many inputs were longer, and what of them was used.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dsgpt.data.chat_formats import BadRecord, Conversation, detect, read_conversations
from dsgpt.data.sources import BadLine, Piece, extent_of, find_sources, read_records
from dsgpt.errors import ConfigError, DataError
from dsgpt.generate.chat import Chat
from dsgpt.generate.text import Prompt, text_prompt
from dsgpt.tokenizer.tokenizer import Tokenizer

LongInput = Literal["lead", "chunk_and_merge", "refuse"]
LONG_INPUTS = get_args(LongInput)
_DETECTED_FROM = 1000  # records, as for training data
_SEPARATOR = "\n\n"  # between an instruction and its input, as chat_formats joins them


@dataclass(frozen=True)
class Question:
    """`messages` come before the last one, whose text is `instruction` and `input`; `answer` is the reference.

    `choices` are the answers to choose from, where the record gives such; `group` is the document or conversation that it
    says to be from; `other_answers` are as right as `answer`.
    """

    messages: tuple[dict[str, Any], ...]
    instruction: str
    input: str
    answer: str
    choices: tuple[str, ...] = ()
    group: str | None = None
    other_answers: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        return (self.answer, *self.other_answers)

    def asked(self, text: str) -> str:
        """The last message, with `text` as its input."""
        return self.instruction + _SEPARATOR + text if self.instruction and text else self.instruction or text


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file or folder. Raises DataError for the first record that is none, with its place."""
    records = list(itertools.islice(_records(path), limit))
    form = detect(record for _, record in records[:_DETECTED_FROM])
    items = read_conversations((record for _, record in records), form)
    return [_question(record, item, place) for (place, record), item in zip(records, items, strict=True)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each."""
    for file in find_sources([str(path)]):
        for row in read_records(Piece(str(file), 0, extent_of(file)[0])):
            if isinstance(row, BadLine):
                raise DataError("a record cannot be read", seen=f"{file}:{row.line}: {row.reason}")
            yield f"{file}:{row[0]}", row[1]


def _question(record: dict[str, Any], item: Conversation | BadRecord, place: str) -> Question:
    if isinstance(item, BadRecord):
        raise DataError("a record is no question with an answer", seen=f"{place}: {item.reason}: {item.excerpt}")
    *before, asked, answer = item.messages if len(item.messages) > 1 else (None, None)
    if asked is None or asked["role"] == "assistant" or answer["role"] != "assistant" or not answer["content"]:
        do = "end each conversation with a question and the text that answers it"
        raise DataError("a record has no answer at its end", seen=place, do=do)
    instruction, given = "", str(asked["content"] or "")
    if "instruction" in record and record.get("input"):  # an alpaca record says which part is which
        instruction, given = str(record["instruction"]), str(record["input"])
    choices, others = (_texts(record, name, place) for name in ("choices", "other_answers"))
    if choices and answer["content"] not in choices:
        raise DataError("the answer is not among the choices", seen=f"{place}: {answer['content']!r:.80}")
    group = None if record.get("group") is None else str(record["group"])
    return Question(tuple(before), instruction, given, answer["content"], choices, group, others)


def _texts(record: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    found = record.get(name) or ()
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) and one for one in found):
        raise DataError(f"{name} are a list of texts", seen=f"{place}: {found!r:.80}")
    return tuple(found)


def groups_of(questions: Sequence[Question]) -> list[str] | None:
    """Of each question; None where one has none, so that each stands for itself."""
    names = [one.group for one in questions if one.group is not None]
    return names if questions and len(names) == len(questions) else None


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass
class PromptWriter:
    """Prompts for one model. `chat` is None where the model is to continue plain text; `room` are tokens for the answer."""

    tokenizer: Tokenizer
    chat: Chat | None
    context: int
    room: int
    long_input: LongInput = "refuse"
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.room >= self.context:
            do = f"--max-new-tokens below {self.context}"
            raise ConfigError("the answer takes all of the model's context", seen=f"{self.room} tokens", do=do)

    def write(self, question: Question, text: str) -> Prompt:
        """The prompt that asks for `text`, however long that is."""
        asked = question.asked(text)
        if self.chat is None:  # plain text has no end of a turn but a line's
            return replace(text_prompt(self.tokenizer, self._plain(question, asked)), stop=("\n",))
        return self.chat.prompt([*question.messages, {"role": "user", "content": asked}])

    def continuations(self, question: Question, answers: Sequence[str]) -> tuple[int, list[list[int]]]:
        """What follows the prompt where one of `answers` is given, as the model was taught it, end of the turn included; and
        how many of the prompt's last tokens are others then, because they are one with the answer's first."""
        asked = question.asked(question.input)
        prompt = self.write(question, question.input).ids
        whole = []
        for answer in answers:
            if self.chat is None:
                whole.append(text_prompt(self.tokenizer, f"{self._plain(question, asked)}{answer}\n").ids)
            else:
                whole.append(self.chat.answered([*question.messages, {"role": "user", "content": asked}], answer))
        shared = min(_shared(prompt, ids) for ids in whole)
        return len(prompt) - shared, [ids[shared:] for ids in whole]

    def _plain(self, question: Question, asked: str) -> str:
        return "".join(f"{message['content']}{_SEPARATOR}" for message in question.messages) + asked + _SEPARATOR

    def fits(self, prompt: Prompt) -> bool:
        return len(prompt.ids) + self.room <= self.context

    def prompts(self, question: Question, text: str | None = None) -> list[Prompt]:
        """One prompt, or with chunk_and_merge one for each piece of an input that is too long; counts what was done.

        Raises DataError where even an empty input does not fit, and for a longer input where that is refused.
        """
        given = question.input if text is None else text
        whole = self.write(question, given)
        self.counts["asked"] += text is None
        if self.fits(whole):
            return [whole]
        if self.long_input == "refuse":
            raise DataError(
                "an input does not fit into the model's context",
                seen=f"{len(whole.ids)} tokens and {self.room} for the answer, context {self.context}: {given[:60]!r}",
                do="--long-input lead or chunk_and_merge, a lower --max-new-tokens, or a model with a longer context",
            )
        if question.messages:
            question, whole = self._latest(question, given)
            self.counts["conversations shortened"] += text is None
            if self.fits(whole):
                return [whole]
        pieces = self._pieces(question, given)
        if self.long_input == "lead":
            self.counts["cut"] += 1
            self.counts["characters"] += len(given)
            self.counts["characters_used"] += len(pieces[0][1])
            return [pieces[0][0]]
        self.counts["in pieces"] += text is None
        self.counts["pieces"] += len(pieces)
        return [prompt for prompt, _ in pieces]

    def _latest(self, question: Question, text: str) -> tuple[Question, Prompt]:
        """Without as many of the oldest exchanges as it takes to fit, or all of them; the system's messages stay."""
        head = tuple(itertools.takewhile(lambda message: message["role"] == "system", question.messages))
        said = question.messages[len(head) :]
        starts = [place for place in range(1, len(said)) if said[place]["role"] == "user"]
        for start in [*starts, len(said)]:
            shorter = replace(question, messages=(*head, *said[start:]))
            if self.fits(prompt := self.write(shorter, text)):
                break
        return shorter, prompt

    def lead(self, question: Question) -> str:
        """As much of the input's beginning as fits, all of it where that does."""
        whole = self.write(question, question.input)
        return question.input if self.fits(whole) else self._pieces(question, question.input)[0][1]

    def _pieces(self, question: Question, text: str) -> list[tuple[Prompt, str]]:
        """(prompt, its part of the input), one after another."""
        room = self.context - self.room - len(self.write(question, "x").ids)
        ids, found, start = self.tokenizer.encode(text), list[tuple[Prompt, str]](), 0
        while start < len(ids):
            size = room
            while size > 0:
                part = self.tokenizer.decode(ids[start : start + size])
                if self.fits(prompt := self.write(question, part)):
                    break
                size -= max(1, size // 50)  # what is cut elsewhere can be a few tokens longer
            if size <= 0:
                raise DataError(
                    "the question alone does not fit into the model's context",
                    seen=f"{question.instruction[:60]!r}, context {self.context}, {self.room} for the answer",
                    do="shorten the instruction, or lower --max-new-tokens",
                )
            found.append((prompt, part))
            start += size
        return found

    def told(self) -> str:
        """What became of the inputs, as one line."""
        asked, cut, pieces = (self.counts[name] for name in ("asked", "cut", "in pieces"))
        if shortened := self.counts["conversations shortened"]:
            told = f"{shortened} of {asked} conversations ({shortened / asked:.0%}) lost their oldest exchanges"
            return told + (f"; {cut + pieces} inputs too" if cut or pieces else "")
        if cut:
            used = self.counts["characters_used"] / self.counts["characters"]
            return f"{cut} of {asked} inputs ({cut / asked:.0%}) are longer than the context: their lead is used, {used:.0%}"
        if pieces:
            number = self.counts["pieces"]
            told = f"{pieces} of {asked} inputs ({pieces / asked:.0%}) are longer: read in {number} pieces, then merged"
            part = self.counts["merged in part"]
            return told + (f", of {part} the first answers alone" if part else "")
        return f"all {asked} inputs fit into the context"
