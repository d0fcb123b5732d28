"""Evaluating the validation sets of a run that trains. A stop that is asked for meanwhile cuts the evaluation short."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dsgpt.evaluate.loss import Evaluation, evaluate_split, pool
from dsgpt.train.save import record_evaluation
from dsgpt.train.stopping import is_agreed

if TYPE_CHECKING:
    from dsgpt.train.loop import Run


class _Stopped(Exception):
    """All ranks agreed to stop."""


def evaluate_sets(run: Run, may_stop: bool = True) -> dict[str, Evaluation]:
    """Every validation set; a collective. Raises _Stopped where a stop is agreed on meanwhile, and it `may_stop`."""
    micro_batch = run.plan.config.training.micro_batch_size_per_gpu
    limit = run.plan.config.logging.eval_samples
    run.enter("evaluate")

    def batch_loss(batch):
        run.heartbeat.tick()
        if may_stop and is_agreed(run):
            raise _Stopped
        return run.engine.evaluate(batch)

    return {
        name: evaluate_split(batch_loss, samples, run.world, micro_batch, limit)
        for name, samples in run.validation.items()
    }


def evaluate(run: Run) -> Evaluation | None:
    """The loss of every validation set, told and kept with this step's checkpoint; None where a stop cut it short."""
    if not run.validation:
        return None
    run.log.event("evaluating", step=run.state.step)
    try:
        sets = evaluate_sets(run)
    except _Stopped:
        text = f"the evaluation of step {run.state.step} was cut short by {run.stop.requested or 'another rank'}"
        run.log.event("evaluation_stopped", text, step=run.state.step)
        return None
    result = pool(list(sets.values()))
    told = result.as_dict()
    if len(sets) > 1:
        told["sets"] = {name: one.as_dict() for name, one in sets.items()}
    bits = "" if math.isnan(result.bits_per_byte) else f"  bits per byte {result.bits_per_byte:.4f}"
    each = "".join(f"  {name} {one.loss:.4f}" for name, one in sets.items()) if len(sets) > 1 else ""
    run.log.event(
        "evaluation",
        f"step {run.state.step}  validation loss {result.loss:.4f}  perplexity {result.perplexity:.2f}{bits}{each}",
        step=run.state.step,
        **told,
    )
    record_evaluation(run, run.state.step, told)
    return result
