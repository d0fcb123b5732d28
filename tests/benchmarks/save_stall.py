"""Asynchronous against synchronous saving of 25 M parameters: the stall, what training loses meanwhile, time to commit.

One rank with one thread, ZeRO 0, so that on two cores the writer process has one, as a node has more cores than GPUs. Runs of
40 steps with two saves, alternating: without saves, synchronous, asynchronous. Steps are short against a save, as a large
model's are: a commit waits for the end of a step. The stall is all time in the saver's calls,
the commit's among them. The state's memory is touched once before (the first asynchronous save pays for new pages).
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsgpt.distributed import World
from tests.frame import Outcome, Row
from tests.pool import close_all, ranks

STEPS, SAVES = 40, (4, 24)
MODEL = {
    "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 2048, "vocab_size": 8192, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
BATCH, LENGTH = 1, 16


@dataclass
class Measured:
    """Seconds: each step, in the saver at each save, from begin to commit; of steps begun while the writer worked."""

    steps: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    whole: float = 0.0


def run(trials: int | None, seed: int) -> Outcome:
    """Five rounds unless `trials` says otherwise."""
    trials = trials or 5
    with tempfile.TemporaryDirectory(prefix="dsgpt-stall-") as name:
        try:
            ((parameters, told),) = ranks(1).run(measure, Path(name), trials, timeout=1200)
        finally:
            close_all()
    none, front, back = ([one[mode] for one in told] for mode in range(3))
    stall = [
        a / b for one, other in zip(back, front, strict=True) for a, b in zip(one.stalls, other.stalls, strict=True)
    ]
    plain = statistics.median(s for one in none for s in one.steps)
    beside = [s for one in back for s in one.beside]
    after = [_twenty(one) - _twenty(other) for one, other in zip(back, none, strict=True)]
    commits = [statistics.mean(b.commits) / statistics.mean(f.commits) for b, f in zip(back, front, strict=True)]
    whole = [b.whole / f.whole for b, f in zip(back, front, strict=True)]
    seconds = f"{_spread([s for one in back for s in one.stalls])} s against {_spread([s for f in front for s in f.stalls])} s"
    rows = [
        Row("parameters", parameters / 1e6, "M", note=f"a step without saves takes {plain:.3f} s"),
        Row("time in the save call, ratio", statistics.median(stall), "x", at_most=0.15, note=seconds),
        Row(
            "throughput while the writer works",
            plain / statistics.mean(beside),
            "x",
            at_least=0.9,
            note=f"{len(beside)} steps",
        ),
        Row(
            "extra time of the next 20 steps",
            statistics.median(after),
            "s",
            note=f"{_spread(after)} s, against no save",
        ),
        Row("time to commit, ratio", statistics.median(commits), "x", at_most=1.5, note=_spread(commits)),
        Row("whole run, ratio", statistics.median(whole), "x", at_most=1.0, note=_spread(whole)),
    ]
    return Outcome(rows, trials)


def _spread(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _twenty(one: Measured) -> float:
    return sum(one.steps[at + 1] for save in SAVES for at in range(save, min(save + 20, STEPS - 1))) / len(SAVES)


def measure(world: World, folder: Path, rounds: int) -> tuple[int, list[list[Measured]]]:
    """(trained parameters, [no saves, synchronous, asynchronous] of each round)."""
    import torch

    from dsgpt.checkpoint.saver import Saver
    from dsgpt.config import Dropout, ModelConfig, fill_deepspeed, load_config
    from dsgpt.config.schema import OptimizerSection
    from dsgpt.engine import Engine, construct
    from dsgpt.model.gpt import GPT
    from dsgpt.optimizer import build_optimizer

    overrides = [
        "training.dtype=fp32",
        f"training.micro_batch_size_per_gpu={BATCH}",
        f"training.global_batch_size={BATCH}",
    ]
    config = fill_deepspeed(load_config(["quickstart"], [*overrides, "deepspeed=zero0"]).config, 1)
    model = construct(lambda: GPT(ModelConfig(**MODEL, dropout=Dropout())), config)
    engine = Engine(model, build_optimizer(model, OptimizerSection(learning_rate=1e-3)), config, world)
    ids = torch.randint(MODEL["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    engine.rehearse(batch)

    def step() -> None:
        engine.forward_backward(batch, float(BATCH * LENGTH), last=True)
        engine.step(1e-3)

    savers = [None, *(Saver(engine, world, folder / f"{mode}", asynchronous=mode == 2) for mode in (1, 2))]
    for saver in savers[1:]:
        _train(saver, step, steps=3, saves=(1,))
    told = []
    for number in range(rounds):
        order = (0, 1, 2) if number % 2 else (2, 1, 0)
        results = {mode: _train(savers[mode], step) for mode in order}
        told.append([results[mode] for mode in range(3)])
    savers[2].close()
    return sum(p.numel() for _, p in engine.parameters()), told


def _train(saver: Any, step: Any, steps: int = STEPS, saves: tuple[int, ...] = SAVES) -> Measured:
    """As the training loop does: begin, go on, commit after the step in which the writer was found ready."""
    told, began = Measured(), time.perf_counter()
    stall = 0.0

    def finish() -> None:
        nonlocal stall
        before = time.perf_counter()
        saved = saver.finish()
        told.stalls.append(stall + time.perf_counter() - before)
        told.commits.append(saved.seconds)
        shutil.rmtree(saved.path)

    for number in range(steps):
        before = time.perf_counter()
        working = saver is not None and saver.pending is not None
        step()
        told.steps.append(time.perf_counter() - before)
        if working:
            told.beside.append(told.steps[-1])
        if working and saver.is_written():
            finish()
        if saver is not None and number in saves:
            before = time.perf_counter()
            saver.begin({"step": number}, "a")
            stall = time.perf_counter() - before
            if not saver.asynchronous:
                finish()
    if saver is not None and saver.pending is not None:
        finish()
    told.whole = time.perf_counter() - began
    return told
