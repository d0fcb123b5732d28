"""What is trained changes while a run trains: gradual unfreezing, and the number of last blocks that is measured first.

At a step of fine_tuning.unfreeze_at the state is committed, the engine is built anew with more parameters to train, and the
commit is read back into it: a resume inside the process. What was trained keeps its moments and its optimizer steps, what is
new begins with none. DeepSpeed cannot take parameters in while it runs, at any stage; so the cost is one commit and one
start of the engine for each unfreezing, and memory is never that of two engines.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsgpt.checkpoint import commit
from dsgpt.train.build import build_engine, rehearse
from dsgpt.train.initial import read_weights
from dsgpt.train.last_blocks import choose
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.resume import Continuation, last_good, restore
from dsgpt.train.save import save
from dsgpt.train.validation import evaluate_sets

if TYPE_CHECKING:
    from dsgpt.train.loop import Run


def engine_fits(run: Run) -> bool:
    """Whether the engine trains what the next step is to train."""
    return run.stage == run.plan.config.fine_tuning.stage_at(run.state.step)


def unfreeze(run: Run) -> None:
    """Commit this step, and go on with an engine that trains what the next step is to train."""
    save(run, required=True)
    rebuild(run, last_good(run))
    run.log.event("unfrozen", step=run.state.step, stage=run.stage)


def rebuild(run: Run, source: Continuation | None) -> None:
    """Build the engine anew for this step, and read a checkpoint into it, or without one the initial weights."""
    run.enter("build the model", 3)
    run.saver.close()
    run.engine.close()
    gc.collect()
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()
    run.engine = build_engine(run.plan, run.world, run.log, run.state.step, run.num_last_blocks or 1)
    run.stage = run.plan.config.fine_tuning.stage_at(run.state.step)
    run.saver = run.saver.for_engine(run.engine)
    rehearse(run)
    if source is None:
        read_weights(run)
    else:
        run.enter("read the checkpoint", 3)
        restore(run, replace(source, older=()))


def num_last_blocks(plan: ResolvedRun, checkpoint: Path | None) -> int | None:
    """As written, or where that is auto as it was measured for the run of this checkpoint; None where it was not yet."""
    blocks = plan.config.fine_tuning.num_last_blocks
    if blocks != "auto":
        return blocks
    return commit.read_manifest(checkpoint).get("num_last_blocks") if checkpoint else None


def measure_last_blocks(run: Run, source: Continuation | None) -> None:
    """Choose how many of the last blocks to train, tell the rule, and go on with an engine that trains them.

    The weights from `source`, or the initial ones, must be loaded: they are what is measured. Every checkpoint has the
    answer.
    """
    run.log.event("measuring", "measuring the untouched model, to choose how many of its last blocks to train")
    choice = choose(run.plan, {name: one.loss for name, one in evaluate_sets(run, may_stop=False).items()})
    run.log.event("num_last_blocks", choice.text, **choice.as_dict())
    run.num_last_blocks = choice.num_last_blocks
    rebuild(run, source)
