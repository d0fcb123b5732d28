"""A MODEL divided over ranks by ZeRO-3, to be evaluated where it is larger than one device.

    model = load_divided("runs/mine", world, dtype="bf16")
    loss = model.evaluate(batch)                # the summed loss of this rank's batch; all ranks must call it

Every rank reads what it holds and no more; a layer is gathered while it computes. There is no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from dsgpt.checkpoint.weights import (
    ModelLocation,
    checkpoint_weights,
    hf_weights,
    read_model_config,
    require_intact,
)
from dsgpt.config import HFModelConfig
from dsgpt.distributed import World
from dsgpt.engine import DividedModel, construct
from dsgpt.errors import CheckpointError
from dsgpt.model.build import build_model, import_what_builds


def load_divided(
    location: ModelLocation, world: World, dtype: str, micro_batch: int, trust: bool = False
) -> DividedModel:
    """A collective. Raises on all ranks what one could not read: CheckpointError, ConfigError."""
    error: CheckpointError | None = None
    if world.is_main and location.is_checkpoint:
        try:
            require_intact(location.path)
        except CheckpointError as problem:
            error = problem
    if problems := world.broadcast_object(error and error.problems):
        raise CheckpointError(problems=problems)
    config = read_model_config(location)
    import_what_builds(config, adapters=False)
    constants: Callable[[], Mapping[str, Tensor]] | None = None
    if isinstance(config, HFModelConfig):
        from dsgpt.model.hf import constants as of_transformers

        constants = partial(of_transformers, config)
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch,
        # Parameters that stay whole would have to be gathered again after they are read.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
    }
    model = DividedModel(construct(lambda: build_model(config), settings, constants), config, settings, world)
    weights = checkpoint_weights(location.path) if location.is_checkpoint else hf_weights(location.path, config, trust)
    model.fill(weights.read, weights.buffers)
    return model
