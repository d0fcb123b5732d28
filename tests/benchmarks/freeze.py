"""The last two of six blocks trained against all of the model: time of a step, and bytes of gradients and optimizer.

Two CPU ranks, ZeRO 1, 2 and 3, fp32, vocabulary 1,024, head untied, so that norm and head are trained too. Both engines are
built as a run builds them (train/build.py) and live in the same ranks; steps alternate, and each pair has its ratio, so that
what else the machine does meets both. Data is ready before: only the step counts.

Bytes are those of real tensors, over both ranks, each storage once, after the last backward pass of a step: every gradient
that waits for the optimizer, and all that the optimizer holds, its fp32 masters among them where they are not the weights
themselves. The buckets that ranks exchange gradients through are not counted: their size is set (reduce_bucket_size).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dsgpt.distributed import World
from tests.frame import Outcome, Row
from tests.pool import close_all, ranks

STAGES, WAYS = (1, 2, 3), ("all", "last_blocks")
VOCABULARY, LENGTH, MICRO, GLOBAL = 1024, 256, 8, 16
MODEL = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
}  # fmt: skip


class Held(NamedTuple):
    """Bytes on one rank between the last backward pass and the step."""

    gradients: int
    optimizer: int


class Spent(NamedTuple):
    """Seconds of one step on one rank."""

    wall: float
    processor: float


Pair = tuple[Spent, Spent]


def run(trials: int | None, seed: int) -> Outcome:
    """25 pairs of steps at every stage unless `trials` says otherwise."""
    from tests.run_fixtures import make_dataset, write_config

    pairs, rows = trials or 25, []
    with tempfile.TemporaryDirectory(prefix="dsgpt-freeze-") as name:
        dataset = make_dataset(Path(name) / "dataset")
        try:
            for stage in STAGES:
                sizes = {"seq_length": LENGTH, "global_batch_size": GLOBAL, "micro_batch_size_per_gpu": MICRO}
                changes = {"model": MODEL, "training": {**sizes, "max_steps": 10}, "deepspeed": f"zero{stage}"}
                yaml = write_config(dataset, Path(name), f"zero{stage}", **changes)
                rows += _rows(f"ZeRO {stage}", ranks(2).run(measure, yaml, pairs, seed, timeout=1800))
        finally:
            close_all()
    return Outcome(rows, pairs)


def _rows(label: str, told: list[tuple[list[Pair], list[Held]]]) -> list[Row]:
    pairs = told[0][0]
    ratios = sorted(part.wall / whole.wall for whole, part in pairs)
    quarter = len(ratios) // 4
    whole, part = (GLOBAL * LENGTH / statistics.median(one.wall for one in way) for way in zip(*pairs, strict=True))
    note = f"middle half {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}; {part:.0f} against {whole:.0f} tokens/s"
    processor = statistics.median(part.processor / whole.processor for whole, part in pairs)
    everything, some = (
        Held(*map(sum, zip(*way, strict=True))) for way in zip(*(held for _, held in told), strict=True)
    )
    held = sum(some) / sum(everything)
    size = f"gradients {some.gradients / 1e6:.1f} of {everything.gradients / 1e6:.1f} MB, "
    size += f"optimizer {some.optimizer / 1e6:.1f} of {everything.optimizer / 1e6:.1f} MB"
    return [
        Row(f"{label}: time of a step", statistics.median(ratios), "x", at_most=0.60, note=note),
        Row(f"{label}: processor time of a step", processor, "x", note="of rank 0"),
        Row(f"{label}: bytes of gradients and optimizer", held, "x", at_most=0.40, note=size),
    ]


def measure(world: World, yaml: Path, pairs: int, seed: int) -> tuple[list[Pair], list[Held]]:
    """(a step with all and one with a part trained, again and again; what is held by each)."""
    import numpy as np

    from dsgpt.config import load_config
    from dsgpt.config.fine_tuning import FineTuningSection
    from dsgpt.train.build import build_engine
    from dsgpt.train.resolve import resolve_run
    from dsgpt.train.state import RunLog
    from dsgpt.train.step import Wishes, largest_micro_batch, train_step

    ids = np.random.default_rng((seed, world.rank)).integers(VOCABULARY, size=(MICRO, LENGTH + 1))
    positions, documents = np.broadcast_to(np.arange(LENGTH), (MICRO, LENGTH)), np.zeros((MICRO, LENGTH), int)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions, "document_ids": documents}
    engines, held = [], []
    for way in WAYS:
        tuning = FineTuningSection(train=way, num_last_blocks=2)  # a run would refuse to freeze initial weights
        config = load_config([yaml]).config.model_copy(update={"fine_tuning": tuning})
        plan = resolve_run(config, world_size=world.size, device="cpu")
        engines.append(build_engine(plan, world, RunLog(yaml.parent, "a", enabled=False), step=0, num_last_blocks=2))
        engines[-1].rehearse(largest_micro_batch(VOCABULARY, LENGTH, MICRO, world.device))

    def step(engine: Any, ask: Callable[[], Wishes] = Wishes) -> Spent:
        world.barrier()
        wall, processor = time.perf_counter(), time.process_time()
        train_step(engine, world, [batch], seed=seed, step=0, lr=1e-4, ask=ask)
        world.barrier()
        return Spent(time.perf_counter() - wall, time.process_time() - processor)

    for engine in engines:
        step(engine, lambda engine=engine: (held.append(measure_bytes(engine)), Wishes())[1])
    found = []
    for number in range(pairs):
        order = (0, 1) if number % 2 else (1, 0)
        spent = {which: step(engines[which]) for which in order}
        found.append((spent[0], spent[1]))
    return found, held


def measure_bytes(engine: Any) -> Held:
    """By storage, so that views count once; what is a weight's own memory is neither gradient nor optimizer."""
    import torch

    parameters, inner = list(engine.module.parameters()), engine._torch_optimizer
    weights = _storages(getattr(p, "ds_tensor", p) for p in parameters)
    gradients = _storages([*engine._gradients(), *(p.grad for p in parameters if p.grad is not None)])
    masters = [p for group in inner.param_groups for p in group["params"]]
    moments = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    optimizer = _storages([*masters, *moments])
    return Held(*(sum(one[key] for key in one.keys() - weights.keys()) for one in (gradients, optimizer)))


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Address -> bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
