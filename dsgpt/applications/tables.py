"""What an application's comparison prints: tables of its ways, of each kind of question, and of numbers of blocks."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsgpt.applications.prepare import application, summary_lines
from dsgpt.evaluate.metrics import Number, mean_difference
from dsgpt.units import format_bytes, format_count

WITHIN = 0.05  # nats: so near to the best number of blocks a choice is right
_LABELS = {
    "untuned": "untuned",
    "lora": "LoRA",
    "full": "all weights",
    "scratch": "from scratch",
}
_SHORTENED = {
    "cut": "are longer than the context: the lead of their input is read",
    "in pieces": "are longer than the context: read in pieces, then merged",
    "conversations shortened": "are longer than the context: without their oldest exchanges",
}
_HEADINGS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "accuracy_pmi": "accuracy, PMI",
    "macro_f1_pmi": "macro-F1, PMI",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "token_f1": "token F1",
    "exact_match": "exact match",
    "perplexity": "perplexity",
}
_CHOICES = {"accuracy": "choice", "accuracy_pmi": "choice_pmi"}
Lines = Sequence[Mapping[str, Any]]
Table = tuple[str, list[str], list[list[str]]]  # title, headings, rows


def ways_table(result: Mapping[str, Any]) -> Table:
    """Held-out loss of all that is learned from, loss on general text where that was asked for, and what training cost."""
    has_general = "general_loss" in next(iter(result["ways"].values()))
    headings = ["", "held-out loss", "perplexity", *(["general text"] if has_general else [])]
    headings += ["trained", "tokens/s", "memory"]
    rows = []
    for way, row in result["ways"].items():
        cells = [_label(result, way), f"{row['loss']:.3f}", f"{math.exp(row['loss']):.1f}"]
        cells += [f"{row['general_loss']:.3f}"] if has_general else []
        rows.append([*cells, *_cost(row)])
    return f"{result['application']}: ways of training", headings, rows


def _label(result: Mapping[str, Any], way: str) -> str:
    return f"last {result['last_blocks']} blocks" if way == "last_blocks" else _LABELS[way]


def _cost(row: Mapping[str, Any]) -> list[str]:
    if row.get("tokens_per_second") is None:
        return ["", "", ""]
    trained = "all" if row["trained"] is None else format_count(row["trained"])
    return [trained, format_count(row["tokens_per_second"]), format_bytes(row["peak_memory_bytes"])]


def kind_table(result: Mapping[str, Any], kind: str, said: Mapping[str, Lines]) -> Table:
    """The metrics of one kind of question, with 95 % intervals; what each way gains over the untuned model; baselines.

    `said` are the lines of each way's --output file.
    """
    of = application(result["application"])
    main, *others = of.METRICS[kind]
    headings = ["", _HEADINGS[main], "minus untuned", *(_HEADINGS[name] for name in others)]
    rows = []
    for way, row in result["ways"].items():
        numbers = row["kinds"][kind]
        gain = "" if way == "untuned" else str(_gain(said[way], said["untuned"], main))
        cells = [_number(numbers[name]) if name in numbers else "" for name in (main, *others)]
        rows.append([_label(result, way), cells[0], gain, *cells[1:]])
    for name, numbers in result.get("baselines", {}).get(kind, {}).items():
        cells = [_number(numbers[metric]) if metric in numbers else "" for metric in of.METRICS[kind]]
        rows.append([name, cells[0], "", *cells[1:]])
    questions = result["ways"]["untuned"]["kinds"][kind]["questions"]
    groups = len({line["group"] for line in said["untuned"]})
    return f"{kind}: {questions} questions of {groups} groups", headings, rows


def main_metric(result: Mapping[str, Any], kind: str) -> str:
    return str(application(result["application"]).METRICS[kind][0])


def _gain(ours: Lines, theirs: Lines, metric: str) -> Number:
    """Of two models on the same questions."""
    groups = [line["group"] for line in ours]
    return mean_difference(_each(ours, metric), _each(theirs, metric), None if None in groups else groups)


def _each(lines: Lines, metric: str) -> list[float]:
    """One number a question."""
    if metric in _CHOICES:
        return [float(line[_CHOICES[metric]] == line["answer"]) for line in lines]
    return [line[metric] for line in lines]


def _number(found: Mapping[str, float]) -> str:
    if "low" not in found:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def cells_table(result: Mapping[str, Any]) -> Table:
    """Held-out loss by number of last blocks and share of the data; * is what auto chose."""
    cells, chosen = result["cells"], result["chosen"]
    numbers = sorted({int(name.split(" of ")[0]) for name in cells})
    rows = []
    for share, choice in chosen.items():
        losses = {number: cells[f"{number} of {share}"] for number in numbers}
        right = auto_is_right(losses, choice)
        marked = [f"{loss:.3f}{' *' if number == choice else ''}" for number, loss in losses.items()]
        rows.append([share, *marked, f"{choice}: {'within' if right else 'NOT within'} {WITHIN} of the best"])
    headings = ["of the data", *(f"last {number}" for number in numbers), "auto"]
    return "held-out loss by number of last blocks", headings, rows


def auto_is_right(losses: Mapping[int, float], choice: int) -> bool:
    """Of a number that is no column the next one counts that is not larger."""
    near = max((number for number in losses if number <= choice), default=min(losses))
    return losses[near] <= min(losses.values()) + WITHIN


def facts(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines below the tables: what is in the data, what was too long, the loss that knows nothing of order, the seed."""
    yield from summary_lines(result["data"])
    for kind, numbers in result["ways"]["untuned"]["kinds"].items():
        counts = numbers["long_inputs"]
        for name, done in _SHORTENED.items():
            if number := counts.get(name):
                yield f"{kind}: {number} of {counts['asked']} questions ({number / counts['asked']:.0%}) {done}"
        if beyond := result["data"]["kinds"][kind].get("test_beyond"):
            yield f"{kind}: of the test examples {beyond} have a passage beyond the lead of a training sequence"
        if unmeasured := numbers.get("unmeasured"):
            yield f"{kind}: {unmeasured} references are longer than the context, and not in the perplexity"
    yield f"unigram entropy of the held-out answers: {result['unigram_entropy']:.3f} nats per token"
    yield f"seed {result['data']['seed']}; base {result['base']}; {platform.machine()}, {os.cpu_count()} processors"


def seen_line(kind: str, lines: Lines, seen: Sequence[bool], metric: str) -> str | None:
    """A metric of the questions whose answer stands word for word in the training data, and of the others."""
    parts = [[line[metric] for line, known in zip(lines, seen, strict=True) if known is side] for side in (True, False)]
    if not all(parts):
        return None
    known, new = (f"{sum(part) / len(part):.3f} ({len(part)})" for part in parts)
    return f"{kind}, all weights: {_HEADINGS[metric]} where the answer stands in the training data {known}, else {new}"


def markdown(table: Table) -> str:
    title, headings, rows = table
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
    return "\n".join([f"**{title}**", "", *lines, ""])
