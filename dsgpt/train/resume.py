"""Which checkpoint a start continues from, and the way back into it.

Never step 0 where the run has committed work; never a checkpoint of a job that was cut off; never silently another one than
asked for. Rank 0 looks at the folder, all ranks verify, all agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsgpt.checkpoint import commit, starts
from dsgpt.checkpoint.locate import locate_checkpoint
from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.store import find_checkpoint, load_state, verify_share
from dsgpt.distributed import World
from dsgpt.errors import CheckpointError, ConfigError, DamagedError, DsgptError, LockedError, NoProgressError
from dsgpt.optimizer import learning_rate
from dsgpt.train.build import check_model, late_steps
from dsgpt.train.changes import changed_keys
from dsgpt.train.folder import versions
from dsgpt.train.order import appended_text, continue_order, differences, first_segments
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.state import RunLog, TrainState
from dsgpt.verdict import MAX_STARTS_WITHOUT_PROGRESS, read_verdict

if TYPE_CHECKING:
    from dsgpt.train.loop import Run


@dataclass(frozen=True)
class Continuation:
    """Where a start continues: `checkpoint` None is step 0; `forked` says that it is another run's.

    `older` checkpoints, oldest first, may do where this one turns out damaged while it is read. `failed_starts` in a row
    ended before this one without a new checkpoint.
    """

    checkpoint: Path | None
    forked: bool = False
    failed_starts: int = 0
    older: tuple[tuple[int, Path], ...] = ()

    @property
    def step(self) -> int:
        """The optimizer step it continues with, as far as the folder's name tells."""
        return int(self.checkpoint.name.removeprefix("step-")) if self.checkpoint else 0


def open_run(plan: ResolvedRun, world: World, log: RunLog) -> Continuation:
    """Choose the checkpoint to continue from and record this start. Raises ConfigError, CheckpointError, NoProgressError."""
    error, told = None, None
    if world.is_main:
        try:
            told = _look(plan, world, log)
        except OSError as problem:
            error = LockedError("the run folder cannot be read or written", seen=str(problem))
        except DsgptError as problem:
            error = problem
    world.agree(error, "opening the run's folder")
    candidates, step, failed = world.broadcast_object(told)
    folder, mode = plan.output_dir / "checkpoints", plan.config.resume
    if not candidates and step is None and plan.config.model.init_from.startswith("fork:"):
        source = find_source(plan.config.model.init_from.removeprefix("fork:"), world, plan.config.checkpoint.verify)
        return Continuation(source, True, failed)
    wanted = [(number, Path(path)) for number, path in candidates if step is None or number == step]
    if step is not None and not wanted:
        there = ", ".join(str(number) for number, _ in candidates) or "none"
        do = "resume=<one of these>, or leave it out to continue from the newest"
        raise CheckpointError(f"no committed checkpoint of step {step}", seen=f"{folder} has: {there}", do=do)
    checkpoint, rejected = find_checkpoint(wanted, world, plan.config.checkpoint.verify)
    _tell_rejected(log, rejected)
    if checkpoint is None and mode == "must":
        raise CheckpointError("resume=must, but nothing is committed", seen=str(folder), do="resume=auto to start at 0")
    if checkpoint is None and candidates is not None and world.restarts:
        log.event("nothing_committed", "requeued before anything was committed: starting at step 0")
    return Continuation(checkpoint, failed_starts=failed, older=_older(wanted, checkpoint))


def _tell_rejected(log: RunLog, rejected: Sequence[str]) -> None:
    for reason in rejected:
        log.event("checkpoint_rejected", f"warning: passed over a damaged checkpoint: {reason}", reason=reason)


def _older(candidates: Sequence[tuple[int, Path]], checkpoint: Path | None) -> tuple[tuple[int, Path], ...]:
    paths = [path for _, path in candidates]
    return tuple(candidates[: paths.index(checkpoint)]) if checkpoint in paths else ()


def find_source(text: str, world: World, mode: str) -> Path:
    """The verified checkpoint that RUN@STEP names; found once, since a run that still commits may show each rank another."""
    error, found = None, None
    if world.is_main:
        try:
            path = locate_checkpoint(text)
            found = int(commit.read_manifest(path)["step"]), str(path)
        except DsgptError as problem:
            error = problem
    world.agree(error, "finding the checkpoint to start from")
    step, path = world.broadcast_object(found)
    return find_checkpoint([(step, Path(path))], world, mode)[0]


def _look(plan: ResolvedRun, world: World, log: RunLog) -> tuple[list[tuple[int, str]], int | None, int]:
    """Rank 0's part: the commits that count, the step asked for, failed starts before; this start is recorded."""
    folder, mode = plan.output_dir / "checkpoints", plan.config.resume
    committed = commit.list_committed(folder)
    earlier = starts.read_starts(plan.output_dir)
    made_by = {path: commit.attempt_of(path) for _, path in committed}
    if mode == "fresh" and committed:
        raise ConfigError(
            "resume=fresh, but the folder holds committed work",
            seen=str(folder),
            do="use another run.output_dir, or remove the folder yourself",
        )
    began_before = any(
        path.is_dir() and path.name != world.attempt  # SLURM's own log is there before anything else
        for path in (plan.output_dir / "logs").glob("*")
    )
    if mode != "fresh" and world.restarts and not earlier and not began_before:
        raise CheckpointError(
            "the job was requeued, but its run folder does not know of an earlier start",
            seen=f"{plan.output_dir} has no {starts.STARTS}, and this is restart {world.restarts} of job {world.job}",
            do="bring the folder back; if it never trained, resume=fresh",
        )
    if mode != "fresh" and not committed and starts.has_committed(plan.output_dir, earlier):
        raise CheckpointError(
            "the run has committed work, and its checkpoints are gone",
            seen=f"{folder} is empty",
            do="bring them back; to begin again at step 0, resume=fresh",
        )
    commits = [(step, made_by[path]) for step, path in committed]
    foreign = starts.cut_off(earlier, commits)
    seen = tuple(one for one in commits if one not in foreign)
    step = mode if isinstance(mode, int) else None
    if step is not None and starts.has_rewound(earlier, world.job, world.restarts, step, commits):
        log.event("rewound_before", f"resume={step} was for the first start of job {world.job}: continuing")
        step = None
    starts.record_start(plan.output_dir, starts.Start(world.attempt, world.job, world.restarts, seen, step))
    failed = starts.starts_without_progress(plan.output_dir, earlier, commits, but=world.attempt)
    if failed >= MAX_STARTS_WITHOUT_PROGRESS:
        raise NoProgressError(
            f"the last {failed} starts ended without a new checkpoint",
            seen=_last_verdict(plan.output_dir, earlier),
            do="look at their logs; the next start tries again",
        )
    if foreign:
        paths = [path for number, path in committed if (number, made_by[path]) in foreign]
        aside = commit.set_aside(folder, paths)
        names = ", ".join(path.name for path in paths)
        log.event("cut_off_commits", f"warning: {names}: of a job that was cut off, moved to {aside.name}", steps=names)
        committed = [entry for entry in committed if entry[1] not in paths]
    return [(number, str(path)) for number, path in committed], step, failed


def _last_verdict(folder: Path, earlier: list[starts.Start]) -> str:
    if not earlier:  # they died before they could be recorded, or somebody removed the record
        return "their logs folders have no verdict of another kind"
    verdict = read_verdict(folder / "logs" / earlier[-1].attempt)
    return f"attempt {earlier[-1].attempt}: {verdict.message if verdict else 'ended without a verdict'}"


def last_good(run: Run) -> Continuation:
    """The newest checkpoint that verifies, of a run that is under way."""
    committed = commit.list_committed(run.checkpoints_dir) if run.world.is_main else None
    told = run.world.broadcast_object(committed and [(step, str(path)) for step, path in committed])
    candidates = [(step, Path(path)) for step, path in told]
    checkpoint, rejected = find_checkpoint(candidates, run.world, run.plan.config.checkpoint.verify)
    _tell_rejected(run.log, rejected)
    return Continuation(checkpoint, older=_older(candidates, checkpoint))


def set_later_steps_aside(run: Run, checkpoint: Path) -> None:
    """Checkpoints after the one we continue from belong to another future: move them out of the way, keep them.

    The metrics of these steps are superseded: a line in metrics.jsonl says so, to whoever draws them.
    """
    error, folder = None, run.checkpoints_dir
    if run.world.is_main:
        try:
            later = [
                path
                for step, path in commit.list_committed(folder)
                if step > int(checkpoint.name.removeprefix("step-"))
            ]
            if later:
                aside = commit.set_aside(folder, later)
                names = [path.name for path in later]
                run.log.event("set_aside", f"moved {len(later)} later checkpoints to {aside}", steps=names)
        except OSError as problem:
            error = LockedError("later checkpoints cannot be set aside", seen=str(problem))
    run.world.agree(error, "setting later checkpoints aside")


def restore(run: Run, continuation: Continuation) -> None:
    """Bring weights, moments, counters and loss scale back, from an older checkpoint where this one turns out damaged.

    The run's own later checkpoints are set aside. Raises CheckpointError where none is intact, or the samples would be others.
    """
    damaged: list[str] = []
    while True:
        try:
            _restore(run, continuation)
            break
        except DamagedError as error:
            assert continuation.checkpoint is not None
            damaged.append(f"{continuation.checkpoint.name}: {' '.join(str(error).split())}")
            if not continuation.older:
                raise CheckpointError(
                    "no committed checkpoint is intact" if len(damaged) > 1 else "the checkpoint is damaged",
                    seen="; ".join(damaged),
                    do="restore the files, or another step (dsgpt checkpoint verify RUN_DIR), or begin again in a new "
                    "run.output_dir",
                ) from error
        _tell_rejected(run.log, damaged[-1:])
        checkpoint, rejected = find_checkpoint(continuation.older, run.world, run.plan.config.checkpoint.verify)
        damaged += rejected
        _tell_rejected(run.log, rejected)
        continuation = replace(continuation, checkpoint=checkpoint, older=_older(continuation.older, checkpoint))
    if not continuation.forked:
        assert continuation.checkpoint is not None
        set_later_steps_aside(run, continuation.checkpoint)


def _restore(run: Run, continuation: Continuation) -> None:
    assert continuation.checkpoint is not None
    reader = CheckpointReader(continuation.checkpoint, check=run.plan.config.checkpoint.verify == "hash")
    if continuation.forked:
        _list_fork(run, continuation.checkpoint, reader.manifest)
    try:
        _continue_order(run, continuation, reader.manifest)
    except CheckpointError:  # a manifest that is another run's, or the data is
        if damage := verify_share(continuation.checkpoint, run.world, run.plan.config.checkpoint.verify, now=True):
            raise DamagedError("the checkpoint is damaged", seen=damage) from None
        raise
    _compare_versions(run, reader.manifest)
    run.state = TrainState(**reader.manifest["counters"])
    run.unfrozen = run.plan.config.fine_tuning.counted_unfreezings(
        reader.manifest.get("unfrozen", []), run.state.step, run.state.optimizer_steps
    )
    load_state(run.engine, reader, late_steps(run))
    run.saver.continue_from(reader.path, reader.manifest)
    check_model(run.engine, run.plan)
    _tell_what_changed_sides(run, reader)
    if reader.manifest.get("loss_scale"):
        run.engine.loss_scale = reader.manifest["loss_scale"]
    elif run.engine.loss_scale:
        was, scale = reader.manifest.get("dtype"), run.loss_scale
        run.log.event(
            "loss_scale_reset", f"the checkpoint is {was} and has no loss scale: starting at {scale:g}", new=scale
        )
    run.spikes.restore(reader.manifest.get("recent_losses", []))
    _compare_learning_rate(run, reader.manifest)
    text = f"continuing from step {run.state.step} ({continuation.checkpoint})"
    if continuation.forked:
        text = f"forked from {continuation.checkpoint} at step {run.state.step}, with all its state"
    else:
        run.last_committed = run.state.step
        if run.plan.config.model.init_from != "scratch":
            text += f"; model.init_from={run.plan.config.model.init_from} is ignored"
    run.log.event("resumed", text, step=run.state.step)
    run.log.supersede(run.state.step)


def _tell_what_changed_sides(run: Run, reader: CheckpointReader) -> None:
    """Between what is trained and what is frozen, since the checkpoint was written."""
    thawed = sorted(reader.frozen.keys() & run.engine.parameter_shapes().keys())
    frozen = sorted(reader.parameters.keys() & run.engine.frozen_shapes().keys())
    for event, names, text in (
        ("thawed", thawed, "trained from here on, with moments of zero"),
        ("frozen", frozen, "warning: frozen from here on, though the checkpoint trained it"),
    ):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            run.log.event(event, f"{text}: {shown}", parameters=len(names))


def _continue_order(run: Run, continuation: Continuation, manifest: dict[str, Any]) -> None:
    """Let the samples follow that the checkpoint's run goes through, and the sources appended to it; of a fork, its own.

    Raises CheckpointError where they would be others.
    """
    plan, path, consumed = run.plan, continuation.checkpoint, manifest["counters"]["consumed_samples"]
    try:
        segments, new = continue_order(manifest["data"], plan, consumed, str(path))
    except CheckpointError:
        if not continuation.forked:
            raise
        segments, new = first_segments(plan), []
    if new:
        told = {"first_sample": consumed, "sources": [str(one.path) for one in new], "slots": segments[-1].slots}
        run.log.event("sources_appended", f"sources appended: {appended_text(new, segments)}", **told)
    run.go_on(segments)


def _list_fork(run: Run, checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Say what differs from the run that is forked: its config where that lies beside it, and its data."""
    changed = changed_keys(checkpoint.parent.parent, run.plan)
    lines = [f"{key}: {before!r} -> {now!r}" for key, (before, now) in changed.items()]
    lines += differences(manifest["data"], run.plan)
    run.log.event("forked", f"differs from the forked run in: {'; '.join(lines) or 'nothing'}", differences=lines)


def _compare_versions(run: Run, manifest: dict[str, Any]) -> None:
    saved, ours = manifest.get("versions", {}), versions()
    differ = [f"{name} {saved.get(name)} -> {ours[name]}" for name in ours if saved.get(name) != ours[name]]
    if not differ:
        return
    if run.plan.config.run.strict_versions:
        raise ConfigError(
            "the checkpoint was made with other versions", seen="; ".join(differ), do="run.strict_versions=false"
        )
    run.log.event("versions_changed", f"warning: other versions than the checkpoint's: {'; '.join(differ)}")


def _compare_learning_rate(run: Run, manifest: dict[str, Any]) -> None:
    """Warn where the schedule as it is now would have given the last step another learning rate than it had."""
    was, step = manifest.get("learning_rate"), run.state.step
    if was is None or step < 1:
        return
    before = learning_rate(run.plan.config.optimizer, step - 1, run.plan.max_steps)
    if abs(before - was) > 1e-9 * max(abs(before), abs(was)):
        now = learning_rate(run.plan.config.optimizer, step, run.plan.max_steps)
        run.log.event(
            "learning_rate_changed",
            f"warning: the learning rate goes on at {now:.4g}; step {step} had {was:.4g} before the config was changed",
            old=was,
            new=now,
        )
