"""Records of every chat format become the same messages; what is not of its format is refused with a reason."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsgpt.data.chat_formats import BadRecord, Conversation, Format, detect, read_conversations
from dsgpt.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
CALL = {"name": "weather", "arguments": {"city": "Bonn"}}


def one(record: Any, name: str, **choices: Any) -> Conversation | BadRecord:
    (found,) = read_conversations([record], Format(name, **choices))
    return found


def turns(record: Any, name: str, **choices: Any) -> list[tuple[str, Any, bool]]:
    found = one(record, name, **choices)
    assert isinstance(found, Conversation), found
    return [(message["role"], message["content"], message["train"]) for message in found.messages]


def reason(record: Any, name: str) -> str:
    found = one(record, name)
    assert isinstance(found, BadRecord), found
    return found.reason


HELLO = [("system", "be kind", False), ("user", "hello", False), ("assistant", "hi", True)]


@pytest.mark.parametrize(
    ("name", "record"),
    [
        (
            "messages",
            {
                "messages": [
                    {"role": "developer", "content": "be kind"},
                    {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
                    {"role": "assistant", "content": "hi"},
                ]
            },
        ),
        (
            "sharegpt",
            {
                "system": "be kind",
                "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}],
            },
        ),
        ("alpaca", {"system": "be kind", "instruction": "hello", "input": "", "output": "hi"}),
        ("completion", {"system": "be kind", "prompt": "hello", "completion": "hi"}),
        ("completion", {"system": "be kind", "prompt": "hello", "response": "hi"}),
    ],
)
def test_every_format_says_the_same(name: str, record: dict[str, Any]) -> None:
    assert turns(record, name) == HELLO
    assert detect([record] * 3).name == name


def test_history_input_and_instruction_go_where_they_belong() -> None:
    record = {"instruction": "add", "input": "1 2", "output": "3", "history": [["hello", "hi"]]}
    assert turns(record, "alpaca") == [*HELLO[1:], ("user", "add\n\n1 2", False), ("assistant", "3", True)]
    pair = {"article": "long", "highlights": "short"}
    assert turns(pair, "pairs") == [("user", "long", False), ("assistant", "short", True)]
    assert turns(pair, "pairs", instruction="Summarise:")[0] == ("user", "Summarise:\n\nlong", False)
    assert turns({"a": "long", "b": "short"}, "pairs", fields=("a", "b"))[1] == ("assistant", "short", True)


def test_a_completion_of_messages_is_learned_and_its_prompt_is_not() -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    record = {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    assert [train for _, _, train in turns(record, "completion")] == [False, False, False, True]


def test_records_say_of_messages_whether_they_are_learned() -> None:
    said = [
        {"role": "user", "content": "a", "train": True},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "c", "weight": 1.0, "train": None},
    ]
    assert [train for _, _, train in turns({"messages": said}, "messages")] == [True, False, True]
    for key, value in (("weight", 0.5), ("train", "yes"), ("weight", [1])):
        bad = {"messages": [said[0], {"role": "assistant", "content": "b", key: value}]}
        assert f"{key} {value!r}" in reason(bad, "messages")
    contradiction = {"messages": [said[0], {"role": "assistant", "content": "b", "train": True, "weight": 0}]}
    assert "contradict" in reason(contradiction, "messages")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "?", "name": None},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "1", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": "sun", "tool_calls": None},
                    {"role": "assistant", "content": "sunny", "function_call": None},
                ],
                "tools": [{"type": "function", "function": {"name": "weather"}}],
            },
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "?"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "sun"},
                    {"from": "gpt", "value": "sunny"},
                ],
                "tools": json.dumps([{"name": "weather"}]),
            },
        ),
    ],
)
def test_calls_come_out_as_templates_expect_them(name: str, record: dict[str, Any]) -> None:
    found = one(record, name)
    assert isinstance(found, Conversation), found
    assert found.tools == [{"type": "function", "function": {"name": "weather"}}]
    question, call, result, answer = found.messages
    assert call["content"] is None and [one["function"] for one in call["tool_calls"]] == [CALL]
    assert (result["role"], result["content"], result["train"]) == ("tool", "sun", False)
    assert (question["content"], answer["content"]) == ("?", "sunny")
    # A null of a table would tell a template that there is something.
    assert not {"tool_calls", "name", "function_call"} & {*question, *result, *answer}


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "no assistant turn"),
        ([USER], "no assistant turn"),
        ([ASSISTANT], "no user turn"),
        ([USER, {"role": "system", "content": "x"}, ASSISTANT], "system message is message 1"),
        ([{"role": "system", "content": "x"}] * 2 + [USER, ASSISTANT], "2 system messages"),
        ([USER, {"role": "assistant", "content": " \n"}], "message 1 (assistant) is empty"),
        ([USER, {"role": "assistant", "content": None}], "message 1 (assistant) is empty"),
        ([USER, {"role": "narrator", "content": "x"}], "unknown role 'narrator'"),
        ([USER, {"role": ["user"], "content": "x"}], "unknown role"),
        ([USER, {"content": "x"}], "unknown role None"),
        ([USER, "x"], "not an object but str"),
        ([USER, {"role": "assistant", "content": 5}], "not a text but int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT], "not text: image_url"),
        ([USER, {**ASSISTANT, "tool_calls": [{"function": {}}]}], "without a function name"),
        ([USER, {**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "are not JSON"),
        (
            [USER, {**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "not an object but list",
        ),
        ("text", "not a list but str"),
        (None, "there is no 'messages'"),
    ],
)
def test_half_a_dialogue_is_refused_with_its_reason(messages: Any, why: str) -> None:
    assert why in reason({"messages": messages}, "messages")


def test_other_things_are_refused_with_their_reason() -> None:
    assert "not an object but list" in reason([], "messages")
    assert "'tools' is not JSON" in reason({"messages": [USER, ASSISTANT], "tools": "["}, "messages")
    assert "no 'output'" in reason({"instruction": "x"}, "alpaca")
    assert "'history' is not a list of pairs" in reason({"instruction": "x", "output": "y", "history": ["z"]}, "alpaca")
    assert "is not JSON" in reason({"conversations": [{"from": "function_call", "value": "x"}]}, "sharegpt")
    assert "'summary' is not a text but int" in reason({"document": "x", "summary": 5}, "pairs")


def test_an_assistant_may_speak_first() -> None:
    roles = [role for role, _, _ in turns({"messages": [ASSISTANT, USER, ASSISTANT]}, "messages")]
    assert roles == ["assistant", "user", "assistant"]


def test_a_format_is_told_only_where_nine_in_ten_have_it() -> None:
    alpaca, pair = {"instruction": "a", "output": "b"}, {"document": "a", "summary": "b"}
    found = detect([alpaca] * 9 + [pair])
    assert found.name == "alpaca" and found.verdict.startswith("9 of 10 records are alpaca")
    with pytest.raises(DataError, match="several formats") as error:
        detect([alpaca] * 8 + [pair] * 2)
    assert "8 alpaca, 2 pairs (document -> summary)" in str(error.value.problems[0].seen)
    with pytest.raises(DataError, match="cannot be told"):
        detect([{"x": 1}, 5])
    with pytest.raises(DataError, match="no records"):
        detect([])


def test_choices_that_a_format_has_no_place_for_are_refused() -> None:
    with pytest.raises(ConfigError, match="no such chat format"):
        Format("chatml")
    with pytest.raises(ConfigError, match="instruction"):
        Format("alpaca", instruction="Summarise:")
    with pytest.raises(ConfigError, match="fields"):
        Format("messages", ("a", "b"))


def real(name: str) -> str:
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    return (SHARED / name).read_text("utf-8")


def test_real_tool_calls_are_all_read() -> None:
    records = json.loads(real("instruct/glaive_toolcall_en_demo.json"))
    form = detect(records)
    found = [item for item in read_conversations(records, form) if isinstance(item, Conversation)]
    assert (form.name, len(found)) == ("sharegpt", 300)
    said = Counter(turn["from"] for record in records for turn in record["conversations"])
    roles = Counter(message["role"] for item in found for message in item.messages)
    calls = sum(len(message.get("tool_calls", [])) for item in found for message in item.messages)
    assert roles == {
        "user": said["human"],
        "assistant": said["gpt"] + said["function_call"],
        "tool": said["observation"],
    }
    assert calls == said["function_call"] > 100


def test_real_preference_pairs_are_no_dialogues_and_said_to_be_none() -> None:
    records = json.loads(real("instruct/dpo_en_demo.json"))
    items = list(read_conversations(records, detect(records)))
    bad = [item.reason for item in items if isinstance(item, BadRecord)]
    assert len(items) == 300 and len(bad) > 0 and all("preference pair" in why for why in bad)


def test_real_pairs_of_other_names_are_read_by_their_names() -> None:
    records = list(csv.DictReader(real("support/banking77_train.csv").splitlines()))
    with pytest.raises(DataError, match="cannot be told"):
        detect(records)
    found = list(read_conversations(records, Format("pairs", ("text", "category"), "Which category?")))
    assert len(found) == len(records) and all(isinstance(item, Conversation) for item in found)
