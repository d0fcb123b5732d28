"""What a new run starts from: the weights, and of a DeepSpeed checkpoint Adam's state, that `model.init_from` names.

What was read is given back on return, so that the memory of a large file is not kept for the length of the run. All ranks
read, each what it owns (engine.load); rank 0 says what was carried.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dsgpt.checkpoint.deepspeed_import import deepspeed_weights
from dsgpt.checkpoint.weights import checkpoint_weights, hf_weights
from dsgpt.train.resume import find_source

if TYPE_CHECKING:
    from dsgpt.train.loop import Run


def read_weights(run: Run) -> None:
    """Fill the model from what init_from names."""
    run.enter("read the weights", 3)
    section, verify = run.plan.config.model, run.plan.config.checkpoint.verify
    origin, _, place = section.init_from.partition(":")
    if origin == "deepspeed":
        _read_deepspeed(run, Path(place))
        return
    if origin == "checkpoint":
        weights = checkpoint_weights(find_source(place, run.world, verify))
    else:
        weights = hf_weights(Path(place), run.plan.model, section.trust_checkpoint)
    run.engine.load(weights.read, ("master",), 0)
    run.engine.load_buffers(weights.buffers)


def _read_deepspeed(run: Run, place: Path) -> None:
    """Weights, and Adam's moments and step where all are there; the run's own schedule and data begin at step 0.

    `optimizer_steps` becomes Adam's step count, because that is what a resume gives back to the optimizer.
    """
    engine, trust = run.engine, run.plan.config.model.trust_checkpoint
    weights = deepspeed_weights(place, run.plan.model, engine.parameter_shapes(), engine.state_kinds, run.world, trust)
    engine.load(weights.read, weights.kinds, weights.optimizer_steps)
    engine.load_buffers(weights.buffers)
    text, scale = weights.text, engine.loss_scale
    if scale is not None and weights.loss_scale:
        engine.loss_scale = {**scale, **weights.loss_scale}
        text += f"; loss scale {run.loss_scale:g}"
    elif scale is not None:
        text += f"; no loss scale there, starting at {run.loss_scale:g}"
    run.state.optimizer_steps = weights.optimizer_steps
    run.log.event("imported", text, **weights.told)
