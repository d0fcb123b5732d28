"""A run from its first start to its last: prepare, resume, step, log, evaluate, save, stop.

`train` is policy, `_run_steps` is mechanism. Every rank calls everything here in the same order; what only rank 0 does is
writing. A stop is asked of any rank at any time and agreed by all at the end of a step; they then commit that step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsgpt.checkpoint.saver import Saver
from dsgpt.data.dataset import Samples
from dsgpt.data.mixture import MixtureStream, Segment
from dsgpt.distributed import World
from dsgpt.engine import Engine
from dsgpt.errors import ConfigError, NumericalError
from dsgpt.optimizer import learning_rate
from dsgpt.process import StopRequest
from dsgpt.train.build import build_engine, rehearse
from dsgpt.train.folder import forecast_space, prepare_folder, write_resolved
from dsgpt.train.initial import read_weights
from dsgpt.train.left_out import LeftOutSteps
from dsgpt.train.order import first_segments
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.resume import Continuation, last_good, open_run, restore
from dsgpt.train.save import Controls, finish_save, save
from dsgpt.train.spikes import MAX_ROLLBACKS_IN_A_ROW, LossSpikes
from dsgpt.train.startup import examine_nodes, tell_startup
from dsgpt.train.state import RunLog, TrainState
from dsgpt.train.step import StepLoader, StepReport, Wishes, train_step
from dsgpt.train.stopping import ended, is_agreed, leave_start, wishes
from dsgpt.train.time_limit import TimeLimit
from dsgpt.train.unfreezing import engine_fits, measure_last_blocks, num_last_blocks, rebuild, unfreeze
from dsgpt.train.validation import evaluate
from dsgpt.units import format_bytes, format_count, format_seconds
from dsgpt.watchdog import Heartbeat


@dataclass
class Run:
    """Everything the loop holds on to."""

    plan: ResolvedRun
    world: World
    engine: Engine
    state: TrainState
    log: RunLog
    stop: StopRequest
    stream: MixtureStream
    validation: dict[str, Samples]
    spikes: LossSpikes
    controls: Controls
    saver: Saver
    limit: TimeLimit = field(default_factory=TimeLimit)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    last_committed: int = -1
    committed_here: bool = False
    failed_saves: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    learning_rate: float | None = None  # of the last step
    evaluated: tuple[int, dict[str, Any]] | None = None  # step and result of the last evaluation
    num_last_blocks: int | None = None  # fine_tuning.num_last_blocks; None until it is measured, where that is auto
    stage: int = 0  # how many unfreezings the engine was built with
    unfrozen: list[int] = field(default_factory=list)  # optimizer steps taken before each unfreezing

    @property
    def checkpoints_dir(self) -> Path:
        return self.plan.output_dir / "checkpoints"

    @property
    def loss_scale(self) -> float | None:
        numbers = self.engine.loss_scale
        return None if numbers is None else numbers["cur_scale"]

    def enter(self, phase: str, times: int = 1) -> None:
        """Tell the watchdog what comes now, and that it may take so many times run.hang_timeout_seconds."""
        self.heartbeat.phase(phase, self.state.step, times * self.plan.config.run.hang_timeout_seconds)

    def go_on(self, segments: Sequence[Segment]) -> None:
        """Read in this order from now on."""
        sources = [one.dataset for one in self.stream.streams]
        self.stream = MixtureStream(sources, segments, self.plan.config.run.seed)

    def tell_watchdog(self) -> None:
        """What belongs into the report of a sudden end."""
        told = {"last_committed": self.last_committed, "committed_here": self.committed_here}
        self.heartbeat.tell(use=f"peak {format_bytes(self.engine.peak_memory_bytes())} per rank", **told)


def train(
    plan: ResolvedRun,
    world: World,
    stop: StopRequest,
    heartbeat: Heartbeat | None = None,
    guard: Callable[[], None] = lambda: None,
) -> TrainState:
    """Train until `max_steps`; raises Preempted or Stopped after committing the step at which a stop was agreed."""
    changes = prepare_folder(plan, world)
    log = RunLog(plan.output_dir, world.attempt, enabled=world.is_main)
    if world.is_main:
        stop.watch(plan.output_dir / "logs" / world.attempt / "stop-request")
    log.event("start", plan.describe(), world_size=world.size, max_steps=plan.max_steps, host=world.host)
    heartbeat = heartbeat or Heartbeat()
    nodes = examine_nodes(plan, world, log, heartbeat)
    heartbeat.phase("choose the checkpoint", 0, 3 * plan.config.run.hang_timeout_seconds)
    continuation = open_run(plan, world, log)
    heartbeat.tell(failed_starts=continuation.failed_starts)
    limit = TimeLimit.of_job()
    leave_start(plan, world, stop, limit)
    run = _build(plan, world, log, stop, limit, heartbeat, guard, continuation)
    leave_start(plan, world, stop, limit)
    rehearse(run)
    leave_start(plan, world, stop, limit)
    if continuation.checkpoint is None and world.is_main and (plan.output_dir / "metrics.jsonl").stat().st_size:
        log.supersede(0)  # an earlier start died before its first commit
    if continuation.checkpoint is not None:
        run.enter("read the checkpoint", 3)
        restore(run, continuation)
        if not engine_fits(run):  # an older checkpoint than was looked for, from before an unfreezing
            rebuild(run, last_good(run))
    elif plan.config.model.init_from != "scratch":
        read_weights(run)
    if plan.config.fine_tuning.train == "last_blocks" and run.num_last_blocks is None:
        measure_last_blocks(run, continuation if continuation.checkpoint else None)
    write_resolved(plan, world, log, changes, nodes)
    if run.state.step >= plan.last_step:
        _end_at_once(run, continuation.forked)
        return run.state
    forecast_space(plan, run.engine, run.saver.frozen_bytes, world, log)
    leave_start(plan, world, stop, limit)
    run.tell_watchdog()
    _run_steps(run)
    return run.state


def _end_at_once(run: Run, forked: bool) -> None:
    """No step is left to take. A fork that is to stop at the very step it was forked at commits that state as it was read."""
    step, plan = run.state.step, run.plan
    if forked and step != plan.config.run.stop_at_step:
        seen = f"forked at step {step}, training.max_steps is {plan.max_steps}"
        seen += f", run.stop_at_step {plan.last_step}" if plan.last_step < plan.max_steps else ""
        key = "training.max_steps" if plan.max_steps <= step else "run.stop_at_step"
        raise ConfigError("the fork has nothing to train", seen=seen, do=f"a larger {key}")
    if forked:
        try:
            save(run, required=True)
        finally:
            run.saver.close()
    run.log.event("finished", f"step {step} of {plan.max_steps} is reached already: nothing to train")


def _build(
    plan: ResolvedRun,
    world: World,
    log: RunLog,
    stop: StopRequest,
    limit: TimeLimit,
    heartbeat: Heartbeat,
    guard: Callable[[], None],
    continuation: Continuation,
) -> Run:
    config = plan.config
    heartbeat.phase("open the data", 0, 3 * config.run.hang_timeout_seconds)
    sources = [source.open(config, plan.model.vocab_size) for source in plan.data.train]
    stream = MixtureStream(sources, first_segments(plan), config.run.seed)
    validation = {source.name: source.open(config, plan.model.vocab_size) for source in plan.data.validation}
    if plan.data.foreign:
        text = "warning: nothing says which tokenizer made {}; ids are compared with the vocabulary as they are read"
        log.event("tokenizer_unknown", text.format(", ".join(plan.data.foreign)), sources=plan.data.foreign)
    log.event("building_model")
    heartbeat.phase("build the model", 0, 3 * config.run.hang_timeout_seconds)
    step = continuation.step
    blocks = num_last_blocks(plan, continuation.checkpoint)
    engine = build_engine(plan, world, log, step, blocks or 1)
    spikes = LossSpikes(config.training.loss_spike)
    spikes.skipped = world.broadcast_object(LossSpikes.read(plan.output_dir) if world.is_main else None)
    controls = Controls(plan.output_dir, enabled=world.is_main)
    patience = config.run.hang_timeout_seconds or math.inf
    folder = plan.output_dir / "checkpoints"
    saver = Saver(engine, world, folder, guard, config.checkpoint.asynchronous, patience)
    run = Run(
        plan, world, engine, TrainState(), log, stop, stream, validation, spikes, controls, saver, limit, heartbeat
    )
    run.num_last_blocks, run.stage = blocks, config.fine_tuning.stage_at(step)
    return run


def _run_steps(run: Run) -> None:
    plan, world = run.plan, run.world
    training, seed = plan.config.training, plan.config.run.seed
    loader = StepLoader(
        run.stream, world, training.global_batch_size, training.micro_batch_size_per_gpu, run.spikes.next_start
    )
    meter, evidence = Meter(), plan.output_dir / "logs" / world.attempt
    left_out = LeftOutSteps(run.log, world, evidence, seed)
    try:
        while run.state.step < plan.max_steps:
            if not engine_fits(run):
                unfreeze(run)
                meter.restart()
            began = time.monotonic()
            run.enter("load data" if run.state.step else "load the first data")
            start, micro_batches = loader.load(run.state.consumed_samples)
            run.enter("step")
            run.learning_rate = learning_rate(plan.config.optimizer, run.state.step, plan.max_steps)
            report = train_step(
                run.engine,
                world,
                micro_batches,
                seed=seed,
                step=run.state.step,
                lr=run.learning_rate,
                ask=lambda: wishes(run),
            )
            _count(run, report, start)
            if meter.steps == 0:
                run.log.event("first_step", step=run.state.step, loss=report.loss)
                tell_startup(world, run.heartbeat, run.log)
            else:  # the first one compiles and warms up
                run.limit.stepped(time.monotonic() - began)
            meter.count(training.tokens_per_step)
            if not report.wishes.writing:
                finish_save(run)  # one that is under way, if any
            samples = run.stream.sample_ids(start, training.global_batch_size)
            left_out.check(report, run.state.step, run.last_committed, run.loss_scale, samples)
            if run.spikes.is_spike(report.loss) and _answer_spike(run, report, start, samples):
                loader.go_on(run.stream)
                meter.restart()
                continue
            last = run.state.step == plan.max_steps
            if run.state.step % plan.config.logging.log_interval == 0 or last or run.state.step == 1:
                _log_step(run, report, meter)
            # Saved before evaluated: an evaluation that fails or takes long must not cost the checkpoint (one that is
            # still being written is lost with a start that fails, as at any other time).
            stopping = report.wishes.preempt or report.wishes.stop or run.state.step == plan.last_step
            due = run.state.step % plan.config.checkpoint.save_interval == 0
            saving = last or stopping or report.wishes.save or due
            if saving:
                save(run, required=last or stopping)
                run.controls.obeyed("SAVE")  # also where it failed: tried at every step, the third would end the run
                meter.restart()
            if report.wishes.stop:
                run.controls.obeyed("STOP")
            if stopping and not last:
                raise ended(run, report.wishes)
            interval = plan.config.logging.eval_interval
            evaluating = last or bool(interval and run.state.step % interval == 0)
            if evaluating:
                evaluate(run)
                meter.restart()
            # A save or an evaluation may have taken long; who was asked meanwhile need not take another step.
            if (saving or evaluating) and not last and is_agreed(run):
                save(run, required=True)
                raise ended(run, Wishes(preempt=True))
        run.log.event("finished", f"finished: step {run.state.step}", **run.state.counters())
    except NumericalError:
        finish_save(run)  # this step is bad, the one that is being saved was not
        raise
    finally:
        loader.close()
        run.saver.close()


def _count(run: Run, report: StepReport, start: int) -> None:
    state, training = run.state, run.plan.config.training
    state.step += 1
    state.consumed_samples = start + training.global_batch_size
    state.consumed_tokens += training.tokens_per_step
    state.optimizer_steps += report.applied
    state.skipped_steps += not report.applied


def _answer_spike(run: Run, report: StepReport, start: int, samples: Sequence[int]) -> bool:
    """Tell of a spike; with `action: rollback` go back and leave its samples out. Returns whether the run went back."""
    state, training, config = run.state, run.plan.config.training, run.plan.config.training.loss_spike
    size = training.global_batch_size
    run.log.event(
        "loss_spike",
        f"warning: loss spike at step {state.step}: {report.loss:.4f}",
        step=state.step,
        loss=report.loss,
        first_sample=start,
        sample_ids=[int(i) for i in samples],
    )
    finish_save(run)
    if config.action == "warn" or run.last_committed < 0:  # before the first checkpoint there is nothing to go back to
        return False
    run.spikes.rollbacks += 1
    if run.spikes.rollbacks > MAX_ROLLBACKS_IN_A_ROW:
        raise NumericalError(
            f"the loss spikes again after {MAX_ROLLBACKS_IN_A_ROW} rollbacks",
            seen=f"step {state.step}: loss {report.loss}",
            do="lower optimizer.learning_rate, or look at the samples that the event loss_spike names",
        )
    first = max(0, start - (config.skip_steps - 1) * size)
    run.spikes.skip(run.plan.output_dir, first, start + size - first, write=run.world.is_main)
    run.log.event("spike_rollback", f"going back to step {run.last_committed} and leaving samples out", first=first)
    run.enter("read the checkpoint", 3)
    restore(run, last_good(run))
    if not engine_fits(run):
        rebuild(run, last_good(run))
    return True


class Meter:
    """Tokens per second since the last log line; evaluation and saving do not count."""

    def __init__(self) -> None:
        self.steps, self.tokens, self._since = 0, 0, time.perf_counter()

    def count(self, tokens: int) -> None:
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens

    def restart(self) -> None:
        self.tokens, self._since = 0, time.perf_counter()

    def rate(self) -> float:
        rate = self.tokens / max(1e-9, time.perf_counter() - self._since)
        self.restart()
        return rate


def _log_step(run: Run, report: StepReport, meter: Meter) -> None:
    rate, state, plan, lr = meter.rate(), run.state, run.plan, run.learning_rate or 0.0
    left = (plan.max_steps - state.step) * plan.config.training.tokens_per_step / max(rate, 1e-9)
    run.log.metrics(
        f"step {state.step}/{plan.max_steps}  loss {report.loss:.4f}  lr {lr:.3g}  grad norm {report.gradient_norm:.3g}  "
        f"{format_count(rate)} tokens/s  {format_seconds(left)} left",
        step=state.step,
        max_steps=plan.max_steps,
        loss=report.loss,
        learning_rate=lr,
        gradient_norm=report.gradient_norm,
        **({} if report.loss_scale is None else {"loss_scale": report.loss_scale}),
        tokens_per_second=rate,
        consumed_samples=state.consumed_samples,
        consumed_tokens=state.consumed_tokens,
        data_crc=report.data_crc,
        peak_memory_bytes=run.engine.peak_memory_bytes(),
    )
