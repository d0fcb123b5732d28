"""Is a run of this config, on this machine, after a kill and a resume the run it would have been? The work of the verb.

    trial = Trial(["run.yaml"], steps=10, world_size=4)
    report = trial.run()

Three starts of the user's own config in folders of their own: `reference` trains 2 x steps without interruption; `resumed`
is killed (SIGKILL to everything) after its commit of `steps` and started again, where asked in another topology. Metrics are
compared at every step, checkpoints tensor by tensor. Where bits differ, or must differ because sums run in another order, a
fourth start, `read-back`, forks the saved state and commits it at once: what a resume reads, bit for bit, before any step.

Only what decides where a run ends, saves, logs and evaluates is set here (`_words`): schedule, data, dropout, seed and
asynchronous saving are the user's. Trade-off: real starts through `dsgpt train` cost four start-ups, and leave nothing out.

Growth: the comparison reads one tensor at a time; the state of a 1 T-parameter run takes hours to read on one node, so there
it is the config on fewer layers that is verified. How a run is started and killed is in `_start` and launch/marked.py alone.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.locate import locate_checkpoint
from dsgpt.config import load_config, split_arguments
from dsgpt.errors import ConfigError, DsgptError, ExitCode, LockedError
from dsgpt.launch.marked import MarkedJob
from dsgpt.planning import parameter_count
from dsgpt.process import new_attempt
from dsgpt.train.resolve import ResolvedRun, check_ranks
from dsgpt.train.start import plan_run
from dsgpt.train.state import read_metrics
from dsgpt.train.verify_checks import (
    OF_THE_SCHEDULE,
    TOLERANCES,
    Check,
    Lines,
    Report,
    StepDifference,
    compare_states,
    differ,
    drift,
    first_difference,
    first_tensor,
    loss_checks,
    summary,
    why_unlike,
)
from dsgpt.units import format_bytes, format_seconds

POLL_SECONDS = 0.005  # steps of a small model take 10 ms
MAX_CHECKPOINTS = 5
# What a state is; the other keys of a manifest say how it was saved and what its last step did.
_STATE_KEYS = ("counters.", "loss_scale", "data.", "recent_losses")


class RunFailed(DsgptError):
    """A run that ended otherwise than it should have; `exit_code` is its own."""

    def __init__(self, name: str, code: int, log_file: Path):
        super().__init__(f"the run {name!r} failed with code {code}", seen=_tail(log_file), do=f"log: {log_file}")
        self.exit_code = ExitCode(code) if code in list(ExitCode) and code else ExitCode.INFRASTRUCTURE


class Trial:
    """Everything is resolved, and refused where it cannot work, before anything is started. `say` tells of progress."""

    def __init__(
        self,
        arguments: Sequence[str],
        steps: int = 10,
        num_processes: int | None = None,
        world_size: int | None = None,
        deepspeed: str | None = None,
        output: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.say, self.seconds, self.killed_at = say, dict[str, float](), 0
        own = load_config(*split_arguments(arguments)).config
        scratch = own.run.output_dir.with_name(f"{own.run.output_dir.name}.verify-resume-{new_attempt()}")
        self.folder = (output or scratch).resolve()
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError("the folder for the runs is not empty", seen=str(self.folder), do="a new folder")
        base, pinned = beginning(own.model.init_from)
        again = [f"deepspeed={deepspeed}"] if deepspeed else []
        before = [*arguments, *pinned, "resume=auto", f"run.output_dir={self.folder / 'reference'}"]
        self.plan = plan_run(before, num_processes, may_hide_gpus=True).run
        if world_size:
            check_ranks(own, world_size, "the resume cannot be", "dsgpt verify-resume RUN.yaml --world-size")
        self.moved_plan = plan_run([*before, *again], world_size or self.plan.world_size, may_hide_gpus=True).run
        fit = (self.plan.max_steps - base) // 2
        if fit < 2:  # between two commits there must be a step
            seen = f"{self.plan.max_steps} steps, beginning at {base}"
            raise ConfigError("the run is too short to be interrupted", seen=seen, do="a larger training.max_steps")
        if fit < steps:
            say(f"the run has only {self.plan.max_steps} steps: --steps {fit} instead of {steps}")
        steps = min(steps, fit)
        self.saved, self.last, self.first = base + steps, base + 2 * steps, base + 1
        self.arguments, self.again = [*arguments, *pinned, *_words(self.saved, self.last)], again

    @property
    def is_moved(self) -> bool:
        """Whether the resume is in another topology."""
        return _topology(self.plan) != _topology(self.moved_plan)

    @property
    def _split(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        plans = self.plan, self.moved_plan
        one, other = ((plan.world_size, plan.config.training.micro_batch_size_per_gpu) for plan in plans)
        return one, other

    def remove(self) -> None:
        """Delete its runs; the folder is one that this trial made or found empty."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder) if self.folder.exists() else None,
            "committed_step": self.saved,
            "killed_at_step": self.killed_at,
            "last_step": self.last,
            "before": _describe(self.plan),
            "after": _describe(self.moved_plan),
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """What was run, for people."""
        place = self.folder if self.folder.exists() else f"{self.folder} (removed)"
        told = [f"{name:<12}{format_seconds(seconds)}" for name, seconds in self.seconds.items()]
        topologies = [f"before      {_describe(self.plan)}", f"after       {_describe(self.moved_plan)}"]
        return [*topologies[: 1 + self.is_moved], *told, f"folder      {place}"]

    # ---- the runs ----------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """Start, kill and resume what is needed, and compare."""
        self._make_folder()
        before, after = _describe(self.plan), _describe(self.moved_plan)
        self.say(f"reference: {self.last - self.first + 1} steps without interruption; {before}")
        self._to_its_end("reference", self.plan, "reference", [])
        killed = self._kill()
        self.say(f"resumed: started again, to step {self.last}; {after}")
        self._to_its_end("resumed", self.moved_plan, "resumed", self.again)
        for name in ("reference", "resumed"):
            if self._newest(name) != self.last:
                seen = f"step {self._newest(name)} is its last commit; log: {self.folder / name}.log"
                raise DsgptError(f"the run {name!r} ended before step {self.last}", seen=seen, do="start it again")
        return self._judge(killed)

    def _make_folder(self) -> None:
        need = MAX_CHECKPOINTS * 12 * parameter_count(self.plan.model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stats = os.statvfs(self.folder)
        except OSError as error:
            raise LockedError("no folder for the runs", seen=str(error), do="another --output") from error
        free = stats.f_bavail * stats.f_frsize
        self.say(f"{self.folder}: up to {format_bytes(need)} of checkpoints, {format_bytes(free)} free")

    def _start(self, name: str, plan: ResolvedRun, run: str, words: Sequence[str]) -> MarkedJob:
        """The one place where a run is started; MarkedJob.kill is the one that kills it."""
        command = [sys.executable, "-m", "dsgpt", "train", *self.arguments, f"run.output_dir={self.folder / run}"]
        ranks = plan.world_size
        return MarkedJob([*command, *words, "--num-processes", str(ranks)], self.folder / f"{name}.log", ranks)

    def _to_its_end(self, name: str, plan: ResolvedRun, run: str, words: Sequence[str]) -> None:
        began = time.monotonic()
        with self._start(name, plan, run, words) as job:
            while (code := job.poll()) is None:
                time.sleep(10 * POLL_SECONDS)
        self.seconds[name] = time.monotonic() - began
        if code:
            raise RunFailed(name, code, job.log_file)

    def _kill(self) -> Lines:
        """Start the run that is to be resumed and kill it between two commits, which quick steps may need two tries for.

        Returns what it had logged until then.
        """
        steps = self.last - self.saved
        for target in dict.fromkeys((self.saved + (steps + 1) // 2, self.saved + 1)):
            self.say(f"killed: SIGKILL to everything once step {self.saved} is committed and step {target} logged")
            began = time.monotonic()
            with self._start("killed", self.plan, "resumed", []) as job:
                while job.poll() is None and not self._has_reached(target):
                    time.sleep(POLL_SECONDS)
                code = job.poll()
            self.seconds["killed"] = time.monotonic() - began
            if code:
                raise RunFailed("killed", code, job.log_file)
            if code is None and self._newest("resumed") == self.saved:
                lines = self._lines("resumed")
                self.killed_at = max(lines)
                self.say(f"killed after step {self.killed_at}")
                return lines
            self.say(f"it had committed step {self.last} before the kill")
            shutil.rmtree(self.folder / "resumed")
        do = f"--steps {4 * steps}"
        raise ConfigError("the steps are too quick to kill the run between two commits", seen=f"{steps} steps", do=do)

    def _has_reached(self, step: int) -> bool:
        """Whether the step is logged and the first checkpoint committed; reads the end of the metrics only."""
        try:
            with (self.folder / "resumed" / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                found = file.read().splitlines(keepends=True)
            whole = [line for line in found[-2:] if line.endswith(b"\n")]
            logged = json.loads(whole[-1])["step"] if whole else 0
        except (OSError, ValueError, KeyError):
            return False
        return bool(logged >= step and self._newest("resumed") >= self.saved)

    def _newest(self, run: str) -> int:
        committed = commit.list_committed(self.folder / run / "checkpoints")
        return committed[-1][0] if committed else 0

    def _lines(self, run: str) -> Lines:
        return {line["step"]: line for line in read_metrics(self.folder / run / "metrics.jsonl")}

    def _checkpoint(self, run: str, step: int) -> Path:
        return self.folder / run / "checkpoints" / f"step-{step:08d}"

    def _read_back(self) -> Check:
        """Fork the saved state in the topology of the resume and commit it before any step: is it what was saved?"""
        source = self._checkpoint("resumed", self.saved)
        words = [*self.again, f"model.init_from=fork:{source}", f"run.stop_at_step={self.saved}"]
        self.say(f"read-back: the state of step {self.saved} is read and saved again")
        self._to_its_end("read-back", self.moved_plan, "read-back", words)
        self._state_read = compare_states(source, self._checkpoint("read-back", self.saved), _STATE_KEYS)
        name = "the state right after the resume is the saved one, bit for bit"
        return Check(name, not differ(self._state_read), summary(self._state_read))

    # ---- the verdict -------------------------------------------------------------------------------------------------

    def _judge(self, killed: Lines) -> Report:
        self.say("comparing")
        reference, resumed = self._lines("reference"), self._lines("resumed")
        unrepeated = first_difference(reference, killed, range(self.first, self.killed_at + 1))
        name = f"without a resume the run repeats itself, steps {self.first} to {self.killed_at}"
        checks = [Check(name, unrepeated is None, str(unrepeated or "")), self._continued()]
        if self.is_moved:
            checks[0] = Check(name, None if unrepeated else True, checks[0].detail)
            return self._judge_moved(checks, {**reference, **killed}, resumed)
        if unrepeated:
            return self._judge_unrepeated(checks, unrepeated, killed, resumed)
        return self._judge_bits(checks, reference, resumed)

    def _judge_bits(self, checks: list[Check], reference: Lines, resumed: Lines) -> Report:
        steps = range(self.first, self.last + 1)
        found = first_difference(reference, resumed, steps)
        checks.append(Check(f"steps {self.first} to {self.last} have the same bits", found is None, str(found or "")))
        states = {}
        for step in (self.saved, self.last):
            states[step] = compare_states(self._checkpoint("reference", step), self._checkpoint("resumed", step))
            name = f"the states of step {step} have the same bits"
            checks.append(Check(name, not differ(states[step]), summary(states[step])))
        if all(check.passed for check in checks):
            text = f"bit-identical: killed after step {self.killed_at}, continued from step {self.saved} to step {self.last}"
            return Report(text, True, True, checks)
        read_back = self._read_back()
        checks.append(read_back)
        differing = next((step for step, state in states.items() if differ(state)), None)
        step = found.step if found else differing
        ordered = [(self.saved, states[self.saved]), (self.saved, self._state_read), (self.last, states[self.last])]
        tensor = first_tensor(ordered)
        text = f"differs: first at {found}" if found else f"differs: first in the state of step {step}"
        if step is None:
            text = f"differs: the second start did not continue from step {self.saved}"
        if tensor:
            text += f"\nfirst tensor: {tensor['kind']} of {tensor['name']} at step {tensor['step']}"
        return Report(text, False, False, checks, step, tensor)

    def _judge_unrepeated(self, checks: list[Check], found: StepDifference, killed: Lines, resumed: Lines) -> Report:
        """Two starts differ before any kill: bits prove nothing here; the state does, and the losses within a tolerance."""
        checks[0] = Check(checks[0].name, None, checks[0].detail)
        checks += [self._read_back(), *self._loss_checks({**resumed, **killed}, resumed, self.killed_at)]
        ok = all(check.passed is not False for check in checks)
        text = f"not repeatable here, even without a resume: first at {found}\n"
        text += f"the resume itself {'holds' if ok else 'DOES NOT HOLD'}: see above"
        return Report(text, ok, False, checks, found.step, first_tensor([(self.saved, self._state_read)]))

    def _judge_moved(self, checks: list[Check], expected: Lines, resumed: Lines) -> Report:
        """In another topology sums run in another order: the state must be the same bit for bit, the losses near."""
        checks.append(self._read_back())
        split, other = self._split
        keys = (*OF_THE_SCHEDULE, *(("data_crc",) if split == other else ()))
        steps = range(self.saved + 1, self.last + 1)
        found = first_difference(expected, resumed, steps, keys)
        names = ", ".join(key.replace("_", " ") for key in keys)
        checks.append(
            Check(f"{names} of steps {steps[0]} to {steps[-1]} are the same", found is None, str(found or ""))
        )
        checks += self._loss_checks(expected, resumed, self.last)
        ok = all(check.passed is not False for check in checks)
        text = "the resume holds in another topology: the state bit for bit, the losses as told above"
        tensor = first_tensor([(self.saved, self._state_read)])
        dtype = str(self.plan.config.training.dtype)
        apart = drift(expected, resumed, steps, TOLERANCES[dtype])
        step = found.step if found else self.saved if tensor else None
        if not ok:
            step = step or apart.beyond
            text = "differs: see NO above"
            text += f"\nfirst tensor: {tensor['kind']} of {tensor['name']} at step {tensor['step']}" if tensor else ""
        return Report(text, ok, None, checks, step, tensor, apart)

    def _loss_checks(self, expected: Lines, resumed: Lines, until: int) -> list[Check]:
        dtype, model = str(self.plan.config.training.dtype), self.plan.model
        rates = model.dropout
        dropout = any((rates.embedding, rates.attention, rates.residual))
        unlike = why_unlike(*self._split, dropout, model.norm == "batchnorm")
        found = drift(expected, resumed, range(self.saved + 1, until + 1), TOLERANCES[dtype])
        return loss_checks(found, dtype, unlike, until)

    def _continued(self) -> Check:
        """The second start went on from the checkpoint; one that began at step 0 would have the same bits as well."""
        events = list(_json_lines(self.folder / "resumed" / "events.jsonl"))
        steps = [event["step"] for event in events if event["event"] == "resumed"]
        rejected = [event["reason"] for event in events if event["event"] == "checkpoint_rejected"]
        good = steps[-1:] == [self.saved] and not rejected
        detail = "; ".join([*([] if good else [f"it resumed at {steps[-1:] or 'nothing'}"]), *rejected])
        return Check(f"the second start continued from step {self.saved}", good, detail)


def beginning(init_from: str) -> tuple[int, list[str]]:
    """The step a run begins at, and its source named for good: RUN may commit another step while this goes on."""
    kind, _, place = init_from.partition(":")
    if kind not in ("checkpoint", "fork"):
        return 0, []
    source = locate_checkpoint(place)
    step = int(commit.read_manifest(source)["step"]) if kind == "fork" else 0
    return step, [f"model.init_from={kind}:{source}"]


def _words(saved: int, last: int) -> list[str]:
    """What is not the user's: a commit at `saved` and at `last`, all of them kept, every step logged, no evaluation.

    An evaluation changes nothing of the training; a whole run of `last` steps ends with one of one sample. A rollback after
    a loss spike would go back to commits that the user's run does not have.
    """
    return [
        f"run.stop_at_step={last}", "resume=auto", "training.loss_spike.action=warn",
        f"checkpoint.save_interval={saved}", "checkpoint.save_interval_minutes=null", "checkpoint.keep_last=0",
        "logging.log_interval=1", "logging.eval_interval=null", "logging.eval_samples=1",
    ]  # fmt: skip


def _topology(plan: ResolvedRun) -> tuple[Any, ...]:
    return plan.world_size, plan.config.training.micro_batch_size_per_gpu, json.dumps(plan.deepspeed, sort_keys=True)


def _describe(plan: ResolvedRun) -> str:
    training = plan.config.training
    micro, name = training.micro_batch_size_per_gpu, plan.config.deepspeed
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    return f"{ranks}, {name}, micro-batch {micro}, {plan.device}, {training.dtype}"


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text("utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue  # cut short by the kill


def _tail(path: Path, lines: int = 12) -> str:
    return "\n        ".join(path.read_text("utf-8", errors="replace").splitlines()[-lines:])
