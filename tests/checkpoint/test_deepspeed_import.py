"""What DeepSpeed saved is read bit for bit, at any stage and world size, and what cannot be read is refused by name."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from dsgpt.checkpoint.deepspeed_import import deepspeed_weights
from dsgpt.config import load_config
from dsgpt.config.deepspeed import fill_deepspeed
from dsgpt.config.schema import OptimizerSection
from dsgpt.engine import Engine, construct
from dsgpt.errors import CheckpointError, ConfigError, DsgptError
from dsgpt.model.gpt import GPT
from dsgpt.model.hf_import import read_hf_config
from dsgpt.optimizer import build_optimizer
from dsgpt.train.step import largest_micro_batch
from tests.checkpoint.deepspeed_saves import STEPS, WORLD, native_state, save_on_ranks
from tests.pool import ranks

SAVES = [
    ("llama", 0, "fp32"), ("llama", 1, "fp32"), ("gpt2", 2, "fp32"), ("llama", 3, "fp32"),
    ("gpt2", 0, "bf16"), ("gpt2", 1, "bf16_sums"), ("llama", 2, "bf16"), ("gpt2", 3, "bf16"),
]  # fmt: skip
ALL = [case for case in itertools.product(("llama", "gpt2"), range(4), ("fp32", "bf16"))]


def import_on_ranks(world, folder, stage, dtype="fp32", optimizer="adamw", trust=False):
    """Import into an engine of this stage; all fragments of this rank, what is told, and the optimizer's step."""
    config = read_hf_config(folder)
    overrides = [f"training.dtype={dtype}", "training.micro_batch_size_per_gpu=2", f"deepspeed=zero{stage}"]
    overrides += [f"training.global_batch_size={2 * world.size}"]
    filled = fill_deepspeed(load_config(["quickstart"], overrides).config, world.size)
    model = construct(lambda: GPT(config), filled)
    engine = Engine(model, build_optimizer(model, OptimizerSection(name=optimizer, learning_rate=1e-2)), filled, world)
    engine.rehearse(largest_micro_batch(config.vocab_size, 16, 2, world.device))
    try:
        weights = deepspeed_weights(Path(folder), config, engine.parameter_shapes(), engine.state_kinds, world, trust)
    except DsgptError as error:
        return f"{type(error).__name__}: {error}"
    engine.load(weights.read, weights.kinds, weights.optimizer_steps)
    kinds = engine.state_kinds
    read = {(f, kind): engine.read(f, kind).clone() for f in engine.fragments() for kind in kinds}
    steps = {int(s["step"]) for s in engine._torch_optimizer.state.values() if "step" in s}
    return read, engine.parameter_shapes(), weights.told, weights.text, steps


def assembled(results):
    """(parameter, kind) -> whole tensor from all ranks' fragments; every element must come exactly once."""
    shapes, whole = results[0][1], {}
    for read, *_ in results:
        for (fragment, kind), values in read.items():
            into = whole.setdefault((fragment.name, kind), torch.full(shapes[fragment.name], torch.nan).flatten())
            assert into[fragment.start :][: fragment.numel].isnan().all()
            into[fragment.start :][: fragment.numel] = values
    return {key: values.view(shapes[key[0]]) for key, values in whole.items()}


def assert_imported(results, kind, live, moments=True):
    saved, adam_steps = live
    expected = native_state(kind, saved)
    found = assembled(results)
    kinds = ("master", "exp_avg", "exp_avg_sq") if moments else ("master",)
    assert {name for name, _ in found} == set(expected)
    for name, values in expected.items():
        for one, value in zip(kinds, values, strict=False):
            assert torch.equal(found[(name, one)], value), (name, one)
            assert value.abs().max() > 0, "nothing was saved, so nothing was tested"
    if not moments:
        assert all(not values.any() for (_, one), values in found.items() if one != "master")
    assert results[0][2]["moments"] is moments
    assert all(one[4] == (adam_steps if moments else {0}) for one in results)


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """save(kind, stage, dtype, …) -> (folder, live tensors), each made once."""
    made = {}

    def save(kind, stage, dtype, **options):
        key = (kind, stage, dtype, *sorted(options.items(), key=str))
        if str(key) not in made:
            folder = tmp_path_factory.mktemp("saved")
            made[str(key)] = folder, ranks(WORLD).run(save_on_ranks, str(folder), kind, stage, dtype, *_positional(options))[0]
        return made[str(key)]

    return save


def _positional(options):
    names = {"freeze": "", "zero": None, "optimizer": "adamw", "steps": STEPS, "client": None}
    return [options.get(name, default) for name, default in names.items()]


@pytest.mark.parametrize("kind, stage, dtype", SAVES, ids=str)
def test_weights_and_moments_are_read_bit_for_bit_at_another_world_size_and_stage(saves, kind, stage, dtype):
    folder, saved = saves(kind, stage, dtype)
    there = {0: 3, 1: 2, 2: 0, 3: 1}[stage]
    assert_imported(ranks(3).run(import_on_ranks, str(folder), there), kind, saved)
