"""Customer support: dialogues, frequent questions, manuals, and the routing of a message to its intent.

dialogues    {"turns": [{"speaker": "USER", "utterance": ...}]} (SGD), {"original": [["customer", ...]]} (ABCD), or messages
faq          {"title", "body"} (DSTC9), {"question", "answer"}, {"instruction", "response"} (Bitext)
manuals      {"title", "steps": [...]}, or ABCD's guidelines: flows of subflows of actions
intents      {"text", "category"} or {"text", "label_text"} (banking77), {"instruction", "intent"} (Bitext)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsgpt.applications.records import Example, conversation, task
from dsgpt.errors import DataError

SOURCES = {
    "dialogues": "conversations of customers and agents",
    "faq": "frequent questions with their answers",
    "manuals": "instructions for products or procedures",
    "intents": "messages of customers and what they are about",
}
PUBLIC = {
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
    "intents": ("accuracy", "macro_f1"),
}


def examples(source: str, records: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """Raises DataError for a record of an unknown schema."""
    for number, record in enumerate(records):
        yield from _READERS[source](record, number)


def _dialogue(record: Mapping[str, Any], number: int) -> Iterator[Example]:
    group = str(record.get("dialogue_id") or record.get("convo_id") or number)
    if "turns" in record:
        turns = [(turn["speaker"].upper() in ("SYSTEM", "AGENT"), turn["utterance"]) for turn in record["turns"]]
        messages = conversation(turns)
    elif "original" in record:
        said = [(who == "agent", text) for who, text in record["original"] if who in ("agent", "customer")]
        messages = conversation(said)
    elif "messages" in record:
        messages = list(record["messages"])
    else:
        raise _unknown("dialogue", record)
    if messages:
        yield Example("dialogues", group, {"messages": messages})


def _faq(record: Mapping[str, Any], number: int) -> Iterator[Example]:
    """Flat records, or DSTC9's: domains of entities of documents."""
    for question, answer in (("title", "body"), ("question", "answer"), ("instruction", "response")):
        if question in record and answer in record:
            asked, said = str(record[question]), str(record[answer])
            name = record.get("entity")
            given = f"{name}: {asked}" if name and str(name).lower() not in asked.lower() else asked
            yield Example("faq", f"{name or asked}", {"messages": conversation([(False, given), (True, said)])})
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
        yield from _faq(doc, number)


def _manual(record: Mapping[str, Any], number: int) -> Iterator[Example]:
    """One procedure, or ABCD's guidelines of many."""
    if "title" in record and "steps" in record:
        steps = "\n".join(f"{place}. {step}" for place, step in enumerate(record["steps"], start=1))
        yield Example("manuals", str(record["title"]), task(MANUAL, str(record["title"]), steps))
        return
    flows = {name: flow for name, flow in record.items() if isinstance(flow, Mapping) and "subflows" in flow}
    if not flows:
        raise _unknown("manual", record)
    for flow, content in flows.items():
        for subflow, its in content["subflows"].items():
            steps = [action["text"] for action in its["actions"] if action.get("text")]
            yield from _manual({"title": f"{flow}: {subflow}", "steps": steps}, number)


def _intent(record: Mapping[str, Any], number: int) -> Iterator[Example]:
    text = record.get("text") or record.get("instruction")
    label = record.get("category") if "text" in record else record.get("intent")
    label = label if isinstance(label, str) else record.get("label_text")
    if not isinstance(text, str) or not isinstance(label, str):
        raise _unknown("message with its intent", record)
    yield Example("intents", text, task(ROUTE, text, label.replace("_", " ").strip()))


def _unknown(what: str, record: Mapping[str, Any]) -> DataError:
    do = "convert it to one of the schemas of dsgpt application prepare support --help"
    return DataError(
        f"a record is no {what} of a known schema", seen=f"fields: {', '.join(map(str, record))[:200]}", do=do
    )


_READERS = {"dialogues": _dialogue, "faq": _faq, "manuals": _manual, "intents": _intent}
