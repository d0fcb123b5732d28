"""Ways of training compared on one application: prepared, trained, evaluated, and the numbers for its table.

    result = Comparison("support", sources, base="runs/small-base/export", folder=Path("runs/support")).run()

    untuned, last_blocks, lora, full, scratch      the whole table: held-out loss, metrics of each kind of question, cost
    N x share of the data                          held-out loss of each number of last blocks, and what `auto` chooses

All ways see the same examples for as many epochs. Learning rates are set by way, because they are not comparable: full
tuning moves every weight, adapters begin at zero. Every stage is a command; what is done is not done again, so the same
call continues where it stopped, and one with other options is refused. Held-out loss is that of the test examples, which
nothing was chosen by. Trade-off: one seed a way, so that what training itself varies by is not in the intervals.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsgpt.applications.news import lead
from dsgpt.applications.prepare import SUMMARY, application
from dsgpt.applications.records import Shares
from dsgpt.checkpoint.weights import ModelLocation, find_model, read_model_config
from dsgpt.commands import Commands, fingerprint, keep_options, write_text
from dsgpt.config.model import HFModelConfig, ModelConfig
from dsgpt.data.dataset import IGNORED, read_samples
from dsgpt.data.packing import open_chat
from dsgpt.evaluate.answers import score
from dsgpt.evaluate.metrics import mean
from dsgpt.evaluate.questions import groups_of, read_questions
from dsgpt.model.build import model_shapes
from dsgpt.tokenizer.tokenizer import Tokenizer
from dsgpt.train.state import read_metrics

UNTUNED = "untuned"
WAYS: dict[str, dict[str, Any]] = {
    "last_blocks": {"fine_tuning.train": "last_blocks", "optimizer.learning_rate": 5e-4},
    "lora": {"fine_tuning.train": "lora", "optimizer.learning_rate": 4e-3},
    "full": {"fine_tuning.train": "all", "optimizer.learning_rate": 1e-3},
    "scratch": {"fine_tuning.train": "all", "model.init_from": "scratch", "optimizer.learning_rate": 2e-3},
}
SHARES = {"10%": "tenth", "100%": "data"}
SEQ_LENGTH = 1024  # unless the base's context is shorter
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


@dataclass
class Comparison:
    """`overrides` are keys of the run config for all ways, `rates` learning rates by way; `samples` limits the questions.

    `base` is any MODEL. `max_new_tokens` is by default what nearly all training answers of a kind have at most.
    """

    name: str
    sources: Mapping[str, Sequence[str]]
    base: str
    folder: Path
    limits: Mapping[str, int] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    samples: int | None = None
    max_new_tokens: int | None = None
    seq_length: int | None = None
    last_blocks: int = 2
    long_input: str = "lead"
    test_share: float = Shares.test
    general: Path | None = None  # a prepared dataset of general text, to see what is forgotten
    grid: bool = True
    seed: int = 1234

    def run(self) -> dict[str, Any]:
        """All stages; the numbers of the tables. Raises DsgptError where a command fails, ConfigError for other options."""
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_options(self.folder / "comparison.json", self._options(), self._commands.again)
        self._prepare()
        chosen = {share: self._chosen(share) for share in SHARES} if self.grid else {}
        ways = {way: self._way(way) for way in (UNTUNED, *WAYS)}
        cells = dict(self._cells(ways)) if self.grid else {}
        result = {
            "application": self.name,
            "base": self.base,
            "last_blocks": self.last_blocks,
            "data": self._summary,
            "unigram_entropy": unigram_entropy(self.folder / "test", self._length),
            "ways": ways,
            "baselines": {kind: self._baselines(kind, found) for kind, found in ways[UNTUNED]["kinds"].items()},
            "cells": cells,
            "chosen": chosen,
        }
        self._record(self.folder / "result.json", result)
        return result

    def _options(self) -> dict[str, Any]:
        """What the results depend on."""
        names = [one.name for one in fields(self) if one.name not in ("folder", "grid")]
        kept = {name: getattr(self, name) for name in names}
        kept["sources"] = {key: [fingerprint(place) for place in places] for key, places in self.sources.items()}
        return kept | {"base": fingerprint(self.base), "general": self.general and fingerprint(str(self.general))}

    @cached_property
    def _commands(self) -> Commands:
        return Commands(f"dsgpt application run {self.name} … --output-dir {self.folder}")

    @property
    def _data(self) -> Path:
        return self.folder / "application"

    @cached_property
    def _summary(self) -> dict[str, Any]:
        return dict(json.loads((self._data / SUMMARY).read_text("utf-8")))

    @cached_property
    def _location(self) -> ModelLocation:
        return find_model(self.base)

    @cached_property
    def _model(self) -> ModelConfig:
        return read_model_config(self._location)

    @property
    def _length(self) -> int:
        return self.seq_length or min(SEQ_LENGTH, self._model.max_position_embeddings)

    def _record(self, path: Path, found: Mapping[str, Any]) -> None:
        write_text(path, json.dumps(found, indent=2) + "\n")

    # ---- stages --------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        tokenizer = ("--tokenizer", self._location.tokenizer, "--seq-length", self._length)
        if not (self._data / SUMMARY).exists():
            words = [
                word
                for key, places in self.sources.items()
                for place in places
                for word in ("--source", f"{key}={place}")
            ]
            words += [word for key, number in self.limits.items() for word in ("--limit", f"{key}={number}")]
            words += ["--long-input", "refuse"] if self.long_input == "refuse" else []
            words += ["--test-share", str(self.test_share), "--seed", str(self.seed), "--output", str(self._data)]
            self._commands.run("prepare", "application", "prepare", self.name, *tokenizer, *words)
        for side, name in (("train", "data"), ("train-tenth", "tenth"), ("validation", "validation"), ("test", "test")):
            if (self.grid or name != "tenth") and not (self.folder / name / "dataset.json").exists():
                words = [str(self._data / f"{side}.jsonl"), "--output", str(self.folder / name)]
                self._commands.run(name, "data", "prepare-chat", *words, *tokenizer)

    def _way(self, way: str) -> dict[str, Any]:
        """One row of the table."""
        record = self.folder / f"{way}.json"
        if record.exists():
            return dict(json.loads(record.read_text("utf-8")))
        if way == UNTUNED:
            model, cost = self.base, dict[str, Any]()
        else:
            model = str(self._train(way, "data", WAYS[way] | self._blocks(way)))
            cost = self._cost(Path(model))
        row = {"loss": self._loss(model), **cost, "kinds": dict(self._measure(way, model))}
        if self.general is not None:
            row["general_loss"] = self._loss(model, self.general, _held_out_split(self.general))
        self._record(record, row)
        return row

    def _blocks(self, way: str) -> dict[str, Any]:
        return {"fine_tuning.num_last_blocks": self.last_blocks} if way == "last_blocks" else {}

    def _train(self, name: str, data: str, changes: Mapping[str, Any], last: Mapping[str, Any] | None = None) -> Path:
        """`last` are settings that the user's own do not change."""
        run = self.folder / name
        settings = {
            "run.name": f"{self.name}-{name}",
            "run.output_dir": str(run),
            "run.seed": self.seed,
            "model.init_from": f"{'checkpoint' if self._location.is_checkpoint else 'hf'}:{self.base.removeprefix('hf:')}",
            "training.seq_length": self._length,
            "data.train": [{"path": str(self.folder / data)}],
            "data.validation": [{"path": str(self.folder / "validation")}],
            **changes,
        }
        if settings["model.init_from"] == "scratch":
            settings |= {f"model.{key}": value for key, value in self._shape.items()}
        if name in self.rates:
            settings["optimizer.learning_rate"] = self.rates[name]
        words = [_word(key, value) for key, value in settings.items()]
        words += [*self.overrides, *(_word(key, value) for key, value in (last or {}).items())]
        self._commands.run(f"training {name}", "train", self.name, *words)
        return run

    @property
    def _shape(self) -> dict[str, Any]:
        """Of a native model all of it; of one of transformers its sizes."""
        if isinstance(self._model, HFModelConfig):
            return {key: getattr(self._model, key) for key in _SIZES}
        return self._model.model_dump(exclude={"vocab_size", "dropout"})

    def _loss(self, model: str, data: Path | None = None, split: str = "train") -> float:
        """Of the test examples, or of another dataset."""
        place = data or self.folder / "test"
        label = "loss on general text" if data else "held-out loss"
        told = self._commands.json(label, "evaluate", model, "--data", place, "--split", split, "--json")
        return float(told["loss"])

    def _measure(self, way: str, model: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(kind of question, its numbers)."""
        of, tokenizer = application(self.name), Tokenizer.load(self._location.tokenizer)
        common: list[Any] = ["--json", *(("--samples", self.samples) if self.samples else ())]
        common += [] if tokenizer.chat_template else ["--chat-template", "chatml"]
        for kind, numbers in self._summary["kinds"].items():
            if not numbers["questions"]:
                continue
            path, output = self._data / f"test-{kind}.jsonl", ("--output", said_file(self.folder, way, kind))
            label = f"{kind}: what {way} says"
            if kind in of.CHOSEN:  # a choice is made once, not for each piece of an input
                lead_only = "refuse" if self.long_input == "refuse" else "lead"
                asked = ("--choices", path, "--long-input", lead_only)
            else:
                room = self.max_new_tokens or max(1, min(numbers["answer_tokens"], self._length // 2))
                asked = ("--answers", path, "--max-new-tokens", room, "--long-input", self.long_input)
            yield kind, self._commands.json(label, "evaluate", model, *asked, *output, *common)

    def _baselines(self, kind: str, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What needs no training: chance and the most frequent class or answer; the first sentences of an article."""
        if kind in application(self.name).CHOSEN:
            known = {
                "by chance": {"accuracy": found["chance"]},
                "most frequent": {"accuracy": found["majority"], "macro_f1": found["majority_macro_f1"]},
            }
            return {  # the same however one chooses
                name: {f"{metric}{by}": {"value": value} for metric, value in numbers.items() for by in ("", "_pmi")}
                for name, numbers in known.items()
            }
        questions = read_questions(self._data / f"test-{kind}.jsonl", self.samples)
        frequent = self._summary["kinds"][kind].get("most_frequent_answer", "")
        answers = {"most frequent": [frequent] * len(questions)}
        if self.name == "news":
            answers["lead-3"] = [lead(one.input) for one in questions]
        groups, references = groups_of(questions), [one.references for one in questions]
        return {
            name: {metric: vars(mean(values, groups)) for metric, values in score(references, said).items()}
            for name, said in answers.items()
        }

    def _cost(self, run: Path) -> dict[str, Any]:
        metrics = [entry for entry in read_metrics(run / "metrics.jsonl") if "tokens_per_second" in entry]
        counts = next((event for event in _events(run) if event.get("event") == "trained_parameters"), {})
        shapes = model_shapes(read_model_config(find_model(str(run))))[0].values()
        return {
            "trained": counts.get("trained", sum(map(math.prod, shapes))),  # from scratch there is no such event
            "frozen": counts.get("frozen", 0),
            "steps": metrics[-1]["step"],
            "tokens": metrics[-1]["consumed_tokens"],
            "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in metrics[1:] or metrics),
            "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in metrics),
        }

    # ---- how many blocks -----------------------------------------------------------------------------------------

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """1, 2, half of the blocks, all."""
        blocks = self._model.num_hidden_layers
        return tuple(sorted({1, min(2, blocks), max(1, blocks // 2), blocks}))

    def _cells(self, ways: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """("N of SHARE", held-out loss) of every number of last blocks at every share of the data."""
        usual = WAYS["last_blocks"]
        for share, data in SHARES.items():
            for number in self.numbers:
                name = f"last-{number}-of-{data}"
                record = self.folder / f"{name}.json"
                if data == "data" and number == self.last_blocks:
                    self._record(record, {"loss": ways["last_blocks"]["loss"]})
                elif not record.exists():
                    changes = {**usual, "fine_tuning.num_last_blocks": number, **self._rate}
                    self._record(record, {"loss": self._loss(str(self._train(name, data, changes)))})
                yield f"{number} of {share}", float(json.loads(record.read_text("utf-8"))["loss"])

    @property
    def _rate(self) -> dict[str, float]:
        return {"optimizer.learning_rate": self.rates["last_blocks"]} if "last_blocks" in self.rates else {}

    def _chosen(self, share: str) -> int:
        """What `num_last_blocks: auto` measures on this share of the data: one step of training tells."""
        changes = {**WAYS["last_blocks"], "fine_tuning.num_last_blocks": "auto", **self._rate}
        one_step = {"training.max_steps": 1, "training.num_epochs": None, "optimizer.warmup_steps": 0}
        if self.general is not None:
            sets = {"domain": self.folder / "validation", "general": self.general}
            changes["data.validation"] = [{"name": key, "path": str(path)} for key, path in sets.items()]
        name = f"auto-of-{SHARES[share]}"
        run = self.folder / name
        if not any("num_last_blocks" in event for event in _events(run)):
            self._train(name, SHARES[share], changes, one_step)
        return next(int(event["num_last_blocks"]) for event in _events(run) if "num_last_blocks" in event)


def _word(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def _events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


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
