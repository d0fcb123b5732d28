"""Stopping, agreed by all ranks: what a rank wishes after a step, and how a run leaves that was asked to.

Any rank can be asked, by a signal, a file or the time limit; the ranks agree at points that all of them reach: the stages of
a start, the end of a step, after a save, and every batch of an evaluation. Between two such points nothing long happens but
a step or a save. What is stopped in a start has nothing new to commit and leaves at once.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from dsgpt.checkpoint import starts
from dsgpt.distributed import World
from dsgpt.errors import ConfigError, Preempted, Stopped
from dsgpt.process import WARNINGS, StopRequest
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.step import Wishes
from dsgpt.train.time_limit import TimeLimit
from dsgpt.verdict import STOPPED_AT_START, read_verdict

if TYPE_CHECKING:
    from dsgpt.train.loop import Run

TIME_LIMIT = "the time limit"
WARNED_AT_START = "warned_at_start"
_AHEAD_OF_TIME = {TIME_LIMIT, *(signal.Signals(number).name for number in WARNINGS)}


def look_at_clock(stop: StopRequest, limit: TimeLimit, world: World) -> StopRequest:
    """Rank 0 does for all."""
    if not stop.requested and world.is_main and limit.is_near():
        stop.requested = TIME_LIMIT
    return stop


def wishes(run: Run) -> Wishes:
    """What this rank wants to happen after the step; all ranks' wishes are added up."""
    minutes = run.plan.config.checkpoint.save_interval_minutes
    due = run.world.is_main and minutes is not None and time.monotonic() - run.saved_at >= 60 * minutes
    save = due or run.controls.asks("SAVE")
    preempt = look_at_clock(run.stop, run.limit, run.world).poll()
    return Wishes(preempt, run.controls.asks("STOP"), save, not run.saver.is_written())


def is_agreed(run: Run) -> bool:
    """Whether any rank was asked to stop by now: a collective."""
    return run.world.max(float(look_at_clock(run.stop, run.limit, run.world).is_asked()))[0] > 0


def ended(run: Run, wanted: Wishes) -> Preempted | Stopped:
    where = f"stopped at step {run.state.step} of {run.plan.max_steps}, committed"
    if run.state.step == run.plan.last_step:
        return Stopped(where, seen=f"run.stop_at_step={run.plan.last_step}", do="without it the same command continues")
    if wanted.preempt and not wanted.stop:
        do = "start the same command again (without resume=) to continue"
        return Preempted(where, seen=run.stop.requested or "asked on another rank", do=do)
    return Stopped(where, seen="the file STOP in the run folder", do="start the same command again to continue")


def leave_start(plan: ResolvedRun, world: World, stop: StopRequest, limit: TimeLimit) -> None:
    """Between the stages of a start: raise Preempted on all ranks where one was asked to stop. A collective.

    Raises ConfigError where a warning ahead of the time limit ended the start before this one as well: then the limit leaves
    no time to train, however often it is started again.
    """
    asked = look_at_clock(stop, limit, world).is_asked()
    wanted, warned = world.max(float(asked), float(stop.requested in _AHEAD_OF_TIME))
    if not wanted:
        return
    if warned and world.broadcast_object(world.is_main and _was_warned_before(plan, world)):
        raise ConfigError(
            "the time limit leaves no time to train",
            seen=f"{stop.requested or 'a warning'} came before the first step, in two starts in a row",
            do="a longer --time, or a shorter lead in --signal",
        )
    error = Preempted(
        "stopped before the first step: there is nothing new to commit",
        seen=stop.requested or "asked on another rank",
        do="start the same command again to continue",
    )
    error.cause = WARNED_AT_START if warned else STOPPED_AT_START
    raise error


def _was_warned_before(plan: ResolvedRun, world: World) -> bool:
    earlier = [start for start in starts.read_starts(plan.output_dir) if start.attempt != world.attempt]
    verdict = read_verdict(plan.output_dir / "logs" / earlier[-1].attempt) if earlier else None
    return verdict is not None and verdict.cause == WARNED_AT_START
