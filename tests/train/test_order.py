"""Which samples a step has does not depend on how many ranks share it, or in which pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from dsgpt.data.dataset import Block, SampleOrder, SampleStream
from dsgpt.data.mixture import SLOTS, MixtureStream, Segment
from dsgpt.distributed import World
from dsgpt.train.step import StepLoader, seed_micro_step

GLOBAL = 24


@dataclass
class Numbered:
    """Sample i is the number i, so that what a rank reads can be told."""

    num_samples: int = 100
    fingerprint: str = "f"

    def __getitem__(self, i: int) -> Block:
        row = np.full(4, i, dtype=np.int64)
        return Block(row, row, row, row)


def samples_of(step, world_size, micro):
    stream = SampleStream.of(Numbered(), seed=3)
    read = []
    for rank in range(world_size):
        loader = StepLoader(stream, World(rank=rank, size=world_size), GLOBAL, micro)
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


@dataclass
class Other(Numbered):
    """A smaller source, told by numbers from 1,000 on."""

    num_samples: int = 17
    fingerprint: str = "g"

    def __getitem__(self, i: int) -> Block:
        return super().__getitem__(1000 + i)


@pytest.mark.parametrize("sources", [1, 2, "appended"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_no_sample_is_repeated_or_skipped_whatever_the_ranks_and_wherever_it_is_resumed(sources, world_size):
    """Over several epochs, with a new start on other ranks at every step: each source's epochs are permutations."""
    half = (SLOTS // 2, SLOTS // 2)
    segments = {1: [Segment(0, (SLOTS,))], 2: [Segment(0, half)]}.get(sources)
    segments = segments or [Segment(0, (SLOTS,)), Segment(7 * GLOBAL, half)]
    read = []
    for step in range(20):
        parts, size = [], 1 + (world_size + step) % 4
        micro = GLOBAL // size // 2
        for rank in range(size):
            stream = MixtureStream([Numbered(), Other()][: len(segments[-1].slots)], segments, seed=3)
            loader = StepLoader(stream, World(rank=rank, size=size), GLOBAL, micro)
            start, batches = loader.load(step * GLOBAL)
            assert start == step * GLOBAL
            parts.append([batch["input_ids"][:, 0].tolist() for batch in batches])
            loader.close()
        read += [number for micro_step in zip(*parts, strict=True) for part in micro_step for number in part]
    assert len(read) == 20 * GLOBAL
    for first, size in ((0, 100), (1000, 17)):
        mine = [number - first for number in read if first <= number < first + size]
        for epoch in range(0, len(mine) - size + 1, size):
            assert sorted(mine[epoch : epoch + size]) == list(range(size))
        assert len(set(mine[len(mine) // size * size :])) == len(mine) % size
        assert mine == SampleOrder(size, 3, "f" if not first else "g").sample_ids(0, len(mine)).tolist()


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
