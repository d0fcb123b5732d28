"""Turns conversations into token ids and what of them is learned from, by a chat template as Hugging Face has them.

    template = ChatTemplate(tokenizer)              # its own template, or the shipped default
    encoded = template.encode(messages, tools)      # .ids, .learned, .special_in_text

A template is a Jinja program; it runs in Jinja's sandbox, on plain data. What is learned from is what the template says
with {% generation %}; of other templates a message is found by rendering the conversation up to it and with it, and a
conversation for which these are not the beginning of the whole is refused: its mask would be a guess. The default is
ChatML, with the tokenizer's end-of-text token after each assistant turn, so that a model whose tokenizer has no
<|im_end|> learns to stop too.

Only the template writes special tokens: where the text of a message looks like one, it is encoded as text, and counted.
Trade-offs: encoded by the reference library, whose offsets say which token stands where; chats are small beside corpora.
A template sees no date (`strftime_now` is undefined): the same records give the same ids tomorrow.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import jinja2
import jinja2.nodes
import numpy as np
import tokenizers
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

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
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
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
CHATML = ("<|im_start|>", "<|im_end|>")
# Two planes of characters that belong to nobody: one stands for what looks like a special token in the text of messages,
# the other for those of the template. And two that are no characters: where a generation begins and ends.
_FIRST_MARK, _FIRST_CONTROL = 0xF0000, 0x100000
_PLANES = re.compile("[\U000f0000-\U0010ffff]")
_BEGIN, _END = "\ufdd0", "\ufdd1"
_EDGES = re.compile(f"([{_BEGIN}{_END}])")


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
        added = tokenizer.backend.get_added_tokens_decoder()
        # In this order the longer of two that begin alike is found.
        self._special = sorted((token.content for token in added.values() if token.special), reverse=True)
        self._find_special = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        self._variables = dict.fromkeys(names, "") | tokenizer.special_tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        # As Hugging Face renders: no escapes of HTML or of other scripts.
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "namespace": _Namespace}
        try:
            self._template = environment.from_string(self.text)
        except jinja2.TemplateError as error:
            do = "correct it, or give another one with --chat-template"
            raise DataError("the chat template is not one", seen=f"{self.source}: {error}", do=do) from error

    @property
    def pieces(self) -> list[str]:
        """What the default template writes between turns and this tokenizer does not have as tokens."""
        return [] if self.text != DEFAULT else [one for one in CHATML if one not in self._special]

    def render(self, messages: list[dict[str, Any]], tools: list[Any], add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises Unusable where the template refuses it."""
        return _EDGES.sub("", self._render(messages, tools, add_generation_prompt))

    def _render(self, messages: list[dict[str, Any]], tools: list[Any], add_generation_prompt: bool = False) -> str:
        shown = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        variables = {**self._variables, "tools": tools or None, "documents": None}
        try:
            return self._template.render(messages=shown, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as error:  # a program that somebody else wrote can raise anything
            raise Unusable(f"the chat template refuses it: {error}") from error

    def encode(self, messages: list[dict[str, Any]], tools: list[Any], loss_on: LossOn = "assistant") -> Encoded:
        """Ids of the rendered conversation; learned are messages with "train", or everything. Raises Unusable."""
        whole = [messages, tools]
        has_special = any(map(self._find_special.search, _texts(whole)))
        messages, tools = _plain(whole, self._mark if has_special else str)
        marked = self._render(messages, tools)
        text = _EDGES.sub("", marked)
        spans = (
            [(0, len(text))] if loss_on == "all" else self._learned_spans(messages, tools, text, _generations(marked))
        )
        ids, offsets = self._marked_tokens(text) if has_special else _encode(self._backend, text)
        learned = np.zeros(len(ids), np.bool_)
        for start, end in spans:
            # A token that only begins before the span is learned too: it is what the model has to say there.
            learned |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return Encoded(ids, learned, len(_PLANES.findall(text)) if has_special else 0)

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any]) -> list[int]:
        """Ids of the conversation up to where an assistant goes on, the same as in training. Raises Unusable."""
        messages, tools = _plain([messages, tools], self._mark)
        return [int(i) for i in self._marked_tokens(self.render(messages, tools, add_generation_prompt=True))[0]]

    def turn_end(self) -> tuple[list[int], tuple[str, ...]]:
        """What ends an assistant's turn: ids of special tokens, and text that stands where this tokenizer has none."""
        said = "said"
        turns = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": said}]
        after = self.render(turns, []).rpartition(said)[2]
        match = self._find_special.search(after)
        text = (after[: match.start()] if match else after).strip()
        token = self._backend.token_to_id(match[0]) if match else None
        return [] if token is None else [token], (text,) if text else ()

    def _learned_spans(
        self, messages: list[dict[str, Any]], tools: list[Any], text: str, generations: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Where in the text the messages stand that are learned from."""
        trained = [i for i, message in enumerate(messages) if message["train"]]
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans: list[tuple[int, int]] = []
        if generations:
            if len(generations) == len(said):
                spans = [span for i, span in zip(said, generations, strict=True) if i in trained]
            elif set(said) <= set(trained):
                spans = generations
            else:
                seen = f"{len(generations)} generations in {len(said)} messages"
                raise Unusable(f"the chat template marks {seen}, so those without loss are not known")
            trained = [i for i in trained if i not in said]

        @cache
        def render(count: int, prompt: bool = False) -> str:
            return self.render(messages[:count], tools, prompt)

        return spans + [self._span(render, messages[i]["role"], text, i) for i in trained]

    def _span(self, render: Callable[..., str], role: str, text: str, i: int) -> tuple[int, int]:
        """Where message i stands, from the prompt for it to the end of its turn."""
        begin = 0
        if i or role == "assistant":
            begin = self._nested(render(i), text, i)
        if role == "assistant":
            begin = max(begin, _shared(render(i, True), text))
        end = self._nested(render(i + 1), text, i)
        if end <= begin:
            raise Unusable(_not_nested(i))
        # The line end that follows the token which ends a turn: nobody has to say that.
        turn = text[begin:end].rstrip()
        return begin, begin + len(turn) if turn.endswith(tuple(self._special)) else end

    def _nested(self, beginning: str, text: str, i: int) -> int:
        """How much of a beginning is in the whole: all but what a template adds at the very end, which says nothing."""
        end = _shared(beginning, text)
        if self._find_special.sub("", beginning[end:]).strip():
            raise Unusable(_not_nested(i))
        return end

    def _mark(self, text: str) -> str:
        """The text with a mark for whatever looks like a special token in it."""
        if _PLANES.search(text):
            raise Unusable(
                "it has special tokens in its text, and characters (U+F0000 and up) that are needed as marks"
            )
        return self._find_special.sub(lambda match: chr(_FIRST_MARK + self._special.index(match[0])), text)

    @cached_property
    def _plain_backend(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The tokenizer for which special tokens are text, and characters of a plane stand for them; and their ids."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        tokens = {token.content: token for token in self._backend.get_added_tokens_decoder().values()}
        ids = {}
        for number, content in enumerate(self._special):
            flags = {name: getattr(tokens[content], name) for name in ("lstrip", "rstrip", "single_word")}
            mark = chr(_FIRST_CONTROL + number)
            backend.add_tokens([tokenizers.AddedToken(mark, normalized=False, special=False, **flags)])
            ids[int(backend.token_to_id(mark) or 0)] = int(self._backend.token_to_id(content) or 0)
        return backend, ids

    def _marked_tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) and their places (T, 2) in a text with marks."""
        pieces: list[str] = []
        begins: list[int] = []  # of each character that is encoded: where what it stands for begins in `text`, and ends
        ends: list[int] = []
        position = 0
        for match in [*re.finditer(f"{_PLANES.pattern}|{self._find_special.pattern}", text), None]:
            begin, end = match.span() if match else (len(text), len(text))
            pieces.append(text[position:begin])
            begins += range(position, begin)
            ends += range(position + 1, begin + 1)
            if match:
                is_mark = _PLANES.match(match[0])
                number = ord(match[0]) - _FIRST_MARK if is_mark else self._special.index(match[0])
                pieces.append(self._special[number] if is_mark else chr(_FIRST_CONTROL + number))
                begins += [begin] * len(pieces[-1])
                ends += [end] * len(pieces[-1])
            position = end
        backend, real = self._plain_backend
        ids, offsets = _encode(backend, "".join(pieces))
        firsts, lasts = np.array([*begins, len(text)]), np.array([0, *ends])
        starts = firsts[offsets[:, 0]]
        stops = np.where(offsets[:, 1] > offsets[:, 0], lasts[offsets[:, 1]], starts)
        return np.array([real.get(i, i) for i in ids.tolist()], np.uint32), np.stack((starts, stops), axis=1)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what assistants say, between two marks."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja reads it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(edge)], lineno=line) for edge in (_BEGIN, _END))
        return jinja2.nodes.Scope([begin, *body, end], lineno=line)


class _Namespace(Namespace):
    """Jinja's, without a way to attributes of the interpreter."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"the name {name!r} begins with an underscore")
        super().__setitem__(name, value)


def _generations(marked: str) -> list[tuple[int, int]]:
    """Where the generations stand in the text without their marks."""
    spans: list[tuple[int, int]] = []
    position, begin = 0, 0
    for piece in _EDGES.split(marked):
        if piece == _BEGIN:
            begin = position
        elif piece == _END:
            spans.append((begin, position))
        else:
            position += len(piece)
    return spans


def _encode(backend: tokenizers.Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids (T,) and their places (T, 2) in the text."""
    encoding = backend.encode(text, add_special_tokens=False)
    return np.array(encoding.ids, np.uint32), np.array(encoding.offsets, np.int64).reshape(-1, 2)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _plain(value: Any, text: Callable[[str], str]) -> Any:
    """The same in types of JSON alone, each text as `text` gives it back."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        if _EDGES.search(value):
            raise Unusable("it has U+FDD0 or U+FDD1 in its text, which are no characters")
        return text(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one, text) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, text) for one in value]
    return str(value)  # dates and the like, from tables


def _shared(first: str, second: str) -> int:
    """How many characters both begin with."""
    if second.startswith(first):
        return len(first)
    return len(os.path.commonprefix((first, second)))  # noqa: RUF071 (characters are meant, not paths)


def _not_nested(i: int) -> str:
    return (
        f"the chat template renders the conversation up to message {i} otherwise than in the whole, so what is learned "
        "from is not known; it would be with {% generation %} in the template"
    )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
