"""A run from its first start to its last: prepare, resume, step, log, evaluate, save, stop.

`train` is policy, `_run_steps` is mechanism. Every rank calls everything here in the same order; what only rank 0 does is
writing. A stop is asked of any rank at any time and agreed by all at the end of a step; they then commit that step.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dsgpt
from dsgpt.checkpoint import commit
from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.store import find_checkpoint, load_state, save_checkpoint
from dsgpt.checkpoint.weights import initial_weights
from dsgpt.config import to_yaml
from dsgpt.data.dataset import BlockDataset, SampleOrder
from dsgpt.distributed import World
from dsgpt.engine import Engine, construct
from dsgpt.errors import CheckpointError, ConfigError, LockedError, Preempted, SaveError
from dsgpt.evaluate import Evaluation, evaluate_split
from dsgpt.model.gpt import GPT
from dsgpt.model.recompute import apply_activation_checkpointing
from dsgpt.optimizer import build_optimizer, learning_rate
from dsgpt.process import StopRequest
from dsgpt.train.left_out import LeftOutSteps
from dsgpt.train.resolve import ResolvedRun, check_same_run
from dsgpt.train.state import RunLog, TrainState, write_atomically
from dsgpt.train.step import StepLoader, StepReport, largest_micro_batch, train_step
from dsgpt.units import format_bytes, format_count, format_seconds

MAX_CONSECUTIVE_FAILED_SAVES = 3


@dataclass
class Run:
    """Everything the loop holds on to."""

    plan: ResolvedRun
    world: World
    engine: Engine
    state: TrainState
    log: RunLog
    stop: StopRequest
    dataset: BlockDataset
    validation: BlockDataset | None
    last_committed: int = -1
    failed_saves: int = 0

    @property
    def checkpoints_dir(self) -> Path:
        return self.plan.output_dir / "checkpoints"


def train(plan: ResolvedRun, world: World, stop: StopRequest) -> TrainState:
    """Train until `max_steps`, or raise Preempted after committing the step at which a stop was agreed."""
    changes = _prepare_folder(plan, world)
    log = RunLog(plan.output_dir, world.attempt, enabled=world.is_main)
    if world.is_main:
        stop.watch(plan.output_dir / "logs" / world.attempt / "stop-request")
    log.event("start", plan.describe(), world_size=world.size, max_steps=plan.max_steps, host=world.host)
    checkpoint = _choose_checkpoint(plan, world, log)
    dataset = BlockDataset(plan.dataset_path, "train", plan.config.training.seq_length, plan.config.data.document_mask)
    run = Run(plan, world, _build_engine(plan, world, log), TrainState(), log, stop, dataset, _validation(plan))
    _rehearse(run)
    if checkpoint is not None:
        _resume(run, checkpoint)
        _set_later_steps_aside(run, checkpoint)
    elif plan.config.model.init_from != "scratch":
        weights = initial_weights(plan.config.model.init_from, plan.model)
        run.engine.load(weights.read, ("master",), 0)
        run.engine.load_buffers(weights.buffers)
    _write_resolved(run, changes)
    if run.state.step >= plan.max_steps:
        log.event("finished", f"step {run.state.step} of {plan.max_steps} is reached already: nothing to train")
        return run.state
    _run_steps(run)
    return run.state


def _prepare_folder(plan: ResolvedRun, world: World) -> list[str]:
    """See that the folder can be used and holds no other run; returns what the config changes. Rank 0 only."""
    error, changes = None, []
    if world.is_main:
        try:
            for name in ("checkpoints", f"logs/{world.attempt}"):
                (plan.output_dir / name).mkdir(parents=True, exist_ok=True)
            changes = check_same_run(plan)
            commit.remove_unfinished(plan.output_dir / "checkpoints")
        except OSError as problem:
            error = LockedError(
                "the run folder cannot be written", seen=str(problem), do="choose another run.output_dir"
            )
        except ConfigError as problem:
            error = problem
    world.agree(error, "preparing the run's folder")
    return changes


def _write_resolved(run: Run, changes: list[str]) -> None:
    """Write what is resolved, and keep the tokenizer with the run: after the resume worked, before step 1. Rank 0 only."""
    error, plan, world = None, run.plan, run.world
    if world.is_main:
        try:
            for difference in changes:
                run.log.event("config_changed", f"config changed since the last start: {difference}")
            write_atomically(plan.output_dir / "config.yaml", to_yaml(plan.config))
            write_atomically(plan.output_dir / "ds_config.json", json.dumps(plan.deepspeed, indent=2) + "\n")
            write_atomically(plan.output_dir / "environment.json", json.dumps(_environment(world), indent=2) + "\n")
            if not (plan.output_dir / "tokenizer").exists():
                tmp = plan.output_dir / ".tmp-tokenizer"
                shutil.rmtree(tmp, ignore_errors=True)
                shutil.copytree(plan.dataset_path / plan.dataset.tokenizer.path, tmp)
                tmp.rename(plan.output_dir / "tokenizer")
        except OSError as problem:
            error = LockedError(
                "the run folder cannot be written", seen=str(problem), do="free space, or choose another"
            )
    world.agree(error, "writing the run's config")


def _environment(world: World) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers", "safetensors", "numpy")}
    return {"dsgpt": dsgpt.__version__, "python": sys.version.split()[0], **packages} | {
        "platform": platform.platform(),
        "host": world.host,
        "world_size": world.size,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
    }


def _choose_checkpoint(plan: ResolvedRun, world: World, log: RunLog) -> Path | None:
    """The checkpoint to continue from, or None to start at step 0; never step 0 where the run has committed work."""
    folder, mode = plan.output_dir / "checkpoints", plan.config.resume
    if mode == "fresh":
        if world.broadcast_object(bool(commit.list_committed(folder))):
            raise ConfigError(
                "resume=fresh, but the folder holds committed work",
                seen=str(folder),
                do="use another run.output_dir, or remove the folder yourself",
            )
        return None
    step = mode if isinstance(mode, int) else None
    checkpoint, rejected = find_checkpoint(folder, world, plan.config.checkpoint.verify, step)
    for reason in rejected:
        log.event("checkpoint_rejected", f"warning: passed over a damaged checkpoint: {reason}", reason=reason)
    if checkpoint is None and mode == "must":
        raise CheckpointError("resume=must, but nothing is committed", seen=str(folder), do="resume=auto to start at 0")
    return checkpoint


def _set_later_steps_aside(run: Run, checkpoint: Path) -> None:
    """Checkpoints after the one we continue from belong to another future: move them out of the way, keep them."""
    error, folder = None, run.checkpoints_dir
    if run.world.is_main:
        try:
            later = [path for _, path in commit.list_committed(folder) if path.name > checkpoint.name]
            if later:
                numbers = [int(path.name.partition("-")[2] or 0) for path in folder.glob("abandoned-*")]
                aside = folder / f"abandoned-{max(numbers, default=0) + 1}"
                aside.mkdir()
                for path in later:
                    path.rename(aside / path.name)
                names = [path.name for path in later]
                run.log.event("set_aside", f"moved {len(later)} later checkpoints to {aside}", steps=names)
        except OSError as problem:
            error = LockedError("later checkpoints cannot be set aside", seen=str(problem))
    run.world.agree(error, "setting later checkpoints aside")


def _build_engine(plan: ResolvedRun, world: World, log: RunLog) -> Engine:
    log.event("building_model")
    torch.manual_seed(plan.config.run.seed)
    model = construct(lambda: GPT(plan.model), plan.deepspeed)
    apply_activation_checkpointing(model, plan.config.training.activation_checkpointing)
    return Engine(model, build_optimizer(model, plan.config.optimizer), plan.deepspeed, world)


def _validation(plan: ResolvedRun) -> BlockDataset | None:
    if plan.validation is None:
        return None
    return BlockDataset(*plan.validation, plan.config.training.seq_length, plan.config.data.document_mask)


def _rehearse(run: Run) -> None:
    training = run.plan.config.training
    run.log.event("rehearsing", "running the largest possible step once, to see that it fits")
    batch = largest_micro_batch(
        run.plan.model.vocab_size, training.seq_length, training.micro_batch_size_per_gpu, run.world.device
    )
    run.engine.rehearse(batch)
    peak = run.world.max(run.engine.peak_memory_bytes())[0]
    run.log.event("rehearsed", f"it fits: peak memory {format_bytes(peak)} per rank", peak_memory_bytes=peak)


def _resume(run: Run, checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    saved = reader.manifest["data"]
    ours = _data_identity(run)
    if saved != ours:
        seen = "; ".join(
            f"{key}: checkpoint {saved.get(key)}, now {ours[key]}" for key in ours if saved.get(key) != ours[key]
        )
        raise CheckpointError(
            "the samples would not be those the checkpoint's run goes through",
            seen=seen,
            do="restore these, or start another run with model.init_from=checkpoint:" + str(checkpoint),
        )
    load_state(run.engine, reader)
    if reader.manifest.get("loss_scale"):
        run.engine.loss_scale = reader.manifest["loss_scale"]
    elif run.engine.loss_scale:
        was, scale = reader.manifest.get("dtype"), _loss_scale(run)
        run.log.event(
            "loss_scale_reset", f"the checkpoint is {was} and has no loss scale: starting at {scale:g}", new=scale
        )
    run.state = TrainState(**reader.manifest["counters"])
    run.last_committed = run.state.step
    text = f"continuing from step {run.state.step} ({checkpoint})"
    if run.plan.config.model.init_from != "scratch":
        text += f"; model.init_from={run.plan.config.model.init_from} is ignored"
    run.log.event("resumed", text, step=run.state.step)


def _loss_scale(run: Run) -> float | None:
    numbers = run.engine.loss_scale
    return None if numbers is None else numbers["cur_scale"]


def _data_identity(run: Run) -> dict[str, Any]:
    return {
        "fingerprint": run.plan.dataset.fingerprint,
        "tokenizer_sha256": run.plan.dataset.tokenizer.sha256,
        "num_samples": run.dataset.num_samples,
        "seq_length": run.plan.config.training.seq_length,
        "global_batch_size": run.plan.config.training.global_batch_size,
        "document_mask": run.plan.config.data.document_mask,
        "seed": run.plan.config.run.seed,
    }


def _run_steps(run: Run) -> None:
    plan, state, world = run.plan, run.state, run.world
    training, seed = plan.config.training, plan.config.run.seed
    order = SampleOrder(run.dataset.num_samples, seed, run.plan.dataset.fingerprint)
    loader = StepLoader(run.dataset, order, world, training.global_batch_size, training.micro_batch_size_per_gpu)
    meter, left_out = Meter(), LeftOutSteps(run.log)
    try:
        while state.step < plan.max_steps:
            lr = learning_rate(plan.config.optimizer, state.step, plan.max_steps)
            report = train_step(
                run.engine, world, loader.load(state.step), seed=seed, step=state.step, lr=lr, stop=run.stop.poll()
            )
            state.step += 1
            state.consumed_samples += training.global_batch_size
            state.consumed_tokens += training.tokens_per_step
            state.optimizer_steps += report.applied
            state.skipped_steps += not report.applied
            if meter.steps == 0:
                run.log.event("first_step", step=state.step, loss=report.loss)
            meter.count(training.tokens_per_step)
            left_out.check(report, state.step, run.last_committed, _loss_scale(run))
            last = state.step == plan.max_steps
            if state.step % plan.config.logging.log_interval == 0 or last or state.step == 1:
                _log_step(run, report, lr, meter)
            # Saved before evaluated: an evaluation that fails or takes long must not cost the checkpoint.
            if last or report.stop or state.step % plan.config.checkpoint.save_interval == 0:
                _save(run, required=last or report.stop)
                meter.restart()
            if report.stop and not last:
                raise Preempted(
                    f"stopped at step {state.step} of {plan.max_steps}, committed",
                    seen=run.stop.requested or "asked on another rank",
                    do="start the same command again (without resume=) to continue",
                )
            interval = plan.config.logging.eval_interval
            if last or (interval and state.step % interval == 0):
                _evaluate(run)
                meter.restart()
        run.log.event("finished", f"finished: step {state.step}", **state.counters())
    finally:
        loader.close()


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


def _log_step(run: Run, report: StepReport, lr: float, meter: Meter) -> None:
    rate, state, plan = meter.rate(), run.state, run.plan
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


def _evaluate(run: Run) -> Evaluation | None:
    if run.validation is None:
        return None
    micro_batch = run.plan.config.training.micro_batch_size_per_gpu
    limit = run.plan.config.logging.eval_samples
    run.log.event("evaluating", step=run.state.step)
    result = evaluate_split(run.engine.evaluate, run.validation, run.world, micro_batch, limit)
    run.log.event(
        "evaluation",
        f"step {run.state.step}  validation loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  "
        f"bits per byte {result.bits_per_byte:.4f}",
        step=run.state.step,
        **result.as_dict(),
    )
    return result


def _save(run: Run, required: bool) -> None:
    """Commit the current step on all ranks, then delete what is past keep_last.

    A save that fails is reported and training goes on, unless the run ends here (`required`) or it is the third in a row.
    """
    if run.last_committed == run.state.step:
        return
    began = time.perf_counter()
    try:
        path = save_checkpoint(run.engine, run.world, run.checkpoints_dir, run.world.attempt, _manifest(run))
    except SaveError as error:
        run.failed_saves += 1
        run.log.event("save_failed", f"warning: {error}", step=run.state.step, in_a_row=run.failed_saves)
        if required or run.failed_saves >= MAX_CONSECUTIVE_FAILED_SAVES:
            raise
        return
    run.last_committed, run.failed_saves = run.state.step, 0
    seconds = time.perf_counter() - began
    run.log.event("committed", f"committed {path} in {seconds:.1f} s", step=run.state.step, seconds=seconds)
    if run.world.is_main:
        try:
            deleted = commit.prune(run.checkpoints_dir, run.plan.config.checkpoint.keep_last)
            if deleted:
                run.log.event("pruned", steps=deleted)
        except OSError as error:
            run.log.event("prune_failed", f"warning: old checkpoints were not deleted: {error}")
    run.world.barrier()


def _manifest(run: Run) -> dict[str, Any]:
    return {
        "step": run.state.step,
        "attempt": run.world.attempt,
        "counters": run.state.counters(),
        "data": _data_identity(run),
        "model": run.plan.model.model_dump(mode="json"),
        "state_kinds": list(run.engine.state_kinds),
        "world_size": run.world.size,
        "zero_stage": run.engine.stage,
        "dtype": run.plan.config.training.dtype,
        "loss_scale": run.engine.loss_scale,
        "versions": {"dsgpt": dsgpt.__version__, "torch": torch.__version__, "deepspeed": version("deepspeed")},
    }
