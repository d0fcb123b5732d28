"""One rank of the peer: transformers.Trainer with DeepSpeed on prepared token ids, as its documentation shows it.

    python -m tests.benchmarks._peer_trainer job.json       (RANK, WORLD_SIZE, ... in the environment)

The job holds `model` (a Hugging Face folder), `samples` (.npy, int64, (samples, T + 1), in the order of the run),
`arguments` of TrainingArguments and `output`, where rank 0 writes one line a step: time and loss. Nothing of dsgpt is
used. The labels are given already shifted, which Trainer supports, so that every position of a block is a target.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Samples(torch.utils.data.Dataset):
    """Blocks of T + 1 tokens; they are mapped, not read."""

    def __init__(self, path: str):
        self.blocks = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.blocks[index].copy())
        return {"input_ids": block[:-1], "labels": block[1:], "shift_labels": block[1:]}


class Clock(TrainerCallback):
    """The time at which each step was logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.lines.append({"step": state.global_step, "time": time.time(), "loss": logs["loss"]})


def begin(path: str) -> tuple[dict[str, Any], TrainingArguments, Any]:
    """The job, its arguments, and the model, with DeepSpeed started on this rank."""
    # Its shared-memory collectives would be compiled for a minute at the first start; training does not use them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    job = json.loads(Path(path).read_text("utf-8"))
    # On a machine without a GPU, TrainingArguments leaves this out, and loading a model for ZeRO-3 fails.
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    arguments = TrainingArguments(**job["arguments"])
    return job, arguments, AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)


def main(path: str) -> None:
    job, arguments, model = begin(path)
    clock = Clock()
    Trainer(model, arguments, train_dataset=Samples(job["samples"]), callbacks=[clock]).train()
    if arguments.process_index == 0:
        Path(job["output"]).write_text("".join(json.dumps(line) + "\n" for line in clock.lines), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
