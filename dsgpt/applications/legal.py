"""Legal documents: plain-language summaries, classes of clauses, and the passage of a contract that answers a question.

    summaries    {"original_text", "reference_summary"} (ToS;DR and others), {"document", "summary"}
    clauses      {"text", "label"}: a clause of terms of service and what is unfair in it (UNFAIR-ToS)
    contracts    {"context", "question", "answers": {"text": [...]}} (CUAD, SQuAD)

Summaries of terms name their document: a contract is made of all passages of one, and each summary asks for its passage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsgpt.applications.records import Example, task
from dsgpt.errors import DataError

SOURCES = {
    "summaries": "passages of terms and contracts with what they mean in plain language",
    "clauses": "clauses with their class",
    "contracts": "contracts with questions and the passages that answer them",
}
PUBLIC = {
    "summaries": "github: lauramanor/legal_summarization",
    "clauses": "hf:nguha/legalbench:unfair_tos",
    "contracts": "hf:theatticusproject/cuad-qa",
}
PLAIN = "Say in plain words:"
CLASSIFY = "What is unfair in this clause?"
FIND = "Quote the passage that says:"
CHOSEN = ("clauses",)  # by likelihood; the other kinds are answered
METRICS = {
    "summaries": ("rougeL", "rouge1", "rouge2"),
    "contracts": ("token_f1", "exact_match", "rougeL"),
    "clauses": ("accuracy", "macro_f1"),
}


def examples(source: str, records: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """Raises DataError for a record of an unknown schema."""
    if source == "summaries":
        yield from _summaries(list(records))
        return
    for record in records:
        yield from (_clause if source == "clauses" else _contract)(record)


def _summaries(records: list[Mapping[str, Any]]) -> Iterator[Example]:
    documents: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for number, record in enumerate(_flat(records)):
        passage = record.get("original_text") or record.get("document")
        summary = record.get("reference_summary") or record.get("summary")
        if not isinstance(passage, str) or not isinstance(summary, str):
            raise _unknown("passage with its summary", record)
        name = f"{record.get('urls') or number} {record.get('doc', '')}"
        documents[name].append((passage.strip(), summary.strip()))
        yield Example("summaries", name, task(PLAIN, passage, summary))
    for name, passages in documents.items():
        if len(passages) < 3:
            continue
        whole = "\n\n".join(passage for passage, _ in passages)
        for passage, summary in passages:
            # The question stands before the contract, where no cut takes it away.
            yield Example("contracts", name, task(f"{FIND} {summary}", whole, passage), f"{summary} {passage}")


def _flat(records: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """A file that is one object of records by their names gives these."""
    for record in records:
        if record and all(isinstance(value, Mapping) for value in record.values()):
            yield from record.values()
        else:
            yield record


def _clause(record: Mapping[str, Any]) -> Iterator[Example]:
    text, label = record.get("text"), record.get("label")
    if not isinstance(text, str) or not isinstance(label, str):
        raise _unknown("clause with its class", record)
    yield Example("clauses", text, task(CLASSIFY, text, label.strip()))


def _contract(record: Mapping[str, Any]) -> Iterator[Example]:
    answers = record.get("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    if not isinstance(record.get("context"), str) or not isinstance(record.get("question"), str) or texts is None:
        raise _unknown("contract with a question and its answers", record)
    if texts:  # questions that the contract does not answer teach no passage
        group = str(record.get("title") or record["context"][:200])
        asked = f"{FIND} {record['question']}"
        yield Example("contracts", group, task(asked, record["context"], texts[0]), f"{group} {asked} {texts[0]}")


def _unknown(what: str, record: Mapping[str, Any]) -> DataError:
    do = "convert it to one of the schemas of dsgpt application prepare legal --help"
    return DataError(
        f"a record is no {what} of a known schema", seen=f"fields: {', '.join(map(str, record))[:200]}", do=do
    )
