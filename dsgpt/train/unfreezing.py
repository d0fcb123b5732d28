"""What is trained changes while a run trains: gradual unfreezing, and the number of last blocks that is measured first.

At a step of fine_tuning.unfreeze_at the state is committed, the engine is built anew with more parameters to train, and the
commit is read back into it: a resume inside the process. What was trained keeps its moments and its optimizer steps, what is
new begins with none. DeepSpeed cannot take parameters in while it runs, at any stage; so the cost is one commit and one
start of the engine for each unfreezing, and memory is never that of two engines.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsgpt.checkpoint.saver import Saver
from dsgpt.distributed import World
from dsgpt.train.build import build_engine
from dsgpt.train.initial import read_weights
from dsgpt.train.last_blocks import choose
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.resume import last_good, restore
from dsgpt.train.save import save
from dsgpt.train.state import write_atomically
from dsgpt.train.validation import evaluate_sets

if TYPE_CHECKING:
    from dsgpt.train.loop import Run

CHOSEN = "num_last_blocks.json"


def engine_fits(run: Run) -> bool:
    """Whether the engine trains what the next step is to train."""
    return run.stage == run.plan.config.fine_tuning.stage_at(run.state.step)


def unfreeze(run: Run) -> None:
    """Commit this step, and go on with an engine that trains what the next step is to train."""
    save(run, required=True)
    rebuild(run)
    run.log.event("unfrozen", step=run.state.step, stage=run.stage)


def rebuild(run: Run, from_initial: bool = False) -> None:
    """Build the engine anew for this step, and read the newest checkpoint, or the initial weights, into it."""
    from dsgpt.train.loop import rehearse

    plan, saver = run.plan, run.saver
    run.enter("build the model", 3)
    saver.close()
    run.engine.close()
    gc.collect()
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()
    run.engine = build_engine(plan, run.world, run.log, run.state.step, run.num_last_blocks)
    run.stage = plan.config.fine_tuning.stage_at(run.state.step)
    run.saver = Saver(
        run.engine, run.world, saver.checkpoints_dir, saver.guard, saver.asynchronous, saver.patience_seconds
    )
    rehearse(run)
    if from_initial:
        read_weights(run)
    else:
        run.enter("read the checkpoint", 3)
        restore(run, replace(last_good(run), older=()))


def num_last_blocks(plan: ResolvedRun, world: World) -> int:
    """As written, or as it was measured for this run; before that 1, which any model has. A collective."""
    blocks = plan.config.fine_tuning.num_last_blocks
    if blocks != "auto":
        return blocks
    found = None
    if world.is_main and (plan.output_dir / CHOSEN).exists():
        found = json.loads((plan.output_dir / CHOSEN).read_text("utf-8"))["num_last_blocks"]
    return int(world.broadcast_object(found) or 1)


def choose_last_blocks(run: Run) -> bool:
    """Measure how many of the last blocks to train, tell the rule, and keep the answer with the run.

    Returns whether the engine must be built anew. The untouched weights must be loaded.
    """
    path: Path = run.plan.output_dir / CHOSEN
    if run.world.broadcast_object(path.exists() if run.world.is_main else None):
        return False
    run.log.event("measuring", "measuring the untouched model, to choose how many of its last blocks to train")
    choice = choose(run.plan, {name: one.loss for name, one in evaluate_sets(run, may_stop=False).items()})
    if run.world.is_main:
        write_atomically(path, json.dumps(choice.as_dict(), indent=2) + "\n")
    run.log.event("num_last_blocks", choice.text, **choice.as_dict())
    run.num_last_blocks, before = choice.num_last_blocks, run.num_last_blocks
    return before != run.num_last_blocks
