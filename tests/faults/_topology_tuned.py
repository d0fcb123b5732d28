"""Engines of `topology` that train a part: adapters, adapters with magnitudes, the last block; also a model of transformers.

They are built as a run builds them (train/build.py). No entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from dsgpt.config import ModelConfig, RunConfig
from dsgpt.config.fine_tuning import FineTuningSection
from dsgpt.distributed import World
from dsgpt.engine import Engine
from dsgpt.model.hf import hf_model_config
from dsgpt.train.build import build_engine
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.sources import RunData
from dsgpt.train.state import RunLog
from tests.hf_models import hf_config

TUNED: dict[str, dict[str, Any]] = {
    "lora": {"train": "lora", "lora": {"rank": 3}},
    "dora": {"train": "lora", "lora": {"rank": 3, "use_dora": True}},
    "last_blocks": {"train": "last_blocks", "num_last_blocks": 1},
    "mistral": {"train": "lora", "lora": {"rank": 3}},
}


def mistral(vocab_size: int, positions: int) -> ModelConfig:
    config = hf_config("mistral", vocab_size)
    config.max_position_embeddings, config.sliding_window = positions, 5
    return hf_model_config(config.to_dict(), 1, "tests")  # the number of parameters is for estimates


def build_tuned(
    config: RunConfig, trained: str, model: ModelConfig, deepspeed_config: Mapping[str, Any], world: World
) -> Engine:
    """Not rehearsed yet. Frozen vectors get values at random: initial ones are the same for any seed."""
    config = config.model_copy(update={"fine_tuning": FineTuningSection.model_validate(TUNED[trained])})
    data = RunData((), (), (), 0, None, None)
    plan = ResolvedRun(config, model, dict(deepspeed_config), data, world.size, "cpu", max_steps=10)
    engine = build_engine(plan, world, RunLog(Path(), "", enabled=False), step=0, num_last_blocks=1)
    vectors = [
        p for p in engine.module.parameters() if not p.requires_grad and len(getattr(p, "ds_shape", p.shape)) == 1
    ]
    torch.manual_seed(config.run.seed)
    with deepspeed.zero.GatheredParameters(vectors, modifier_rank=0):
        for vector in vectors:
            nn.init.normal_(vector.data)
    return engine
