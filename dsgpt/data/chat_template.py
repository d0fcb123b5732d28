"""Turns conversations into token ids and what of them is learned from, by a chat template as Hugging Face has them.

    template = ChatTemplate(tokenizer)              # its own template, or the shipped default
    ids, learned, special = template.encode(messages, tools, loss_on="assistant")

A template is a Jinja program; it runs in Jinja's sandbox. What a message is in the rendered text is found by rendering the
conversation up to it and with it: a template for which the beginning of a conversation is not the beginning of the whole
cannot be used for that conversation. The default is ChatML, with the tokenizer's end-of-text token after each assistant turn,
so that a model whose tokenizer has no <|im_end|> learns to stop too.

Only the template writes special tokens: where the text of a message looks like one, it is encoded as text, and counted.
Trade-off: encoded by the reference library, whose offsets say which token stands where; chats are small beside corpora.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import numpy as np
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsgpt.errors import DataError
from dsgpt.tokenizer.tokenizer import Tokenizer

LossOn = Literal["assistant", "all"]
DEFAULT = """\
{{- bos_token }}
{%- for message in messages %}
{%- if loop.first and tools %}
{{- '<|im_start|>system\\n' }}
{%- if message.role == 'system' %}{{- message.content + '\\n\\n' }}{%- endif %}
{{- 'Tools:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- if not (loop.first and tools and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>' + (call.function | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- if message.role == 'assistant' and eos_token != '<|im_end|>' %}{{- eos_token }}{%- endif %}
{{- '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
_FIRST_MARK = (
    0xF0000  # a plane of characters that belong to nobody: they stand for special tokens in the text of messages
)
_MARK = re.compile("[\U000f0000-\U000ffffd]")


class Unusable(Exception):
    """Why a conversation cannot be encoded."""


@dataclass(frozen=True)
class Encoded:
    """Ids (T,), which of them are learned from (T,) bool, and how often message text looks like a special token."""

    ids: np.ndarray
    learned: np.ndarray
    special_in_text: int


class ChatTemplate:
    """A tokenizer's chat template, `source` where that comes from. Raises DataError where it is no template."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        own = tokenizer.chat_template
        self.text = template or own or DEFAULT
        self.source = "given" if template else "the tokenizer's" if own else "the default, ChatML"
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.encode_special_tokens = False
        self._plain = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._plain.encode_special_tokens = True
        added = tokenizer.backend.get_added_tokens_decoder()
        self._special = sorted((token.content for token in added.values() if token.special), reverse=True)
        self._find_special = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        self._variables = {name: tokenizer.special_tokens.get(name, "") for name in names}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        # As Hugging Face renders: no escapes of HTML or of other scripts.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(self.text)
        except jinja2.TemplateError as error:
            do = "correct it, or give another one with --chat-template"
            raise DataError("the chat template is not one", seen=f"{self.source}: {error}", do=do) from error

    def render(self, messages: list[dict[str, Any]], tools: list[Any], add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises Unusable where the template refuses it."""
        shown = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        variables = {**self._variables, "tools": tools or None, "documents": None}
        try:
            return self._template.render(messages=shown, add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise Unusable(f"the chat template refuses it: {error}") from error

    def encode(self, messages: list[dict[str, Any]], tools: list[Any], loss_on: LossOn = "assistant") -> Encoded:
        """Ids of the rendered conversation; learned are messages with "train", or everything. Raises Unusable."""
        used: set[int] = set()
        messages, tools = (self._without_special(value, used) for value in (messages, tools))
        text = self.render(messages, tools)
        spans = [(0, len(text))] if loss_on == "all" else list(self._learned_spans(messages, tools, text))
        found = len(_MARK.findall(text)) if used else 0
        ids, offsets = self._tokens(text, bool(used))
        starts, ends = np.array([start for start, _ in spans]), np.array([end for _, end in spans])
        learned = np.zeros(len(ids), np.bool_)
        for start, end in zip(starts, ends, strict=True):
            # A token that only begins before the span is learned too: it is what the model has to say there.
            learned |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return Encoded(ids, learned, found)

    def _learned_spans(self, messages: list[dict[str, Any]], tools: list[Any], text: str) -> Iterator[tuple[int, int]]:
        for i, message in enumerate(messages):
            if not message["train"]:
                continue
            begin = 0
            if message["role"] == "assistant":
                before = self.render(messages[:i], tools, add_generation_prompt=True) if i else ""
                begin = _shared(before, text)
                if begin < len(before) and begin < len(self.render(messages[:i], tools)):
                    raise Unusable(_not_nested(i))
            elif i:
                before = self.render(messages[:i], tools)
                begin = _shared(before, text)
                if begin < len(before):
                    raise Unusable(_not_nested(i))
            # What a template adds at the very end of a conversation is not there in the middle of one.
            end = _shared(self.render(messages[: i + 1], tools), text)
            if end <= begin:
                raise Unusable(_not_nested(i))
            yield begin, self._end_of_turn(text, begin, end)

    def _end_of_turn(self, text: str, begin: int, end: int) -> int:
        """Without the line end that follows the token which ends a turn: nobody has to say that."""
        turn = text[begin:end].rstrip()
        return begin + len(turn) if turn.endswith(tuple(self._special)) else end

    def _without_special(self, value: Any, used: set[int]) -> Any:
        """The same with a mark for whatever looks like a special token in any text."""
        if isinstance(value, str):
            if _MARK.search(value):
                raise Unusable("it has characters of a private plane (U+F0000 and up), which are needed as marks here")

            def mark(match: re.Match[str]) -> str:
                number = self._special.index(match[0])
                used.add(number)
                return chr(_FIRST_MARK + number)

            return self._find_special.sub(mark, value)
        if isinstance(value, Mapping):
            return {key: self._without_special(one, used) for key, one in value.items()}
        if isinstance(value, list):
            return [self._without_special(one, used) for one in value]
        return value

    def _tokens(self, text: str, has_marks: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) and their places (T, 2) in the text."""
        if not has_marks:
            encoding = self._backend.encode(text, add_special_tokens=False)
            return np.array(encoding.ids, np.uint32), np.array(encoding.offsets, np.int64).reshape(-1, 2)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for match in [*self._find_special.finditer(text), None]:
            end = match.start() if match else len(text)
            plain, places = self._without_marks(text[position:end])
            encoding = self._plain.encode(plain, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(position + places[start], position + places[stop]) for start, stop in encoding.offsets]
            if match:
                ids.append(self._backend.token_to_id(match[0]))
                offsets.append(match.span())
                position = match.end()
        return np.array(ids, np.uint32), np.array(offsets, np.int64).reshape(-1, 2)

    def _without_marks(self, text: str) -> tuple[str, list[int]]:
        """The text that marks stand for, and for each place in it (and its end) the place in `text`."""
        plain: list[str] = []
        places: list[int] = []
        for i, character in enumerate(text):
            whole = self._special[ord(character) - _FIRST_MARK] if _MARK.match(character) else character
            plain.append(whole)
            places += [i] * len(whole)
        return "".join(plain), [*places, len(text)]


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks what assistants say in some templates: its content, no more."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja reads it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _shared(first: str, second: str) -> int:
    """How many characters both begin with."""
    if second.startswith(first):
        return len(first)
    return len(os.path.commonprefix((first, second)))  # noqa: RUF071 (characters are meant, not paths)


def _not_nested(i: int) -> str:
    return f"the chat template renders the conversation up to message {i} otherwise than in the whole"


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
