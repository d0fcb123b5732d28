"""Ways of training compared on one application: prepared, trained, evaluated, and the numbers for its table.

    result = Comparison("support", sources, base="runs/small-base/export", folder=Path("runs/support")).run()

    untuned, last_blocks, lora, full, scratch      the whole table: held-out loss, metrics of each kind of question, cost
    N x share of the data                          held-out loss of each number of last blocks, and what `auto` chooses

All ways see the same examples for as many epochs. Learning rates are set by way, because they are not comparable: full
tuning moves every weight, adapters begin at zero. Every stage is a command; what is done is not done again, so the same
call continues where it stopped. Held-out loss is that of the test examples, which nothing was chosen by.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsgpt.applications.news import lead
from dsgpt.applications.prepare import SUMMARY, application
from dsgpt.commands import Commands
from dsgpt.data.dataset import IGNORED, read_samples
from dsgpt.data.packing import open_chat
from dsgpt.evaluate.answers import score
from dsgpt.evaluate.metrics import mean
from dsgpt.evaluate.questions import read_questions
from dsgpt.train.state import read_metrics

WAYS: dict[str, dict[str, Any] | None] = {
    "untuned": None,
    "last_blocks": {
        "fine_tuning.train": "last_blocks",
        "fine_tuning.num_last_blocks": 2,
        "optimizer.learning_rate": 5e-4,
    },
    "lora": {"fine_tuning.train": "lora", "optimizer.learning_rate": 4e-3},
    "full": {"fine_tuning.train": "all", "optimizer.learning_rate": 1e-3},
    "scratch": {"fine_tuning.train": "all", "model.init_from": "scratch", "optimizer.learning_rate": 2e-3},
}
SHARES = {"10%": "tenth", "100%": "data"}
_MODEL_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


@dataclass
class Comparison:
    """`overrides` are keys of the run config for all ways; `samples` limits the questions of each kind."""

    name: str
    sources: Mapping[str, Sequence[str]]
    base: str
    folder: Path
    limits: Mapping[str, int] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    samples: int | None = None
    max_new_tokens: int = 64
    long_input: str = "lead"
    general: Path | None = None  # a prepared dataset of general text, to see what is forgotten
    grid: bool = True

    @cached_property
    def _commands(self) -> Commands:
        return Commands(f"dsgpt application run {self.name} … --output-dir {self.folder}")

    @property
    def _data(self) -> Path:
        return self.folder / "application"

    def run(self) -> dict[str, Any]:
        """All stages; the numbers of the tables. Raises DsgptError where a command fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._prepare()
        ways = {way: self._way(way) for way in WAYS}
        cells = dict(self._cells()) if self.grid else {}
        result = {
            "application": self.name,
            "base": self.base,
            "data": json.loads((self._data / SUMMARY).read_text("utf-8")),
            "unigram_entropy": unigram_entropy(self.folder / "test", self._seq_length),
            "ways": ways,
            "baselines": {kind: self._baselines(kind, found) for kind, found in ways["untuned"]["kinds"].items()},
            "cells": cells,
            "chosen": {share: self._chosen(share) for share in SHARES} if self.grid else {},
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result

    # ---- stages --------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if not (self._data / SUMMARY).exists():
            sources = [
                word
                for key, places in self.sources.items()
                for place in places
                for word in ("--source", f"{key}={place}")
            ]
            limits = [word for key, number in self.limits.items() for word in ("--limit", f"{key}={number}")]
            self._commands.run(
                "prepare", "application", "prepare", self.name, *sources, *limits, "--tokenizer", self.base,
                "--seq-length", self._seq_length, "--output", self._data,
            )  # fmt: skip
        for side, name in (("train", "data"), ("train-tenth", "tenth"), ("validation", "validation"), ("test", "test")):
            if not (self.folder / name / "dataset.json").exists():
                self._commands.run(
                    name, "data", "prepare-chat", self._data / f"{side}.jsonl", "--tokenizer", self.base,
                    "--seq-length", self._seq_length, "--output", self.folder / name,
                )  # fmt: skip

    @cached_property
    def _seq_length(self) -> int:
        return int(self._base_config["max_position_embeddings"])

    @cached_property
    def _base_config(self) -> dict[str, Any]:
        return dict(json.loads((Path(self.base.removeprefix("hf:")) / "config.json").read_text("utf-8")))

    def _way(self, way: str) -> dict[str, Any]:
        """One row of the table."""
        record = self.folder / f"{way}.json"
        if record.exists():
            return dict(json.loads(record.read_text("utf-8")))
        changes = WAYS[way]
        if changes is None:
            model, cost = self.base, dict[str, Any]()
        else:
            model = str(self._train(way, "data", changes))
            cost = self._cost(Path(model))
        row = {"loss": self._loss(model), **cost, "kinds": dict(self._measure(way, model))}
        if self.general is not None:
            row["general_loss"] = self._loss(model, self.general, _held_out_split(self.general))
        record.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        return row

    def _train(self, name: str, data: str, changes: Mapping[str, Any]) -> Path:
        run = self.folder / name
        settings = {
            "run.name": f"{self.name}-{name}",
            "run.output_dir": str(run),
            "model.init_from": f"hf:{self.base.removeprefix('hf:')}",
            "training.seq_length": self._seq_length,
            "data.train": [{"path": str(self.folder / data)}],
            "data.validation": [{"path": str(self.folder / "validation")}],
            **changes,
        }
        if settings["model.init_from"] == "scratch":
            sizes = {key: self._base_config[key] for key in _MODEL_KEYS if key in self._base_config}
            settings |= {f"model.{key}": value for key, value in sizes.items()}
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        self._commands.run(f"training {name}", "train", self.name, *words, *self.overrides)
        return run

    def _loss(self, model: str, data: Path | None = None, split: str = "train") -> float:
        """Of the test examples, or of another dataset."""
        place = data or self.folder / "test"
        label = "loss on general text" if data else "held-out loss"
        told = self._commands.json(label, "evaluate", model, "--data", place, "--split", split, "--json")
        return float(told["loss"])

    def _measure(self, way: str, model: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(kind of question, its numbers)."""
        of = application(self.name)
        limit = ("--samples", self.samples) if self.samples else ()
        common = ("--chat-template", "chatml", "--long-input", self.long_input, *limit, "--json")
        for kind in of.METRICS:
            path = self._data / f"test-{kind}.jsonl"
            if not path.exists() or not path.stat().st_size:
                continue
            output = ("--output", said_file(self.folder, way, kind))
            asked = (
                ("--choices", path)
                if kind in of.CHOSEN
                else ("--answers", path, "--max-new-tokens", self.max_new_tokens)
            )
            yield kind, self._commands.json(f"{kind}: what {way} says", "evaluate", model, *asked, *output, *common)

    def _baselines(self, kind: str, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What needs no training: chance and the most frequent class; the first three sentences of an article."""
        if kind in application(self.name).CHOSEN:
            majority = {"accuracy": found["majority"], "macro_f1": found["majority_macro_f1"]}
            given = {"by chance": {"accuracy": found["chance"]}, "most frequent": majority}
            return {name: {key: {"value": value} for key, value in numbers.items()} for name, numbers in given.items()}
        if self.name != "news":
            return {}
        questions = read_questions(self._data / f"test-{kind}.jsonl", self.samples)
        scores = score([one.answer for one in questions], [lead(one.input) for one in questions])
        return {"lead-3": {name: vars(mean(values)) for name, values in scores.items()}}

    def _cost(self, run: Path) -> dict[str, Any]:
        metrics = [entry for entry in read_metrics(run / "metrics.jsonl") if "tokens_per_second" in entry]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
        counts = next((event for event in events if event.get("event") == "trained_parameters"), {})
        return {
            "trained": counts.get("trained"),
            "frozen": counts.get("frozen"),
            "steps": metrics[-1]["step"],
            "tokens": metrics[-1]["consumed_tokens"],
            "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in metrics[1:] or metrics),
            "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in metrics),
        }

    # ---- how many blocks -----------------------------------------------------------------------------------------

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """1, 2, half of the blocks, all."""
        blocks = int(self._base_config["num_hidden_layers"])
        return tuple(sorted({1, min(2, blocks), max(1, blocks // 2), blocks}))

    def _cells(self) -> Iterator[tuple[str, float]]:
        """("N of SHARE", held-out loss) of every number of last blocks at every share of the data."""
        for share, data in SHARES.items():
            for number in self.numbers:
                name = f"last-{number}-of-{data}"
                record = self.folder / f"{name}.json"
                if not record.exists():
                    changes = {**(WAYS["last_blocks"] or {}), "fine_tuning.num_last_blocks": number}
                    loss = self._loss(str(self._train(name, data, changes)))
                    record.write_text(json.dumps({"loss": loss}) + "\n", encoding="utf-8")
                yield f"{number} of {share}", float(json.loads(record.read_text("utf-8"))["loss"])

    def _chosen(self, share: str) -> int:
        """What `num_last_blocks: auto` measures on this share of the data: one step of training tells."""
        name = f"auto-of-{SHARES[share]}"
        changes = {**(WAYS["last_blocks"] or {}), "fine_tuning.num_last_blocks": "auto", "training.max_steps": 1}
        changes |= {"training.num_epochs": None, "optimizer.warmup_steps": 0}
        if self.general is not None:
            sets = {"domain": self.folder / "validation", "general": self.general}
            changes["data.validation"] = [{"name": key, "path": str(path)} for key, path in sets.items()]
        run = self.folder / name
        if not (run / "events.jsonl").exists():
            self._train(name, SHARES[share], changes)
        events = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
        return next(int(event["num_last_blocks"]) for event in events if "num_last_blocks" in event)


def _held_out_split(data: Path) -> str:
    """As data.validation reads a dataset: its validation split, or all of one that has none."""
    return "validation" if "validation" in json.loads((data / "dataset.json").read_text("utf-8"))["splits"] else "train"


def said_file(folder: Path, way: str, kind: str) -> Path:
    """What a way said to each question of a kind."""
    return folder / f"{way}-{kind}.jsonl"


def unigram_entropy(folder: Path, seq_length: int) -> float:
    """Nats per token of the tokens that are learned from in a dataset, by how frequent each is there: what a model reaches
    that knows nothing of order. A tuned one has to be below it."""
    samples = open_chat(folder, "train", seq_length)
    counts: Counter[int] = Counter()
    for number in range(samples.num_samples):
        labels = read_samples(samples, np.array([number]))["labels"]
        counts.update(labels[labels != IGNORED].tolist())
    shares = np.array(list(counts.values())) / max(1, counts.total())
    return float(-(shares * np.log(shares)).sum())
