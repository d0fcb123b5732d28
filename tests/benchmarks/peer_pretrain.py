"""Tokens/s and peak memory of dsgpt against transformers.Trainer with DeepSpeed, ZeRO 1 to 3 on two CPU ranks (14 minutes).

Both train the same Llama shape (9M parameters, fp32) from the same weights on the same samples in the same order, with
the same AdamW of torch, clipping and learning rate, and log every step; nothing is compiled for DeepSpeed. dsgpt runs as
`python -m dsgpt.train` with its shipped DeepSpeed configs. The peer runs twice:

    default  TrainingArguments' defaults and the DeepSpeed JSON of its documentation, without offload
    best     what of its documented options helps here: torch_compile (needs a C++ compiler at run time), no filter of
             non-finite losses, and at ZeRO 3 larger buckets than "auto" derives from so narrow a model. Liger kernels
             need a GPU; data loader workers take more from two cores than they give; checkpointing is slower.

Compared is the better peer of a round, in speed and in memory each on its own; rounds alternate. A rank's tokens/s come
from its median step after the warm-up, so start, compilation and dsgpt's final save do not count. Its memory is the
largest resident size over its whole life, all of that included. Documents are packed without a mask, as the peer does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.benchmarks._ranks import NUM_RANKS, peak_of, run_ranks
from tests.frame import Outcome, Row

STAGES = (1, 2, 3)
STEPS, WARMUP_STEPS = 20, 4
SEQ_LENGTH, MICRO_BATCH, VOCAB_SIZE = 256, 8, 8192
GLOBAL_BATCH = MICRO_BATCH * NUM_RANKS
LEARNING_RATE, BETA2, WEIGHT_DECAY = 1e-3, 0.95, 0.1
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 704,
    "tie_word_embeddings": False,
}
SAME_LOSS = 1e-3

# From the guide "DeepSpeed" of transformers, without its offload sections.
ZERO_OF_THE_DOCS: dict[int, dict[str, Any]] = {
    1: {"stage": 1},
    2: {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    },
    3: {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
_BEST_ZERO: dict[int, dict[str, Any]] = {
    1: {},
    2: {},
    3: {"reduce_bucket_size": 2_000_000, "stage3_prefetch_bucket_size": 2_000_000},
}
_BEST_ARGUMENTS = {"torch_compile": True, "logging_nan_inf_filter": False}


@dataclass(frozen=True)
class Measured:
    """One training: tokens/s of all ranks together, peak resident bytes of the largest rank, the loss of each step."""

    tokens_per_second: float
    peak_bytes: int
    losses: list[float]

    @staticmethod
    def of(steps: list[dict[str, Any]], peaks: list[int]) -> Measured:
        """`steps` are logged lines with "time" (seconds) and "loss", one a step."""
        if len(steps) != STEPS:
            raise RuntimeError(f"{len(steps)} steps were logged, not {STEPS}")
        seconds = np.diff([step["time"] for step in steps])[WARMUP_STEPS - 1 :]
        rate = GLOBAL_BATCH * SEQ_LENGTH / float(np.median(seconds))
        return Measured(rate, max(peaks), [step["loss"] for step in steps])


def run(trials: int | None, seed: int) -> Outcome:
    """Two rounds of dsgpt, default peer, best peer at every stage unless `trials` says otherwise."""
    rounds = trials or 2
    sides: dict[str, Callable[[Path, int, int], Measured]] = {"dsgpt": _train_dsgpt, "default": _train_default}
    if _has_compiler():
        sides["best"] = _train_best
    else:
        print("no C++ compiler here: the peer's best mode is left out")
    rows = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dsgpt-peer-") as name:
        folder = Path(name)
        # In a process of its own: what this one holds would count as every rank's.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(_prepare, folder, seed).result()
        for stage in STAGES:
            found: dict[str, list[Measured]] = {side: [] for side in sides}
            for _ in range(rounds):
                for side, train in sides.items():
                    one = train(folder, stage, seed)
                    found[side].append(one)
                    print(
                        f"ZeRO {stage} {side:8} {one.tokens_per_second:6.0f} tokens/s {_mib(one.peak_bytes):5.0f} MiB"
                    )
            _print_losses(stage, found)
            rows += _rows(stage, found)
        rows += _import_rows(folder)
    rows.append(Row("load average before", load, note=f"{os.cpu_count()} CPUs; others at work blur every figure"))
    return Outcome(rows, rounds)


# ---- what both train on ----------------------------------------------------------------------------------------------


def _prepare(folder: Path, seed: int) -> None:
    """`data` (for dsgpt), `samples.npy` (the same blocks in the run's order, for the peer) and `model` (for both)."""
    from dsgpt.data.dataset import BlockDataset, SampleOrder
    from dsgpt.data.prepare import prepare
    from dsgpt.quickstart.corpus import build_corpus
    from dsgpt.tokenizer.training import train_on_texts

    corpus = build_corpus(folder / "corpus").heldout
    texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    train_on_texts(texts, VOCAB_SIZE, folder / "tokenizer", "hf-bpe", {})
    prepare([corpus], folder / "tokenizer", folder / "data", workers=1)
    dataset = BlockDataset(folder / "data", "train", SEQ_LENGTH, document_mask=False)
    order = SampleOrder(dataset.num_samples, seed, dataset.manifest.fingerprint)
    blocks = [dataset[int(i)] for i in order.sample_ids(0, STEPS * GLOBAL_BATCH)]
    np.save(folder / "samples.npy", np.stack([np.append(block.input_ids, block.labels[-1]) for block in blocks]))
    write_model(folder / "model", seed, SEQ_LENGTH)


def write_model(folder: Path, seed: int, seq_length: int) -> None:
    import torch
    from safetensors.torch import save_file

    from dsgpt.config.model import ModelSection
    from dsgpt.model.gpt import GPT
    from dsgpt.model.hf_format import hf_config, to_hf

    config = ModelSection(**SHAPE).resolved(VOCAB_SIZE, seq_length)
    torch.manual_seed(seed)
    weights = GPT(config).state_dict()
    folder.mkdir()
    save_file(dict(to_hf(config, weights.__getitem__)), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(config, None, None)), encoding="utf-8")


# ---- the three sides -------------------------------------------------------------------------------------------------


def _train_dsgpt(folder: Path, stage: int, seed: int) -> Measured:
    output = folder / "dsgpt"
    shutil.rmtree(output, ignore_errors=True)
    config = {
        "run": {"output_dir": str(output), "seed": seed},
        "device": "cpu",
        "model": {"init_from": f"hf:{folder / 'model'}"},
        "data": {"train": [{"path": str(folder / "data")}], "document_mask": False},
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "lr_schedule": "constant",
            "betas": [0.9, BETA2],
            "weight_decay": WEIGHT_DECAY,
        },
        "training": {
            "seq_length": SEQ_LENGTH,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size_per_gpu": MICRO_BATCH,
            "max_steps": STEPS,
            "dtype": "fp32",
        },
        "deepspeed": f"zero{stage}",
        "logging": {"log_interval": 1},
    }
    (folder / "dsgpt.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    peaks = run_ranks(["-m", "dsgpt.train", str(folder / "dsgpt.yaml")], folder / "dsgpt.log")
    return Measured.of(_lines(output / "metrics.jsonl"), peaks)


def _train_default(folder: Path, stage: int, seed: int) -> Measured:
    return _train_peer(folder, ZERO_OF_THE_DOCS[stage], seed, {})


def _train_best(folder: Path, stage: int, seed: int) -> Measured:
    return _train_peer(folder, {**ZERO_OF_THE_DOCS[stage], **_BEST_ZERO[stage]}, seed, _BEST_ARGUMENTS)


def peer_arguments(zero: dict[str, Any], seed: int, **others: Any) -> dict[str, Any]:
    """TrainingArguments of a peer on CPUs: the optimizer and schedule of both sides; `others` go before."""
    owned_by_trainer = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    common = {
        "use_cpu": True,
        "seed": seed,
        "deepspeed": {
            "zero_optimization": zero,
            "gradient_clipping": "auto",
            **dict.fromkeys(owned_by_trainer, "auto"),
        },
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta2": BETA2,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 1.0,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    return common | others


def _train_peer(folder: Path, zero: dict[str, Any], seed: int, arguments: dict[str, Any]) -> Measured:
    own = {
        "output_dir": str(folder / "peer"),
        "per_device_train_batch_size": MICRO_BATCH,
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
    }
    job = {
        "model": str(folder / "model"),
        "samples": str(folder / "samples.npy"),
        "output": str(folder / "peer.jsonl"),
        "arguments": peer_arguments(zero, seed, **own, **arguments),
    }
    (folder / "peer.json").write_text(json.dumps(job), encoding="utf-8")
    peaks = run_ranks(["-m", "tests.benchmarks._peer_trainer", str(folder / "peer.json")], folder / "peer.log")
    return Measured.of(_lines(folder / "peer.jsonl"), peaks)


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


# ---- what was found --------------------------------------------------------------------------------------------------


def _rows(stage: int, found: dict[str, list[Measured]]) -> list[Row]:
    """The two musts of a stage and their context: each side's own figures, and that the losses are the same."""
    peers = {side: runs for side, runs in found.items() if side != "dsgpt"}
    rounds = range(len(found["dsgpt"]))
    rates = [
        found["dsgpt"][i].tokens_per_second / max(runs[i].tokens_per_second for runs in peers.values()) for i in rounds
    ]
    memories = [found["dsgpt"][i].peak_bytes / min(runs[i].peak_bytes for runs in peers.values()) for i in rounds]
    speeds = {side: statistics.median(one.tokens_per_second for one in runs) for side, runs in found.items()}
    peaks = {side: statistics.median(_mib(one.peak_bytes) for one in runs) for side, runs in found.items()}
    name = f"ZeRO {stage}"
    return [
        Row(f"{name}: tokens/s over the better peer", _median(rates), at_least=1.0, note=_note(rates, speeds)),
        Row(f"{name}: memory over the smaller peer", _median(memories), at_most=0.9, note=_note(memories, peaks)),
        Row(f"{name}: largest difference of a loss", _loss_difference(found), at_most=SAME_LOSS, note="relative"),
    ]


def _median(ratios: list[float]) -> float:
    return round(statistics.median(ratios), 4)


def _note(ratios: list[float], medians: dict[str, float]) -> str:
    sides = ", ".join(f"{side} {value:.0f}" for side, value in medians.items())
    return f"{min(ratios):.3f} to {max(ratios):.3f}; medians: {sides}"


def _loss_difference(found: dict[str, list[Measured]]) -> float:
    expected = found["dsgpt"][0].losses
    curves = [one.losses for runs in found.values() for one in runs]
    worst = max(abs(a - b) / abs(b) for losses in curves for a, b in zip(losses, expected, strict=True))
    return worst if math.isfinite(worst) else math.inf


def _print_losses(stage: int, found: dict[str, list[Measured]]) -> None:
    shown = sorted({1, *range(STEPS // 5, STEPS + 1, STEPS // 5)})
    print(f"ZeRO {stage} loss at step  " + "".join(f"{step:>10}" for step in shown))
    for side, runs in found.items():
        print(f"  {side:20} " + "".join(f"{runs[0].losses[step - 1]:10.5f}" for step in shown), flush=True)


def _import_rows(folder: Path) -> list[Row]:
    """What a rank holds before it has done anything: part of every peak above."""
    modules = {"dsgpt": "dsgpt.train.loop", "peer": "tests.benchmarks._peer_trainer"}
    log = folder / "imports.log"
    return [
        Row(f"resident after imports, {side}", round(_mib(peak_of(["-c", f"import {module}"], log)), 1), "MiB")
        for side, module in modules.items()
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _mib(size: int) -> float:
    return size / 2**20
