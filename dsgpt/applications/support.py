"""Customer support: dialogues, frequent questions, manuals, and the routing of a message to its intent.

dialogues    {"turns": [{"speaker": "USER", "utterance": ...}]} (SGD, also by columns), {"original": [["customer", ...]]}
             (ABCD), or messages
faq          {"title", "body"} (DSTC9), {"question", "answer"}, {"instruction", "response"} (Bitext)
manuals      {"title", "steps": [...]}, or ABCD's guidelines: flows of subflows of actions
intents      {"text", "category"} or {"text", "label_text"} (banking77), {"instruction", "intent"} (Bitext)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsgpt.applications.records import Example, conversation, name_of, task, text_in
from dsgpt.errors import DataError

SOURCES = {
    "dialogues": "conversations of customers and agents",
    "faq": "frequent questions with their answers",
    "manuals": "instructions for products or procedures",
    "intents": "messages of customers and what they are about",
}
PUBLIC = {
    "dialogues": "github: google-research-datasets/dstc8-schema-guided-dialogue, asappresearch/abcd",
    "manuals": "github: asappresearch/abcd data/guidelines.json",
    "faq": "hf:bitext/Bitext-customer-support-llm-chatbot-training-dataset",
    "intents": "hf:mteb/banking77",
}
ROUTE = "Which intent does this message have?"
MANUAL = "Explain step by step:"
CHOSEN = ("intents",)  # by likelihood; the other kinds are answered
METRICS = {
    "dialogues": ("rougeL", "token_f1", "perplexity"),
    "faq": ("rougeL", "token_f1", "perplexity"),
    "manuals": ("rougeL", "token_f1", "perplexity"),
    "intents": ("accuracy_pmi", "macro_f1_pmi", "accuracy", "macro_f1"),
}


def examples(source: str, records: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """Raises DataError for a record of an unknown schema, and for one that holds something else than text."""
    for record in records:
        yield from _READERS[source](record)


def _dialogues(record: Mapping[str, Any]) -> Iterator[Example]:
    if record and set(record) <= {"train", "dev", "validation", "test"}:  # ABCD as published: one object of all splits
        for split in record.values():
            for one in split:
                yield from _dialogues(one)
        return
    if "turns" in record:
        said = [(_is_agent(turn["speaker"]), text_in(turn, "utterance")) for turn in _rows(record["turns"])]
        messages = conversation(said)
    elif "original" in record:
        messages = conversation(
            (who == "agent", text) for who, text in record["original"] if who in ("agent", "customer")
        )
    elif isinstance(record.get("messages"), list):
        messages = [{"role": str(one["role"]), "content": text_in(one, "content")} for one in record["messages"]]
    else:
        raise _unknown("dialogue", record)
    yield Example("dialogues", name_of(record, "dialogue_id", "convo_id", "id"), {"messages": messages})


def _rows(turns: Any) -> list[dict[str, Any]]:
    """Turns that are given by columns, as the Hub keeps lists of records."""
    if isinstance(turns, Mapping):
        pairs = zip(turns["speaker"], turns["utterance"], strict=True)
        return [{"speaker": who, "utterance": text} for who, text in pairs]
    return list(turns)


def _is_agent(speaker: Any) -> bool:
    """SGD's names, or the numbers that they have on the Hub (0 is the user)."""
    return speaker == 1 if isinstance(speaker, int) else str(speaker).upper() in ("SYSTEM", "AGENT")


def _faq(record: Mapping[str, Any]) -> Iterator[Example]:
    """Flat records, or DSTC9's: domains of entities of documents."""
    for question, answer in (("title", "body"), ("question", "answer"), ("instruction", "response")):
        if question in record and answer in record:
            asked, said, name = text_in(record, question), text_in(record, answer), text_in(record, "entity")
            given = f"{name}: {asked}" if name and name.lower() not in asked.lower() else asked
            yield Example("faq", name or asked, {"messages": conversation([(False, given), (True, said)])})
            return
    found = [
        {**doc, "entity": entity.get("name")}
        for domain in record.values()
        for entity in (domain.values() if isinstance(domain, Mapping) else ())
        if isinstance(entity, Mapping)
        for doc in (entity.get("docs") or {}).values()
    ]
    if not found:
        raise _unknown("question with its answer", record)
    for doc in found:
        yield from _faq(doc)


def _manuals(record: Mapping[str, Any]) -> Iterator[Example]:
    """One procedure, or ABCD's guidelines of many."""
    if "title" in record and isinstance(record.get("steps"), list):
        steps = "\n".join(f"{place}. {step}" for place, step in enumerate(record["steps"], start=1))
        title = text_in(record, "title")
        yield Example("manuals", title, task(MANUAL, title, steps))
        return
    flows = {name: flow for name, flow in record.items() if isinstance(flow, Mapping) and "subflows" in flow}
    if not flows:
        raise _unknown("manual", record)
    for flow, content in flows.items():
        for subflow, its in content["subflows"].items():
            steps = [action["text"] for action in its["actions"] if action.get("text")]
            yield from _manuals({"title": f"{flow}: {subflow}", "steps": steps})


def _intents(record: Mapping[str, Any]) -> Iterator[Example]:
    text_name, names = ("text", ("category", "label_text")) if "text" in record else ("instruction", ("intent",))
    label = next((name for name in names if isinstance(record.get(name), str)), None)
    if text_name not in record or label is None:
        raise _unknown("message with its intent", record)
    text = text_in(record, text_name)
    yield Example("intents", text, task(ROUTE, text, text_in(record, label).replace("_", " ")))


def _unknown(what: str, record: Mapping[str, Any]) -> DataError:
    seen = f"fields: {', '.join(map(str, record))[:200]}"
    return DataError(f"a record is no {what} of a known schema", seen=seen, do="the schemas are in the README")


_READERS = {"dialogues": _dialogues, "faq": _faq, "manuals": _manuals, "intents": _intents}
