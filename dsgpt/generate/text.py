"""From prompts to texts: one after another as they come, or many together.

for piece in stream(model, tokenizer, text_prompt(tokenizer, "Once"), sampling): ...
completions = complete(model, tokenizer, prompts, sampling, batch_size=16)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dsgpt.generate.decoder import Decoder, Finish, Row, refuse_prompt
from dsgpt.generate.sampling import Sampling
from dsgpt.tokenizer.tokenizer import Tokenizer

_CONTEXT_TOKENS = 8  # before a token: its text can depend on those, as a space between words does
_INCOMPLETE = "\ufffd"  # what the bytes of a character become before all of them are there


@dataclass(frozen=True)
class Prompt:
    """What to continue: its ids, and what ends the continuation beside what the user asks for: tokens, of which the first is
    the one that the model was taught, and texts."""

    ids: list[int]
    end_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


def text_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """A text as documents begin in training: after BOS, where the tokenizer has one, or after the end of another."""
    ids = tokenizer.encode(text)
    begin = tokenizer.bos_id if tokenizer.bos_id is not None or ids else tokenizer.eos_id
    return Prompt([*([] if begin is None else [begin]), *ids], tokenizer.end_ids)


class TextStream:
    """The text of a row as its tokens come: whole characters only, nothing of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...]):
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        start = max(0, len(prompt) - _CONTEXT_TOKENS)
        while start and tokenizer.decode(prompt[start:]).startswith(_INCOMPLETE):
            start -= 1  # not in the middle of a character
        self._ids = list(prompt[start:])
        self._from, self._to = 0, len(self._ids)  # the tokens whose text has been given last
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def add(self, tokens: Iterable[int]) -> str:
        """The text that is certain with these tokens; "" after a stop string."""
        self._ids += tokens
        before = self._tokenizer.decode(self._ids[self._from : self._to], skip_special_tokens=True)
        text = self._tokenizer.decode(self._ids[self._from :], skip_special_tokens=True)
        if self.stopped or text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._from, self._to = self._to, len(self._ids)
        return self._release(text[len(before) :])

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._from : self._to], skip_special_tokens=True)
        text = self._tokenizer.decode(self._ids[self._from :], skip_special_tokens=True)
        return self._release(text[len(before) :]) + ("" if self.stopped else self._held)

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters may be the first ones of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Continuation:
    """A prompt in a decoder, and its text."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, prompt: Prompt, sampling: Sampling):
        # A special token has no text that a stop string could be found in.
        special = [tokenizer.special_id(text) for text in sampling.stop]
        ends = {*prompt.end_ids, *(token for token in special if token is not None)}
        self.row: Row = decoder.add(prompt.ids, sampling, ends)
        self.text = ""
        self._stream = TextStream(tokenizer, prompt.ids, (*sampling.stop, *prompt.stop))
        self._read = 0

    def news(self) -> str:
        """The text that has come since the last call; ends the row where that has a stop string."""
        text = self._stream.add(self.row.new[self._read :])
        self._read = len(self.row.new)
        if self.row.finish is not None:
            text += self._stream.rest()
        if self._stream.stopped:
            self.row.finish = "stop"
        self.text += text
        return text


@dataclass(frozen=True)
class Completion:
    """`tokens` are those that were generated, without the one that ended it."""

    text: str
    tokens: int
    finish: Finish


def stream(model: Any, tokenizer: Tokenizer, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
    """Pieces of text as they come. Raises DataError for a prompt that is empty or too long."""
    decoder = Decoder(model)
    one = Continuation(decoder, tokenizer, prompt, sampling)
    while True:
        if piece := one.news():
            yield piece
        if one.row.error is not None:
            raise one.row.error
        if one.row.finish is not None:
            return
        decoder.step()


def complete(
    model: Any, tokenizer: Tokenizer, prompts: Iterable[Prompt], sampling: Sampling, batch_size: int = 16
) -> list[Completion]:
    """The continuations in the order of their prompts, at most `batch_size` at a time, a new one as soon as one ends.

    Each row has its own random numbers, so it is the same in any batch. Raises DataError as `stream`, before anything is
    generated, and NumericalError where logits are no numbers.
    """
    decoder, waiting = Decoder(model), deque(enumerate(prompts))
    for number, prompt in waiting:
        name = f"prompt {number + 1} of {len(waiting)}" if len(waiting) > 1 else "the prompt"
        refuse_prompt(len(prompt.ids), decoder.context, name)
    done: dict[int, Completion] = {}
    active: dict[int, Continuation] = {}
    while waiting or active:
        while waiting and len(active) < batch_size:
            number, prompt = waiting.popleft()
            active[number] = Continuation(decoder, tokenizer, prompt, sampling)
        for number, one in list(active.items()):
            one.news()
            if one.row.error is not None:
                raise one.row.error
            if one.row.finish is not None:
                done[number] = Completion(one.text, len(one.row.new), one.row.finish)
                del active[number]
        decoder.step()
    return [done[number] for number in range(len(done))]
