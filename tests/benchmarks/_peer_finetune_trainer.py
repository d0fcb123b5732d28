"""One rank of the peer: transformers.Trainer with DeepSpeed on conversations, as its documentation shows it.

    python -m tests.benchmarks._peer_finetune_trainer job.json       (RANK, WORLD_SIZE, ... in the environment)

The job holds `model` and `tokenizer` (Hugging Face folders), `conversations` (.npz: ids, labels, edges), `collator` (padded
or flattened), `arguments` of TrainingArguments, and `output`, where the model is saved and each rank writes the time at
the end of each step and the tokens that its batch held, padding not counted. Nothing of dsgpt is used.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
)

from tests.benchmarks._peer_trainer import begin


class Conversations(torch.utils.data.Dataset):
    """Each with its own length; labels are -100 where nothing is learned."""

    def __init__(self, path: str):
        with np.load(path) as arrays:
            self.ids, self.labels, self.edges = arrays["ids"], arrays["labels"], arrays["edges"]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        here = slice(self.edges[index], self.edges[index + 1])
        return {"input_ids": self.ids[here].tolist(), "labels": self.labels[here].tolist()}


class Counting:
    """A collator that remembers how many tokens each batch has."""

    def __init__(self, collator: Callable[..., Any]):
        self.collator = collator
        self.tokens: list[int] = []

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        self.tokens.append(sum(len(one["input_ids"]) for one in features))
        return self.collator(features)


class Clock(TrainerCallback):
    """The time at which each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.time())


def main(path: str) -> None:
    job, arguments, model = begin(path)
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collator = DataCollatorWithFlattening() if job["collator"] == "flattened" else DataCollatorForSeq2Seq(tokenizer)
    counting, clock = Counting(collator), Clock()
    data = Conversations(job["conversations"])
    trainer = Trainer(model, arguments, data_collator=counting, train_dataset=data, callbacks=[clock])
    trainer.train()
    trainer.save_model(job["output"])
    lines = [{"time": at, "tokens": tokens} for at, tokens in zip(clock.times, counting.tokens, strict=False)]
    (Path(job["output"]) / f"steps-{arguments.process_index}.json").write_text(json.dumps(lines), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
