"""Fine-tuning on conversations against transformers.Trainer with DeepSpeed: tokens/s, memory, held-out loss (25 minutes).

Both train the same Hugging Face folder, a Llama of random weights in which the output head has the share of the
arithmetic that it has in small pretrained models (30 %), in fp32 with ZeRO 2 on two CPU ranks, from the same conversations:
the peer is given the ids of dsgpt's prepared data, with -100 for what is not learned from. Same longest conversation, same
AdamW, clipping and constant learning rate, nothing compiled. The peer takes 8 conversations a rank and step, the default of
TrainingArguments; dsgpt as many packed rows as come nearest to their tokens. Both pass all conversations once.

    dialogues   customers and agents (SGD, ABCD)
    mixed       a twelfth of these, of frequent questions with answers (DSTC9), and of articles with summaries (CNN, XSum)

    default     the peer's padded batches of conversations in random order
    grouped     its train_sampling_strategy="group_by_length", also padded
    balanced    "batch_rebalance", also padded
    flattened   its DataCollatorWithFlattening: no padding, but one mask over all; a few steps, as it is slow on a CPU
    dsgpt       the native GPT, which model.implementation "auto" takes for this folder
    dsgpt-hf    the model of transformers, trained by dsgpt

Sides alternate, each with a seed of its own for the order. Real tokens are those that are no padding; the first steps, the
evaluation and saving do not count. Where others are at work on the machine, the same in seconds of processor time tells
more. Memory is the largest anonymous resident size of a rank, sampled over its life. The held-out loss is transformers' own
of each result; the spread of the peer's results in random order (default and balanced are the same mathematics) is its
noise. All data lies beside the clone (../shared/data).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.benchmarks import _chats
from tests.benchmarks._ranks import NUM_RANKS, Watch, run_ranks
from tests.benchmarks.peer_pretrain import (
    BETA2,
    LEARNING_RATE,
    VOCAB_SIZE,
    WEIGHT_DECAY,
    ZERO_OF_THE_DOCS,
    peer_arguments,
    write_model,
)
from tests.frame import Outcome, Row

SEQ_LENGTH, CONVERSATIONS_PER_RANK, WARMUP_STEPS = 1024, 8, 2
MUSTS = {"dialogues": 1.6, "mixed": 2.2}
EVERY = 12  # of the mixture one conversation in so many
PEERS: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "balanced": {"train_sampling_strategy": "batch_rebalance"},
    "flattened": {},
}
OURS = {"dsgpt": "auto", "dsgpt-hf": "transformers"}
SAME_MATHEMATICS = ("default", "balanced")
FLATTENED_STEPS = 4


@dataclass(frozen=True)
class Measured:
    """One training: real tokens/s of all ranks, and of each processor; peak bytes of the largest rank; held-out loss."""

    tokens_per_second: float
    tokens_per_processor: float
    peak_bytes: int
    loss: float
    tokens: int

    @staticmethod
    def of(times: list[float], tokens: list[int], watch: Watch, loss: float) -> Measured:
        """`times` of the end of each step, `tokens` of each."""
        if len(times) != len(tokens):
            raise RuntimeError(f"{len(times)} steps were timed, not {len(tokens)}")
        start, stop, counted = times[WARMUP_STEPS - 1], times[-1], sum(tokens[WARMUP_STEPS:])
        processor = counted / watch.processor_seconds(start, stop)
        return Measured(counted / (stop - start), processor, watch.anonymous, loss, sum(tokens))


def run(trials: int | None, seed: int) -> Outcome:
    """Two rounds of all sides on both sets unless `trials` says otherwise."""
    if not _chats.SHARED.is_dir():
        print(f"{_chats.SHARED} is absent: nothing is measured")
        return Outcome([], 0)
    rounds = trials or 2
    load = os.getloadavg()[0]
    found: dict[str, dict[str, list[Measured]]] = {kind: {} for kind in MUSTS}
    with tempfile.TemporaryDirectory(prefix="dsgpt-peer-") as name:
        folder = Path(name)
        # In a process of its own: a rank starts with what this one holds.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            pool.submit(_prepare, folder, seed).result()
            sides = [(kind, place, side) for kind in MUSTS for place, side in enumerate((*PEERS, *OURS))]
            for number in range(rounds):
                for kind, place, side in sides:
                    one = _train(folder, kind, side, seed + 100 * place + number, pool)
                    found[kind].setdefault(side, []).append(one)
                    print(
                        f"{kind:9} {side:9} {one.tokens_per_second:6.0f} tokens/s ({one.tokens_per_processor:.0f} a "
                        f"processor) {one.peak_bytes / 2**20:5.0f} MiB loss {one.loss:.4f} after {one.tokens:,} tokens, "
                        f"load {os.getloadavg()[0]:.0f}",
                        flush=True,
                    )
    rows = [row for kind in MUSTS for row in _rows(kind, found[kind])]
    rows.append(Row("load average before", load, note=f"{os.cpu_count()} CPUs; others at work blur every figure"))
    return Outcome(rows, rounds)


# ---- what both train on ----------------------------------------------------------------------------------------------


def _prepare(folder: Path, seed: int) -> None:
    """`model` and `tokenizer`; of each set `data` (for dsgpt), the same as `train.npz` (for the peer), `heldout.npz`."""
    from dsgpt.data.chat import ChatChoices, prepare_chat
    from dsgpt.data.packing import open_chat
    from dsgpt.tokenizer.training import train_on_texts

    dialogues = [_messages(one["conversations"], "from", "value") for one in _chats.support_dialogues()]
    pairs = [
        [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["completion"]}]
        for one in _chats.summaries() + _chats.questions()
    ]
    texts = [message["content"] for messages in dialogues + pairs for message in messages]
    train_on_texts(texts, VOCAB_SIZE, folder / "tokenizer", "hf-bpe", {})
    write_model(folder / "model", seed, SEQ_LENGTH)
    for kind, conversations in {"dialogues": dialogues, "mixed": (dialogues + pairs)[::EVERY]}.items():
        place = folder / kind
        place.mkdir()
        lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
        (place / "chats.jsonl").write_text(lines, "utf-8")
        choices = ChatChoices(format="messages", seq_length=SEQ_LENGTH, validation=0.1)
        prepare_chat([place / "chats.jsonl"], folder / "tokenizer", place / "data", choices)
        for split, name in (("train", "train.npz"), ("validation", "heldout.npz")):
            samples = open_chat(place / "data", split, SEQ_LENGTH)
            numbers = range(len(samples.edges) - 1)
            pieces = [slice(int(samples.edges[i]), int(samples.edges[i + 1])) for i in numbers]
            ids = np.concatenate([samples.ids[piece] for piece in pieces]).astype(np.int64)
            learned = np.concatenate([samples.trained[piece] for piece in pieces]).astype(bool)
            np.savez(place / name, ids=ids, labels=np.where(learned, ids, -100), edges=samples.edges)


def _messages(turns: list[dict[str, str]], who: str, text: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if turn[who] == "gpt" else "user", "content": turn[text]} for turn in turns]


def _rows_per_step(place: Path) -> int:
    """Packed rows nearest in tokens to the peer's conversations of a step; a multiple of the ranks."""
    with np.load(place / "train.npz") as arrays:
        mean = arrays["edges"][-1] / (len(arrays["edges"]) - 1)
    return max(1, round(CONVERSATIONS_PER_RANK * mean / SEQ_LENGTH)) * NUM_RANKS


def _tokens_of_steps(place: Path, seed: int, steps: int, rows: int) -> list[int]:
    """Real tokens of each of dsgpt's steps: what of the rows in the run's order is no padding."""
    from dsgpt.data.dataset import SampleOrder
    from dsgpt.data.packing import open_chat

    samples = open_chat(place / "data", "train", SEQ_LENGTH)
    order = SampleOrder(samples.num_samples, seed, samples.fingerprint).sample_ids(0, steps * rows)
    real = [int((samples[int(i)].document_ids >= 0).sum()) for i in order]
    return [sum(real[start : start + rows]) for start in range(0, len(real), rows)]


def _num_rows(place: Path) -> int:
    from dsgpt.data.packing import open_chat

    return open_chat(place / "data", "train", SEQ_LENGTH).num_samples


# ---- the sides -------------------------------------------------------------------------------------------------------


def _train(folder: Path, kind: str, side: str, seed: int, pool: ProcessPoolExecutor) -> Measured:
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    if side in PEERS:
        return _train_peer(folder, kind, side, seed, pool)
    place, log = folder / kind, folder / "dsgpt.log"
    rows = _rows_per_step(place)
    steps = round(pool.submit(_num_rows, place).result() / rows)
    config = {
        "run": {"output_dir": str(output), "seed": seed},
        "device": "cpu",
        "model": {"init_from": f"hf:{folder / 'model'}", "implementation": OURS[side]},
        "data": {"train": [{"path": str(place / "data")}]},
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "lr_schedule": "constant",
            "betas": [0.9, BETA2],
            "weight_decay": WEIGHT_DECAY,
        },
        "training": {
            "seq_length": SEQ_LENGTH,
            "global_batch_size": rows,
            "micro_batch_size_per_gpu": rows // NUM_RANKS,
            "max_steps": steps,
            "dtype": "fp32",
        },
        "deepspeed": "zero2",
        "logging": {"log_interval": 1},
    }
    (folder / "dsgpt.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    watch = Watch()
    run_ranks(["-m", "dsgpt.train", str(folder / "dsgpt.yaml")], log, watch)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = [line["time"] for line in lines if "loss" in line]
    tokens = pool.submit(_tokens_of_steps, place, seed, steps, rows).result()
    pool.submit(_export, output, output / "export").result()
    loss = pool.submit(_heldout_loss, output / "export", place / "heldout.npz").result()
    return Measured.of(times, tokens, watch, loss)


def _export(run_folder: Path, output: Path) -> None:
    from dsgpt.checkpoint.export import export_checkpoint
    from dsgpt.checkpoint.weights import find_model

    export_checkpoint(find_model(str(run_folder)), output, check=False)


def _train_peer(folder: Path, kind: str, side: str, seed: int, pool: ProcessPoolExecutor) -> Measured:
    output = folder / "run"
    own = {
        "output_dir": str(output),
        "per_device_train_batch_size": CONVERSATIONS_PER_RANK,
        "num_train_epochs": 1,
        "max_steps": FLATTENED_STEPS if side == "flattened" else -1,
    }
    job = {
        "model": str(folder / "model"),
        "tokenizer": str(folder / "tokenizer"),
        "conversations": str(folder / kind / "train.npz"),
        "collator": "flattened" if side == "flattened" else "padded",
        "output": str(output),
        "arguments": peer_arguments(ZERO_OF_THE_DOCS[2], seed, **own, **PEERS[side]),
    }
    (folder / "peer.json").write_text(json.dumps(job), encoding="utf-8")
    module = "tests.benchmarks._peer_finetune_trainer"
    watch = Watch()
    run_ranks(["-m", module, str(folder / "peer.json")], folder / "peer.log", watch)
    ranks = [json.loads((output / f"steps-{rank}.json").read_text("utf-8")) for rank in range(NUM_RANKS)]
    tokens = [sum(line["tokens"] for line in lines) for lines in zip(*ranks, strict=True)]
    loss = pool.submit(_heldout_loss, output, folder / kind / "heldout.npz").result()
    return Measured.of([line["time"] for line in ranks[0]], tokens, watch, loss)


def _heldout_loss(model_folder: Path, conversations: Path) -> float:
    """Nats per target, by transformers, each conversation alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with np.load(conversations) as arrays, torch.no_grad():
        ids, labels = torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["labels"])
        edges = arrays["edges"].tolist()
    for start, stop in itertools.pairwise(edges):
        with torch.no_grad():
            logits = model(ids[None, start:stop]).logits[0, :-1]
        targets = labels[start + 1 : stop]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets != -100).sum())
    return total / count


# ---- what was found --------------------------------------------------------------------------------------------------


def _rows(kind: str, found: dict[str, list[Measured]]) -> list[Row]:
    """The four musts of a set; as context the same in processor time, and of transformers' model under dsgpt."""

    def over(side: str, peers: Iterable[str], value: Callable[[Measured], float], best: Any = max) -> tuple[float, str]:
        """Median of the rounds, and their spread, of a side's value over the best of the peers'."""
        rivals = [best(value(one) for one in runs) for runs in zip(*(found[peer] for peer in peers), strict=True)]
        each = [value(one) / rival for one, rival in zip(found[side], rivals, strict=True)]
        return round(statistics.median(each), 3), f"{min(each):.2f} to {max(each):.2f}"

    speed, processor, size = (
        attrgetter("tokens_per_second"),
        attrgetter("tokens_per_processor"),
        attrgetter("peak_bytes"),
    )
    documented = [peer for peer in PEERS if peer != "default"]
    ratios: list[tuple[str, Any, dict[str, float]]] = [
        ("real tokens/s over default", (["default"], speed), {"at_least": MUSTS[kind]}),
        ("real tokens/s over the best other mode", (documented, speed), {"at_least": 1.05}),
        ("tokens per processor second over default", (["default"], processor), {}),
        ("tokens per processor second over the best other mode", (documented, processor), {}),
        ("peak memory over default", (["default"], size), {"at_most": 0.8}),
        ("peak memory over the smallest mode", (PEERS, size, min), {}),
    ]
    rows = []
    for side in OURS:
        for label, to, must in ratios:
            ratio, spread = over(side, *to)
            # A must is of what users get unless they ask for the other.
            rows.append(Row(f"{kind}: {side}, {label}", ratio, "x", **(must if side == "dsgpt" else {}), note=spread))
    for label, value in (("tokens/s", speed), ("tokens per processor second", processor), ("MiB", size)):
        unit = 2**20 if value is size else 1
        medians = {side: statistics.median(map(value, runs)) / unit for side, runs in found.items()}
        print(f"{kind}, medians, {label}: " + ", ".join(f"{side} {median:.0f}" for side, median in medians.items()))
    theirs = [one.loss for side in SAME_MATHEMATICS for one in found[side]]
    ours = [one.loss for side in OURS for one in found[side]]
    difference, noise = statistics.median(ours) - statistics.median(theirs), max(theirs) - min(theirs)
    note = f"their own spread is the must; ours {min(ours):.4f} to {max(ours):.4f}, theirs {min(theirs):.4f} to "
    note += f"{max(theirs):.4f}"
    return [*rows, Row(f"{kind}: held-out loss less theirs", difference, "nats", at_most=noise, note=note)]
