"""What an application's comparison prints: one table of ways, one of numbers of blocks, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsgpt.applications.news import lead
from dsgpt.applications.prepare import application, summary_lines
from dsgpt.evaluate.answers import score
from dsgpt.evaluate.metrics import mean, mean_difference
from dsgpt.units import format_bytes, format_count

WITHIN = 0.05  # nats: so near to the best number of blocks a choice is right
_LABELS = {
    "untuned": "untuned",
    "last_blocks": "last 2 blocks",
    "lora": "LoRA",
    "full": "all weights",
    "scratch": "from scratch",
}
Lines = Sequence[Mapping[str, Any]]


def ways_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): held-out loss, a metric of each kind of question, and what the training cost."""
    of = application(result["application"])
    first = next(iter(result["ways"].values()))
    kinds = list(first["kinds"])
    has_general = "general_loss" in first
    headings = ["", "held-out loss (perplexity)", *(["general text"] if has_general else [])]
    for kind in kinds:
        headings += (
            [f"{kind}: accuracy", f"{kind}: macro-F1"] if kind in of.CHOSEN else [f"{kind}: ROUGE-L", "token F1"]
        )
    headings += ["trained", "tokens/s", "memory"]
    return headings, [_way_row(way, row, of, has_general) for way, row in result["ways"].items()]


def _way_row(way: str, row: Mapping[str, Any], of: Any, has_general: bool) -> list[str]:
    cells = [
        _LABELS[way],
        f"{row['loss']:.3f} ({math.exp(row['loss']):.1f})",
        *([f"{row['general_loss']:.3f}"] if has_general else []),
    ]
    for kind, numbers in row["kinds"].items():
        names = ("accuracy", "macro_f1") if kind in of.CHOSEN else ("rougeL", "token_f1")
        cells += [_number(numbers[name]) for name in names]
    if row.get("tokens_per_second") is None:
        return [*cells, "", "", ""]
    trained = "all" if row["trained"] is None else format_count(row["trained"])
    return [*cells, trained, format_count(row["tokens_per_second"]), format_bytes(row["peak_memory_bytes"])]


def _number(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def cells_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): held-out loss by number of last blocks and share of the data; * is what auto chose."""
    cells, chosen = result["cells"], result["chosen"]
    numbers = sorted({int(name.split(" of ")[0]) for name in cells})
    rows = []
    for share, choice in chosen.items():
        losses = {number: cells[f"{number} of {share}"] for number in numbers}
        right = auto_is_right(losses, choice)
        marked = [f"{loss:.3f}{' *' if number == choice else ''}" for number, loss in losses.items()]
        rows.append([share, *marked, f"{choice}: {'within' if right else 'NOT within'} {WITHIN} of the best"])
    return ["of the data", *(f"last {number}" for number in numbers), "auto"], rows


def auto_is_right(losses: Mapping[int, float], choice: int) -> bool:
    """Of a number that is no column the next one counts that is not larger."""
    near = max((number for number in losses if number <= choice), default=min(losses))
    return losses[near] <= min(losses.values()) + WITHIN


def facts(result: Mapping[str, Any], tuned: Mapping[str, Lines], untuned: Mapping[str, Lines]) -> Iterator[str]:
    """Lines below the tables: the data, differences to the untuned model and to baselines. Lines are of --output files."""
    yield from summary_lines(result["data"])
    yield f"unigram entropy of the held-out answers: {result['unigram_entropy']:.3f} nats per token"
    of = application(result["application"])
    for kind in of.GENERATED:
        if kind in tuned and kind in untuned:
            pairs = ([row["rougeL"] for row in side[kind]] for side in (tuned, untuned))
            yield f"{kind}: ROUGE-L tuned minus untuned {mean_difference(*pairs)}"
    for kind in of.CHOSEN:
        numbers = result["ways"]["full"]["kinds"].get(kind)
        if numbers:
            yield (
                f"{kind}: by chance {numbers['chance']:.3f}, always the most frequent {numbers['majority']:.3f}, whose "
                f"macro-F1 is {numbers['majority_macro_f1']:.3f}"
            )


def lead_line(path: Path) -> str:
    """ROUGE of the first three sentences of each article of a test file: what summaries of news have to beat."""
    from dsgpt.evaluate.questions import read_questions

    questions = read_questions(path)
    scores = score([one.answer for one in questions], [lead(one.input) for one in questions])
    return "lead-3: " + ", ".join(f"{name} {mean(scores[name])}" for name in ("rouge1", "rouge2", "rougeL"))
