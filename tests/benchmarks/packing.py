"""Packing of conversations into rows of 1,024 positions: how full the rows get, and how long it takes.

Dialogues, questions with their answers, and articles with their summaries, from the data that lies beside the clone
(../shared/data; without it that row is left out), rendered by the shipped chat template and encoded by GPT-2's tokenizer; a
million synthetic lengths, which need nothing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks._chats import SHARED, questions, summaries, support_dialogues, tool_dialogues
from tests.frame import Outcome, Row

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
    dialogues, pairs = tool_dialogues() + support_dialogues(), summaries() + questions()
    for form, records in ((Format("sharegpt"), dialogues), (Format("completion"), pairs)):
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
