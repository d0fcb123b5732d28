"""Chat and instruction records as people have them, turned into one form: messages, and tools where there are any.

    found = detect(records)                                     # or Format("pairs", fields=("document", "summary"))
    print(found.verdict)
    for item in read_conversations(records, found): ...         # Conversation | BadRecord, one for every record

    messages     {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}        OpenAI, Hugging Face
    sharegpt     {"conversations": [{"from": "human", "value": "..."}, ...], "tools": "[...]"}  ShareGPT
    alpaca       {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["...", "..."]]}
    completion   {"prompt": ..., "completion": ...}: two texts, or two lists of messages
    pairs        {"document": "...", "summary": "..."}, {"article": ..., "highlights": ...}, or two fields named by the user

A message comes out as Hugging Face's chat templates expect it, plus "train": whether it is learned from. That is said
by "train": true|false or "weight": 1|0 in the record, and else by its role: assistants are.

Trade-off: strict. Every record that is not what its format says is a BadRecord with a reason, because half a dialogue
teaches something wrong; the words of a record are never changed, nor instructions invented for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsgpt.errors import ConfigError, DataError

NAMES = ("messages", "sharegpt", "alpaca", "completion", "pairs")
PAIRS = (("document", "summary"), ("article", "highlights"), ("article", "summary"), ("text", "summary"))
DECISIVE_SHARE = 0.9  # of the sample; below it the records are a mixture that a person has to look at
_COMPLETIONS = (("prompt", "completion"), ("prompt", "response"))
_ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {
    **{role: role for role in _ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
    "developer": "system",
}
_CALLS = ("function_call", "tool_call")
_EXCERPT = 200


@dataclass(frozen=True)
class Format:
    """How records are read. `fields` are the names of (text, answer) for completion and pairs; None tries the usual.

    `instruction` goes before the text of a pair, with an empty line between; without it the text stands alone.
    """

    name: str
    fields: tuple[str, str] | None = None
    instruction: str = ""
    verdict: str = ""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError("there is no such chat format", seen=repr(self.name), do=f"one of {', '.join(NAMES)}")
        if self.fields and self.name not in ("completion", "pairs"):
            raise ConfigError("fields are those of pairs and completions", seen=self.name, do="leave them out")
        if self.instruction and self.name != "pairs":
            do = "leave it out, or write it into the records"
            raise ConfigError("an instruction is put before the text of pairs alone", seen=self.name, do=do)


@dataclass(frozen=True)
class Conversation:
    """Record number `index`: its messages, and the tools the assistant could call."""

    index: int
    messages: list[dict[str, Any]]
    tools: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, and why."""

    index: int
    reason: str
    excerpt: str


class _Bad(Exception):
    """The reason, on its way to a BadRecord."""


def detect(records: Iterable[Any]) -> Format:
    """The format that at least nine in ten of the records have, judged by their keys.

    Give it a sample: all records are read. Raises DataError where none is that frequent.
    """
    found = [_format_of(record) for record in records]
    if not found:
        raise DataError("there are no records to detect a chat format in", do="give files that hold records")
    counts = Counter(found)
    counted = ", ".join(
        f"{count} {_described(key) if key else 'of no known format'}" for key, count in counts.most_common()
    )
    key, count = counts.most_common(1)[0]
    if key is None or count < DECISIVE_SHARE * len(found):
        raise DataError(
            "the chat format cannot be told from the records" if key is None else "the records have several formats",
            seen=f"of {len(found)} records: {counted}",
            do=f"name the format ({', '.join(NAMES)}), and for pairs the two fields, or prepare each kind for itself",
        )
    others = "" if count == len(found) else f"; all: {counted}"
    return Format(key[0], key[1], verdict=f"{count} of {len(found)} records are {_described(key)}{others}")


def _described(key: tuple[str, tuple[str, str] | None]) -> str:
    return key[0] + (f" ({key[1][0]} -> {key[1][1]})" if key[1] else "")


def _format_of(record: Any) -> tuple[str, tuple[str, str] | None] | None:
    if not isinstance(record, Mapping):
        return None
    if isinstance(record.get("messages"), list):
        return "messages", None
    if isinstance(record.get("conversations"), list):
        return "sharegpt", None
    if "instruction" in record and "output" in record:
        return "alpaca", None
    for name, known in (("completion", _COMPLETIONS), ("pairs", PAIRS)):
        for fields in known:
            if all(one in record for one in fields):
                return name, fields
    return None


def read_conversations(records: Iterable[Any], form: Format) -> Iterator[Conversation | BadRecord]:
    """One item for each record, in order."""
    for index, record in enumerate(records):
        try:
            if not isinstance(record, Mapping):
                raise _Bad(f"the record is not an object but {_type(record)}")
            messages, tools = _READERS[form.name](record, form)
            _check(messages, record)
            yield Conversation(index, messages, tools)
        except _Bad as bad:
            excerpt = json.dumps(record, ensure_ascii=False, default=str)[:_EXCERPT]
            yield BadRecord(index, str(bad), excerpt)


def read_question(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages and tools of {"messages": [...], "tools": [...]} that waits for an assistant's answer.

    Raises DataError where it does not, or is not of that form.
    """
    try:
        messages = [_message(one, i) for i, one in enumerate(_list(record, "messages"))]
        tools = _tools(record)
        if not messages:
            raise _Bad("there is no message")
        _check_order(messages, may_be_empty=("assistant",))  # a model may have said nothing before
        if messages[-1]["role"] not in ("user", "tool"):
            raise _Bad(f"the last message is not of a user but of role {messages[-1]['role']}")
    except _Bad as bad:
        raise DataError(
            "the conversation cannot be answered", seen=str(bad), do="end with a message of role user"
        ) from bad
    return messages, tools


def _from_messages(record: Mapping[str, Any], form: Format) -> tuple[list[dict[str, Any]], list[Any]]:
    return [_message(one, i) for i, one in enumerate(_list(record, "messages"))], _tools(record)


def _from_sharegpt(record: Mapping[str, Any], form: Format) -> tuple[list[dict[str, Any]], list[Any]]:
    messages = _system(record)
    for i, turn in enumerate(_list(record, "conversations")):
        if not isinstance(turn, Mapping):
            raise _Bad(f"message {i} is not an object but {_type(turn)}")
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        rest = {key: value for key, value in turn.items() if key not in ("from", "role", "value", "content")}
        if role in _CALLS:
            calls = _parsed(content, f"message {i} is a {role} whose value is not JSON")
            calls = calls if isinstance(calls, list) else [calls]
            rest, role, content = {**rest, "tool_calls": [{"function": call} for call in calls]}, "assistant", None
        messages.append(_message({**rest, "role": role, "content": content}, i))
    return messages, _tools(record)


def _from_alpaca(record: Mapping[str, Any], form: Format) -> tuple[list[dict[str, Any]], list[Any]]:
    messages = _system(record)
    for pair in record.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Bad("'history' is not a list of pairs of question and answer")
        messages += _exchange(*pair)
    question = _text(record, "instruction")
    if record.get("input"):
        question += "\n\n" + _text(record, "input")
    return messages + _exchange(question, _text(record, "output")), []


def _from_completion(record: Mapping[str, Any], form: Format) -> tuple[list[dict[str, Any]], list[Any]]:
    prompt, completion = form.fields or next((f for f in _COMPLETIONS if f[1] in record), _COMPLETIONS[0])
    if isinstance(record.get(prompt), list) and isinstance(record.get(completion), list):
        # The prompt's own assistant turns are context: what is learned is the completion.
        before = [{**_message(one, i), "train": False} for i, one in enumerate(record[prompt])]
        return before + [_message(one, len(before) + i) for i, one in enumerate(record[completion])], _tools(record)
    return _system(record) + _exchange(_text(record, prompt), _text(record, completion)), _tools(record)


def _from_pairs(record: Mapping[str, Any], form: Format) -> tuple[list[dict[str, Any]], list[Any]]:
    text, answer = form.fields or next((f for f in PAIRS if all(one in record for one in f)), PAIRS[0])
    question = _text(record, text)
    return _exchange(f"{form.instruction}\n\n{question}" if form.instruction else question, _text(record, answer)), []


_READERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "completion": _from_completion,
    "pairs": _from_pairs,
}


def _message(raw: Any, i: int) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise _Bad(f"message {i} is not an object but {_type(raw)}")
    role = _ALIASES.get(raw["role"]) if isinstance(raw.get("role"), str) else None
    if role is None:
        raise _Bad(f"message {i} has the unknown role {raw.get('role')!r}")
    # Tables have a null for every field that any message has; to a template, a field that is there says something.
    rest = {
        key: one for key, one in raw.items() if one is not None and key not in ("role", "content", "weight", "train")
    }
    content = _content(raw.get("content"), i)
    message = {"role": role, "content": content, **rest, "train": _trained(raw, role, i)}
    if raw.get("tool_calls"):
        message["tool_calls"] = [_call(one, i) for one in _list(raw, "tool_calls")]
    elif raw.get("function_call"):
        message["tool_calls"] = [_call({"function": message.pop("function_call")}, i)]
    if content is None and "tool_calls" not in message:
        message["content"] = ""
    return message


def _content(content: Any, i: int) -> str | None:
    """A text, or OpenAI's list of parts where all of them are text. None stays: some templates tell calls by it."""
    if content is None:
        return None
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else _type(part)
                raise _Bad(f"message {i} has a content part that is not text: {kind}")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _Bad(f"the content of message {i} is not a text but {_type(content)}")
    return content


def _trained(raw: Mapping[str, Any], role: str, i: int) -> bool:
    said = {name: raw[name] for name in ("train", "weight") if raw.get(name) is not None}
    for name, value in said.items():
        if value not in (0, 1):
            raise _Bad(f"message {i} has {name} {value!r}, which is neither 0 nor 1")
    if len(set(map(bool, said.values()))) == 2:
        raise _Bad(f"message {i} has a train and a weight that contradict each other")
    return bool(next(iter(said.values()), role == "assistant"))


def _call(raw: Any, i: int) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}} with the arguments as an object: templates print them."""
    function = raw.get("function") if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _Bad(f"message {i} has a tool call without a function name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"message {i} calls {function['name']} with arguments that are not JSON")
    if not isinstance(arguments, Mapping):
        raise _Bad(f"message {i} calls {function['name']} with arguments that are not an object but {_type(arguments)}")
    return {**raw, "type": "function", "function": {**function, "arguments": arguments}}


def _tools(record: Mapping[str, Any]) -> list[Any]:
    tools = record.get("tools") or record.get("functions") or []
    if isinstance(tools, str):
        tools = _parsed(tools, "'tools' is not JSON") if tools.strip() else []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _Bad("'tools' is not a list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _check(messages: list[dict[str, Any]], record: Mapping[str, Any]) -> None:
    """What makes a dialogue unusable whatever its format."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        preference = " (it has 'chosen': a preference pair is not a dialogue)" if "chosen" in record else ""
        raise _Bad(f"there is no assistant turn{preference}")
    if "user" not in roles:
        raise _Bad("there is no user turn")
    _check_order(messages)


def _check_order(messages: list[dict[str, Any]], may_be_empty: tuple[str, ...] = ()) -> None:
    roles = [message["role"] for message in messages]
    if roles.count("system") > 1:
        raise _Bad(f"there are {roles.count('system')} system messages")
    if "system" in roles[1:]:
        raise _Bad(f"the system message is message {roles.index('system')}, not the first")
    for i, message in enumerate(messages):
        is_empty = not (message["content"] or "").strip() and not message.get("tool_calls")
        if is_empty and message["role"] in {"user", "assistant"}.difference(may_be_empty):
            raise _Bad(f"message {i} ({message['role']}) is empty")


def _exchange(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [_message({"role": "user", "content": question}, 0), _message({"role": "assistant", "content": answer}, 1)]


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_message({"role": "system", "content": record["system"]}, 0)] if record.get("system") else []


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise _Bad(f"there is no {name!r}" if value is None else f"{name!r} is not a text but {_type(value)}")
    return value


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise _Bad(f"there is no {name!r}" if value is None else f"{name!r} is not a list but {_type(value)}")
    return value


def _parsed(text: Any, reason: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise _Bad(f"{reason}: {error}") from None


def _type(value: Any) -> str:
    return type(value).__name__
