"""Layer norm, RMS norm and batch norm on the same job: the quickstart's model and text, 400 steps each (5 minutes).

What is measured is what a choice costs: bits per byte on text of packages that were held out, and how far the training
loss is from the held-out loss of the same model, both in nats per token. Batch norm depends on how many tokens a
micro-step has, here 4096. `--trials N` averages N seeds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsgpt.quickstart.corpus import build_corpus
from tests.frame import Outcome, Row

DSGPT = [sys.executable, "-m", "dsgpt"]
VOCAB_SIZE = 2048
LAST_STEPS = 50
NORMS = ("layernorm", "rmsnorm", "batchnorm")
MICRO_BATCH = 8


def run(trials: int | None, seed: int) -> Outcome:
    """One seed for each case unless `trials` says otherwise."""
    seeds = [seed + number for number in range(trials or 1)]
    with tempfile.TemporaryDirectory(prefix="dsgpt-norms-") as name:
        folder = Path(name)
        prepare_data(folder)
        rows = []
        for norm in NORMS:
            found = [_train(folder, norm, number) for number in seeds]
            mean = {key: statistics.mean(one[key] for one in found) for key in found[0]}
            note = (
                f"train {mean['train_loss']:.3f}, held out {mean['heldout_loss']:.3f} nats per token; "
                f"{mean['tokens_per_second'] / 1000:.1f}k tokens/s"
            )
            rows.append(Row(norm, mean["bits_per_byte"], "bits per byte", note=note))
    return Outcome(rows, len(seeds))


def dsgpt(*arguments: Any) -> None:
    subprocess.run([*DSGPT, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def prepare_data(folder: Path) -> None:
    corpus = build_corpus(folder / "corpus")
    tokenizer = folder / "tokenizer"
    dsgpt("tokenizer", "train", corpus.train, "--vocab-size", VOCAB_SIZE, "--output", tokenizer)
    for name, text in (("data", corpus.train), ("heldout", corpus.heldout)):
        dsgpt("data", "prepare", text, "--tokenizer", tokenizer, "--output", folder / name)


def _train(folder: Path, norm: str, seed: int) -> dict[str, float]:
    output = folder / f"{norm}-{seed}"
    settings = {
        "run.output_dir": output,
        "run.seed": seed,
        "data.train.0.path": folder / "data",
        "data.validation": json.dumps([{"path": str(folder / "heldout")}]),
        "model.norm": norm,
        "training.micro_batch_size_per_gpu": MICRO_BATCH,
        "device": "cpu",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    dsgpt("train", "quickstart", *overrides, "--num-processes", 2)
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    evaluation = [event for event in events if event["event"] == "evaluation"][-1]
    last = metrics[-1]["step"] - LAST_STEPS
    return {
        "train_loss": statistics.mean(line["loss"] for line in metrics if line["step"] > last),
        "heldout_loss": evaluation["loss"],
        "bits_per_byte": evaluation["bits_per_byte"],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in metrics[1:]),
    }
