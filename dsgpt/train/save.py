"""Saving the current step, committing it now or when its files are written, and what stays on the disk afterwards.

A save that fails is reported and training goes on, unless the run ends here or it is the third in a row. Retention runs on
rank 0 after the commit.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsgpt.checkpoint import retention
from dsgpt.errors import SaveError
from dsgpt.model.lora import has_transposed
from dsgpt.train.folder import versions
from dsgpt.train.order import data_identity

if TYPE_CHECKING:
    from dsgpt.train.loop import Run

MAX_CONSECUTIVE_FAILED_SAVES = 3
POLL_SECONDS = 1.0


class Controls:
    """The files a person touches in the run folder: SAVE commits the current step, STOP commits and ends the run well.

    Rank 0 looks once a second at most, and removes a file once it is obeyed: SAVE once the save was tried.
    """

    def __init__(self, folder: Path, enabled: bool):
        self._folder, self._enabled = folder, enabled
        self._looked, self._found = 0.0, {"SAVE": False, "STOP": False}

    def asks(self, name: str) -> bool:
        if self._enabled and time.monotonic() - self._looked >= POLL_SECONDS:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError):  # a folder that cannot be seen just now asks for nothing
                self._found = {name: (self._folder / name).exists() for name in self._found}
        return self._found[name]

    def obeyed(self, name: str) -> None:
        if self._enabled:
            self._found[name] = False
            with contextlib.suppress(OSError):  # mostly it is not there; a read-only folder is told of by the save
                (self._folder / name).unlink()


def save(run: Run, required: bool) -> None:
    """Save the current step on all ranks; with checkpoint.asynchronous it is committed later, unless it is `required`.

    Raises SaveError where the save fails and is `required` or the third in a row; LockedError where the folder was lost.
    """
    finish_save(run)
    if run.last_committed == run.state.step:
        return
    began, run.saved_at = time.perf_counter(), time.monotonic()
    run.enter("save", 3)
    try:
        run.saver.begin(manifest(run), run.world.attempt, wait=required)
    except SaveError as error:
        _failed(run, error, required, run.state.step)
        return
    if run.saver.asynchronous and not required:
        seconds = time.perf_counter() - began
        run.log.event("saving", step=run.state.step, stall_seconds=seconds)
    else:
        finish_save(run, required)


def finish_save(run: Run, required: bool = False) -> None:
    """Wait for the save that is under way, where one is, commit it, and delete what the settings do not keep."""
    pending = run.saver.pending
    if pending is None:
        return
    began = time.perf_counter()
    run.enter("save", 3)
    try:
        saved = run.saver.finish()
    except SaveError as error:
        _failed(run, error, required, pending.step)
        return
    run.last_committed, run.failed_saves = saved.step, 0
    run.limit.saved(saved.seconds)
    run.committed_here, run.spikes.rollbacks = True, 0
    if saved.retries:
        text = f"warning: {saved.retries} writes of step {saved.step} failed and were tried again with success"
        run.log.event("save_retried", text, step=saved.step, retries=saved.retries)
    if saved.takeovers:
        text = f"warning: {saved.takeovers} writer processes were lost; the ranks wrote step {saved.step} themselves"
        text += " and save synchronously from now on"
        run.log.event("save_writer_lost", text, step=saved.step, writers=saved.takeovers)
    stall = time.perf_counter() - began
    text = f"committed {saved.path} in {saved.seconds:.1f} s"
    run.log.event("committed", text, step=saved.step, seconds=saved.seconds, stall_seconds=stall)
    if run.world.is_main:
        if run.evaluated and run.evaluated[0] == saved.step:
            record_evaluation(run, *run.evaluated)
        settings = run.plan.config.checkpoint
        try:
            deleted = retention.prune(run.checkpoints_dir, settings.keep_last, settings.keep_every, settings.keep_best)
            if deleted:
                run.log.event("pruned", steps=deleted)
        except OSError as error:
            run.log.event("prune_failed", f"warning: old checkpoints were not deleted: {error}")
    run.tell_watchdog()
    run.world.barrier()


def _failed(run: Run, error: SaveError, required: bool, step: int) -> None:
    run.failed_saves += 1
    run.log.event("save_failed", f"warning: {error}", step=step, in_a_row=run.failed_saves)
    if required or run.failed_saves >= MAX_CONSECUTIVE_FAILED_SAVES:
        raise error


def record_evaluation(run: Run, step: int, result: dict[str, Any]) -> None:
    """Keep the validation result with the checkpoint of its step, where there is one, or as soon as there is. Rank 0."""
    run.evaluated = step, result
    if run.world.is_main and run.last_committed == step:
        try:
            retention.record_evaluation(run.checkpoints_dir / f"step-{step:08d}", result)
        except OSError as error:
            run.log.event("evaluation_not_kept", f"warning: the evaluation was not kept with its checkpoint: {error}")


def lora_manifest(run: Run) -> dict[str, Any]:
    """What whoever reads the adapters must know; `transposed`: the matrices beside them are (in, out)."""
    return {**run.plan.config.fine_tuning.lora.model_dump(mode="json"), "transposed": has_transposed(run.engine.module)}


def manifest(run: Run) -> dict[str, Any]:
    return {
        "step": run.state.step,
        "attempt": run.world.attempt,
        "counters": run.state.counters(),
        "learning_rate": run.learning_rate,
        "recent_losses": run.spikes.recent,
        "skipped_samples": run.spikes.skipped,
        "data": data_identity(run.plan, run.stream.segments),
        "model": run.plan.model.model_dump(mode="json"),
        **({"lora": lora_manifest(run)} if run.plan.config.fine_tuning.train == "lora" else {}),
        **({"num_last_blocks": run.num_last_blocks} if run.plan.config.fine_tuning.train == "last_blocks" else {}),
        **({"unfrozen": run.unfrozen} if run.unfrozen else {}),
        "state_kinds": list(run.engine.state_kinds),
        "world_size": run.world.size,
        "zero_stage": run.engine.stage,
        "dtype": run.plan.config.training.dtype,
        "loss_scale": run.engine.loss_scale,
        "versions": versions(),
    }
