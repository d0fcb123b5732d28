"""One training step: the step's samples, forward and backward for each micro-batch, one update.

Which samples a step has depends on the seed, the data and the global batch alone. World size and micro-batch only decide
who computes them: sample j of a step goes to micro-step j // (ranks x micro), rank (j // micro) % ranks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from dsgpt.data.dataset import SampleStream
from dsgpt.data.mixture import MixtureStream
from dsgpt.distributed import World
from dsgpt.engine import Engine
from dsgpt.evaluate.loss import Batch, to_tensors

_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Wishes:
    """What ranks want to happen after a step: a stop from outside, a stop by the operator, a checkpoint.

    `writing`: a rank's files of the checkpoint under way are not written yet.
    """

    preempt: bool = False
    stop: bool = False
    save: bool = False
    writing: bool = False


@dataclass(frozen=True)
class StepReport:
    """What one step did. `loss` is in nats per target token over all ranks; `data_crc` identifies what was read.

    `applied`, `loss_scale` and `overflow` are the engine's (StepResult); `wishes` are those of any rank, the same on all;
    `local_loss` is this rank's sum over its tokens.
    """

    loss: float
    gradient_norm: float
    targets: int
    applied: bool
    wishes: Wishes
    data_crc: int
    loss_scale: float | None = None
    overflow: bool = False
    local_loss: float = math.nan


class StepLoader:
    """This rank's micro-batches of a step; the next step's are read in the background meanwhile.

    `next_start` moves the beginning of a step behind samples that are left out.
    """

    def __init__(
        self,
        stream: SampleStream | MixtureStream,
        world: World,
        global_batch: int,
        micro_batch: int,
        next_start: Callable[[int], int] = lambda sample: sample,
    ):
        self.stream, self.world = stream, world
        self.global_batch, self.micro_batch, self.next_start = global_batch, micro_batch, next_start
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dsgpt-data")
        self._next: tuple[int, Future[list[dict[str, np.ndarray]]]] | None = None

    def load(self, consumed_samples: int) -> tuple[int, list[dict[str, np.ndarray]]]:
        """(first sample, micro-batches) of the step that follows so many samples of the run."""
        start = self.next_start(consumed_samples)
        future = self._next[1] if self._next and self._next[0] == start else self._pool.submit(self._read, start)
        following = self.next_start(start + self.global_batch)
        self._next = (following, self._pool.submit(self._read, following))
        return start, future.result()

    def go_on(self, stream: SampleStream | MixtureStream) -> None:
        """Drop what was read ahead: the run goes on elsewhere, and from a checkpoint maybe in another order."""
        self.stream, self._next = stream, None

    def _read(self, start: int) -> list[dict[str, np.ndarray]]:
        positions = np.arange(start, start + self.global_batch)
        mine = positions.reshape(-1, self.world.size, self.micro_batch)[:, self.world.rank]
        whole = self.stream.read(mine.reshape(-1))
        pieces = range(0, mine.size, self.micro_batch)
        return [{name: rows[at : at + self.micro_batch] for name, rows in whole.items()} for at in pieces]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def seed_micro_step(seed: int, step: int, rank: int, micro_step: int) -> None:
    """Dropout of a micro-step depends on these four numbers only, so nothing of it has to be saved.

    They are mixed by the finaliser of SplitMix64 (Steele et al. 2014), once per number.
    """
    mixed = seed & _MASK_64
    for number in (step, rank, micro_step):
        mixed = (mixed + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK_64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
        mixed ^= mixed >> 31
    torch.manual_seed(mixed)


def train_step(
    engine: Engine,
    world: World,
    micro_batches: list[dict[str, np.ndarray]],
    *,
    seed: int,
    step: int,
    lr: float,
    ask: Callable[[], Wishes],
) -> StepReport:
    """Forward and backward for each micro-batch, then one update.

    `ask` tells this rank's wishes, as late as they can be agreed on; the report has everyone's.
    """
    local_targets = sum(int((arrays["labels"] != -100).sum()) for arrays in micro_batches)
    (targets,) = world.sum(local_targets)
    loss_sum = torch.zeros((), device=world.device)
    crc = 0
    for micro_step, arrays in enumerate(micro_batches):
        crc = zlib.crc32(np.ascontiguousarray(arrays["input_ids"]).tobytes(), crc)
        seed_micro_step(seed, step, world.rank, micro_step)
        last = micro_step == len(micro_batches) - 1
        loss_sum += engine.forward_backward(to_tensors(arrays, world.device), targets, last)
    local_loss, wishes = float(loss_sum), ask()
    total, crcs, *wanted = world.sum(local_loss, crc, wishes.preempt, wishes.stop, wishes.save, wishes.writing)
    result = engine.step(lr) if math.isfinite(total) else engine.discard()
    return StepReport(
        total / targets,
        result.gradient_norm,
        int(targets),
        result.applied,
        Wishes(*(number > 0 for number in wanted)),
        int(crcs),
        result.loss_scale,
        result.overflow,
        local_loss,
    )


def largest_micro_batch(vocab_size: int, seq_length: int, micro_batch: int, device: torch.device) -> Batch:
    """The most expensive micro-batch there can be: full, every token a target, two documents so that the mask exists."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (micro_batch, seq_length + 1), generator=generator)
    half = seq_length // 2
    positions = torch.cat((torch.arange(half), torch.arange(seq_length - half))).expand(micro_batch, -1)
    documents = (torch.arange(seq_length) >= half).int().expand(micro_batch, -1)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions, "document_ids": documents}
    return {name: value.contiguous().to(device) for name, value in batch.items()}
