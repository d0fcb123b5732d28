"""What a new run starts from: the weights, and of a DeepSpeed checkpoint Adam's state, that `model.init_from` names.

What was read is given back on return, so that the memory of a large file is not kept for the length of the run. All ranks
read, each what it owns (engine.load); rank 0 says what was carried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dsgpt.checkpoint.deepspeed_import import deepspeed_weights
from dsgpt.checkpoint.weights import checkpoint_weights, hf_weights
from dsgpt.hub import locate_hf
from dsgpt.model.build import vocabulary_names
from dsgpt.model.lora import base_of_adapter, has_transposed, initial_adapter, is_adapter, plain_name
from dsgpt.partitioned import Fragment
from dsgpt.train.build import check_model
from dsgpt.train.resume import find_source
from dsgpt.units import format_bytes

if TYPE_CHECKING:
    from dsgpt.train.loop import Run

Source = Callable[[Fragment, str], Tensor]


def read_weights(run: Run) -> None:
    """Fill the model from what init_from names."""
    run.enter("read the weights", 3)
    section, verify = run.plan.config.model, run.plan.config.checkpoint.verify
    origin, _, place = section.init_from.partition(":")
    if origin == "deepspeed":
        _read_deepspeed(run, Path(place))
        return
    there, rows = run.plan.model, dict[str, int]()
    if run.plan.grown_from is not None:
        there = there.model_copy(update={"vocab_size": run.plan.grown_from})
        rows = dict.fromkeys(vocabulary_names(there), run.plan.model.vocab_size)
    if origin == "checkpoint":
        weights = checkpoint_weights(find_source(place, run.world, verify), rows)
    else:
        weights = hf_weights(locate_hf(place), there, section.trust_checkpoint, rows)
    run.engine.load(_with_adapters(run, weights.read), ("master",), 0)
    run.engine.load_buffers(weights.buffers)
    (total,) = run.world.sum(float(weights.bytes_read()))
    run.log.event("weights_read", f"read the weights: {format_bytes(total)}, all ranks together", bytes=int(total))
    if rows:
        _tell_growth(run, rows)
    check_model(run.engine, run.plan)


def _tell_growth(run: Run, rows: Mapping[str, int]) -> None:
    before, after = run.plan.grown_from, run.plan.model.vocab_size
    text = f"the vocabulary grew from {before} to {after}: new rows of {', '.join(rows)} are the mean of all"
    run.log.event("vocabulary_grown", text, before=before, after=after, parameters=list(rows))
    settings = run.plan.config.fine_tuning
    frozen = [name for name in map(plain_name, run.engine.frozen_shapes()) if name in rows]
    if frozen and "all" not in settings.unfreeze_at.values():
        do = {"last_blocks": "fine_tuning.train_embeddings=true", "patterns": "a pattern for them"}
        text = (
            f"warning: new rows of {', '.join(frozen)} are never trained, so there all new tokens stay one and the same; "
            f"{do.get(settings.train, 'fine_tuning.train=all, or last_blocks with train_embeddings=true,')} trains them"
        )
        run.log.event("new_tokens_frozen", text, parameters=frozen)


def _with_adapters(run: Run, read: Source) -> Source:
    """The source of a model with adapters beside its matrices, from that of one without."""
    settings = run.plan.config.fine_tuning
    if settings.train != "lora":
        return read
    shapes = run.engine.parameter_shapes() | {name: shape for name, (shape, _) in run.engine.frozen_shapes().items()}
    transposed = has_transposed(run.engine.module)

    def with_adapters(fragment: Fragment, kind: str) -> Tensor:
        name = fragment.name
        if not is_adapter(name):
            return read(Fragment(plain_name(name), fragment.start, fragment.numel), kind)

        def matrix() -> Tensor:
            base = base_of_adapter(name)
            shape = shapes[base]
            whole = read(Fragment(plain_name(base), 0, prod(shape)), kind).view(shape)
            return whole.t() if transposed else whole

        value = initial_adapter(name, shapes[name], run.plan.config.run.seed, matrix)
        return value.flatten()[fragment.start :][: fragment.numel]

    return with_adapters


def _read_deepspeed(run: Run, place: Path) -> None:
    """Weights, and Adam's moments and step where all are there; the run's own schedule and data begin at step 0.

    `optimizer_steps` becomes Adam's step count, because that is what a resume gives back to the optimizer.
    """
    engine, trust = run.engine, run.plan.config.model.trust_checkpoint
    weights = deepspeed_weights(place, run.plan.model, engine.parameter_shapes(), engine.state_kinds, run.world, trust)
    if run.plan.config.fine_tuning.train != "lora":
        engine.load(weights.read, weights.kinds, weights.optimizer_steps)
    else:  # the moments there are of parameters that are frozen here
        engine.load(_with_adapters(run, weights.read), weights.kinds[:1], 0)
    engine.load_buffers(weights.buffers)
    text, scale = weights.text, engine.loss_scale
    if scale is not None and weights.loss_scale:
        engine.loss_scale = {**scale, **weights.loss_scale}
        text += f"; loss scale {run.loss_scale:g}"
    elif scale is not None:
        text += f"; no loss scale there, starting at {run.loss_scale:g}"
    run.state.optimizer_steps = weights.optimizer_steps
    run.log.event("imported", text, **weights.told)
