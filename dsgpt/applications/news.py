"""News: articles and their summaries.

articles    {"article", "highlights"} (CNN/DailyMail), {"document", "summary"} (XSum), or {"prompt", "completion"} of which
            the prompt is an instruction ("Summarise the article:") and the article
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsgpt.applications.records import Example, task, text_in
from dsgpt.data.chat_formats import PAIRS
from dsgpt.errors import DataError

SOURCES = {"articles": "articles with their summaries"}
PUBLIC = {"articles": "hf:abisee/cnn_dailymail:3.0.0, hf:EdinburghNLP/xsum@refs/convert/parquet"}
SUMMARISE = "Summarise:"
CHOSEN: tuple[str, ...] = ()
METRICS = {"articles": ("rougeL", "rouge1", "rouge2")}
_INSTRUCTION = re.compile(r"\A\s*summari[sz]e[^:\n]{0,40}:\s*", re.IGNORECASE)
_END = re.compile(r"\s*(<\|endoftext\|>|</endoftext/?>)\s*\Z")
_SHORT = r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)"  # no ends of sentences
_SENTENCE = re.compile(_SHORT + r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


def examples(source: str, records: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """Raises DataError for a record of an unknown schema."""
    for record in records:
        article, summary = _pair(record)
        yield Example("articles", article[:200], task(SUMMARISE, article, summary))


def _pair(record: Mapping[str, Any]) -> tuple[str, str]:
    for text, answer in PAIRS:
        if text in record and answer in record:
            return text_in(record, text), text_in(record, answer)
    if "prompt" in record and "completion" in record:
        asked, said = text_in(record, "prompt"), text_in(record, "completion")
        return _INSTRUCTION.sub("", asked).strip(), _END.sub("", said).strip()
    raise DataError(
        "a record is no article with its summary",
        seen=f"fields: {', '.join(record)}",
        do="name them article and summary",
    )


def lead(article: str, sentences: int = 3) -> str:
    """The first sentences of an article: the baseline of news summaries (Grusky et al. 2018, section 4)."""
    paragraphs = [line.strip() for line in article.splitlines() if line.strip()]
    found = [sentence for line in paragraphs for sentence in _SENTENCE.split(line)]
    return " ".join(found[:sentences])
