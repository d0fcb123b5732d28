"""Which samples a step has does not depend on how many ranks share it, or in which pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from dsgpt.data.dataset import Block, SampleOrder
from dsgpt.distributed import World
from dsgpt.train.step import StepLoader, seed_micro_step

GLOBAL = 24


@dataclass
class Numbered:
    """Sample i is the number i, so that what a rank reads can be told."""

    num_samples: int = 100

    def __getitem__(self, i: int) -> Block:
        row = np.full(4, i, dtype=np.int64)
        return Block(row, row, row, row)


def samples_of(step, world_size, micro):
    order = SampleOrder(100, seed=3, fingerprint="f")
    read = []
    for rank in range(world_size):
        loader = StepLoader(Numbered(), order, World(rank=rank, size=world_size), GLOBAL, micro)
        read.append([batch["input_ids"][:, 0].tolist() for batch in loader.load(step * GLOBAL)[1]])
        loader.close()
    # Micro-step by micro-step, rank by rank, is the order in which the step's samples are numbered.
    return [number for micro_step in zip(*read, strict=True) for part in micro_step for number in part]


@pytest.mark.parametrize("world_size, micro", [(1, 24), (1, 1), (2, 3), (3, 4), (4, 6), (8, 1)])
def test_the_samples_of_a_step_are_the_same_for_any_split(world_size, micro):
    expected = SampleOrder(100, seed=3, fingerprint="f").sample_ids(0, 6 * GLOBAL).tolist()
    for step in (0, 3, 4, 5):  # step 4 crosses the edge of an epoch: 100 is not a multiple of 24
        assert samples_of(step, world_size, micro) == expected[step * GLOBAL : (step + 1) * GLOBAL]
    assert sorted(expected[:100]) == list(range(100))


def test_dropout_seeds_differ_between_steps_ranks_and_micro_steps():
    import torch

    seen = set()
    for step in range(5):
        for rank in range(5):
            for micro_step in range(5):
                seed_micro_step(7, step, rank, micro_step)
                seen.add(tuple(torch.rand(2).tolist()))
    assert len(seen) == 125
    seed_micro_step(7, 1, 2, 3)
    first = torch.rand(1)
    seed_micro_step(7, 1, 2, 3)
    assert torch.equal(torch.rand(1), first)
