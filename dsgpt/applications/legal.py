"""Legal documents: plain-language summaries, classes of clauses, and the passage of a contract that answers a question.

    summaries    {"original_text", "reference_summary"} (ToS;DR and others), {"document", "summary"}
    clauses      {"text", "label"} or {"text", "answer"}: a clause of terms of service and what is unfair in it (UNFAIR-ToS)
    contracts    {"context", "question", "answers": {"text": [...]}} (CUAD, SQuAD), or SQuAD's file of paragraphs

Summaries of terms name their document: a contract is made of all passages of one, and each summary asks for its passage.
UNFAIR-ToS does not say which contract a clause is from, so clauses of one are on both sides, near copies left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsgpt.applications.records import Example, name_of, task, text_in
from dsgpt.errors import DataError

SOURCES = {
    "summaries": "passages of terms and contracts with what they mean in plain language",
    "clauses": "clauses with their class",
    "contracts": "contracts with questions and the passages that answer them",
}
PUBLIC = {
    "summaries": "github: lauramanor/legal_summarization",
    "clauses": "hf:nguha/legalbench:unfair_tos@refs/convert/parquet#test",
    "contracts": "hf:theatticusproject/cuad-qa@refs/convert/parquet",
}
PLAIN = "Say in plain words:"
CLASSIFY = "What is unfair in this clause?"
FIND = "Quote the passage that says:"
EXTRACTED = ("contracts",)  # the answer is a passage of the input
CHOSEN = ("clauses",)  # by likelihood; the other kinds are answered
METRICS = {
    "summaries": ("rougeL", "rouge1", "rouge2"),
    "contracts": ("token_f1", "exact_match", "rougeL"),
    "clauses": ("accuracy", "macro_f1", "accuracy_pmi", "macro_f1_pmi"),
}


def examples(source: str, records: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """Raises DataError for a record of an unknown schema."""
    if source == "summaries":
        yield from _summaries(list(records))
        return
    for record in records:
        yield from (_clauses if source == "clauses" else _contracts)(record)


def _summaries(records: list[Mapping[str, Any]]) -> Iterator[Example]:
    documents: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for number, record in enumerate(_flat(records)):
        passage, summary = (
            _first(record, names) for names in (("original_text", "document"), ("reference_summary", "summary"))
        )
        name = f"{record.get('urls') or number} {record.get('doc', '')}"
        documents[name].append((passage, summary))
        yield Example("summaries", name, task(PLAIN, passage, summary))
    for name, passages in documents.items():
        if len(passages) < 3:
            continue
        whole = "\n\n".join(passage for passage, _ in passages)
        for passage, summary in passages:
            # The question stands before the contract, where no cut takes it away.
            yield Example("contracts", name, task(f"{FIND} {summary}", whole, passage), document=whole)


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if name in record:
            return text_in(record, name)
    raise _unknown("passage with its summary", record)


def _flat(records: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """A file that is one object of records by their names gives these."""
    for record in records:
        if record and all(isinstance(value, Mapping) for value in record.values()):
            yield from record.values()
        else:
            yield record


def _clauses(record: Mapping[str, Any]) -> Iterator[Example]:
    label = next((name for name in ("label", "answer") if isinstance(record.get(name), str)), None)
    if "text" not in record or label is None:
        raise _unknown("clause with its class", record)
    text = text_in(record, "text")
    yield Example("clauses", text, task(CLASSIFY, text, text_in(record, label)))


def _contracts(record: Mapping[str, Any]) -> Iterator[Example]:
    if isinstance(record.get("data"), list):  # SQuAD's file, as CUAD is published
        for document in record["data"]:
            for paragraph in document["paragraphs"]:
                for one in paragraph["qas"]:
                    texts = [answer["text"] for answer in one["answers"]]
                    fields = {"title": document["title"], "context": paragraph["context"], "question": one["question"]}
                    yield from _contracts({**fields, "answers": {"text": texts}})
        return
    answers = record.get("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    if texts is None or "context" not in record or "question" not in record:
        raise _unknown("contract with a question and its answers", record)
    asked, name = f"{FIND} {text_in(record, 'question')}", name_of(record, "title")
    if not (found := [text for text in dict.fromkeys(texts) if text.strip()]):
        # The contract does not answer it: left out, and counted with those without an answer.
        yield Example("contracts", name, task(asked, "", ""))
        return
    context, more = text_in(record, "context"), {"other_answers": found[1:]} if found[1:] else {}
    yield Example("contracts", name, task(asked, context, found[0]) | more, document=context)


def _unknown(what: str, record: Mapping[str, Any]) -> DataError:
    seen = f"fields: {', '.join(map(str, record))[:200]}"
    return DataError(f"a record is no {what} of a known schema", seen=seen, do="the schemas are in the README")
