"""Packing of conversations into rows of 1,024 positions: how full the rows get, and how long it takes.

Dialogues, questions with their answers, and articles with their summaries, from the data that lies beside the clone
(../shared/data; without it that row is left out), rendered by the shipped chat template and encoded by GPT-2's tokenizer; a
million synthetic lengths, which need nothing.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.frame import Outcome, Row

SHARED = Path(__file__).parents[3] / "shared" / "data"
CAPACITY = 1025


def run(trials: int | None, seed: int) -> Outcome:
    """Three packings of the synthetic lengths unless `trials` says otherwise."""
    from dsgpt.data.packing import pack

    trials = trials or 3
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(5, 1.1, 1_000_000).astype(np.int64), 2, CAPACITY)
    seconds = []
    for _ in range(trials):
        began = time.perf_counter()
        packing = pack(lengths, CAPACITY)
        seconds.append(time.perf_counter() - began)
    rows = [
        Row(
            "1 M synthetic samples", statistics.median(seconds), "s", at_most=5, note=f"{packing.utilisation:.2%} full"
        ),
    ]
    if SHARED.is_dir():
        sizes, skipped = _real_lengths()
        packing = pack(sizes, CAPACITY)
        note = (
            f"{len(sizes):,} in {len(packing):,} rows (at least {packing.fewest_rows:,}); {skipped} more are too long"
        )
        rows.append(
            Row("dialogues, FAQ and summaries, GPT-2 ids", packing.utilisation * 100, "%", at_least=99, note=note)
        )
        alone = len(sizes) * CAPACITY
        rows.append(Row("... the same, one sample a row", 100 * packing.tokens / alone, "%"))
    return Outcome(rows, trials)


def _real_lengths() -> tuple[list[int], int]:
    from dsgpt.data.chat_formats import Conversation, Format, read_conversations
    from dsgpt.data.chat_template import ChatTemplate
    from dsgpt.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as name:
        template = ChatTemplate(Tokenizer.load(_gpt2(Path(name))))
    sizes = []
    for form, records in ((Format("sharegpt"), _dialogues()), (Format("completion"), _pairs())):
        for item in read_conversations(records, form):
            assert isinstance(item, Conversation), item
            sizes.append(len(template.encode(item.messages, item.tools).ids))
    fitting = [size for size in sizes if size <= CAPACITY]
    return fitting, len(sizes) - len(fitting)


def _gpt2(folder: Path) -> Path:
    """GPT-2's tokenizer, under the names its files have elsewhere."""
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((SHARED / "tokenizers" / f"gpt2_{name}").read_bytes())
    return folder


def _dialogues() -> list[dict[str, Any]]:
    """Of three schemas, as ShareGPT has them; what an agent says before the customer does is left out."""
    found = json.loads((SHARED / "instruct" / "glaive_toolcall_en_demo.json").read_text("utf-8"))
    spoken = [
        [(turn["speaker"] == "SYSTEM", turn["utterance"]) for turn in dialogue["turns"]]
        for dialogue in json.loads((SHARED / "support" / "sgd_train_dialogues_001.json").read_text("utf-8"))
    ]
    for dialogue in json.loads((SHARED / "support" / "abcd_sample.json").read_text("utf-8")):
        spoken.append([(who == "agent", text) for who, text in dialogue["original"] if who in ("agent", "customer")])
    for turns in spoken:
        said: list[dict[str, str]] = []
        for is_agent, text in turns:
            who = "gpt" if is_agent else "human"
            if said and said[-1]["from"] == who:
                said[-1]["value"] += "\n" + text
            elif said or not is_agent:
                said.append({"from": who, "value": text})
        if len(said) > 1:
            found.append({"conversations": said})
    return found


def _pairs() -> list[dict[str, str]]:
    found = []
    for name in ("cnn_dm_200.jsonl", "xsum_200.jsonl"):
        rows = [json.loads(line) for line in (SHARED / "news" / name).read_text("utf-8").splitlines()]
        found += [
            {"prompt": row["prompt"], "completion": row[next(key for key in row if key != "prompt")]} for row in rows
        ]
    for domain in json.loads((SHARED / "support" / "dstc9_faq_knowledge.json").read_text("utf-8")).values():
        for entity in domain.values():
            for doc in entity["docs"].values():
                found.append({"prompt": doc["title"], "completion": doc["body"]})
    return found
