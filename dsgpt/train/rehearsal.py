"""A rehearsal of a run on its own site: is it told, does it commit, requeue and continue as if nothing had been? Torch-free.

    python -m dsgpt.train.rehearsal stopped FOLDER      the first start: was a real USR1 answered with a commit?
    python -m dsgpt.train.rehearsal compare FOLDER      the second: is the resumed run the one that was not interrupted?

Called by slurm/rehearse.sbatch in the folder `submissions/<n>`; its verdict is the job's exit code, and the long job waits for
it. `interrupted` is told by SLURM after step INTERRUPT_AFTER and may have gone on by then (steps of a small model take
milliseconds), so where both runs end is known only after the commit: some steps further on. `stopped` writes it down.

Trade-off: nothing but the numbers of each step is compared. `dsgpt verify-resume` compares states, tensor by tensor, but
knows nothing of queues.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsgpt.checkpoint.commit import list_committed
from dsgpt.config import LoadedConfig, load_config, to_yaml
from dsgpt.errors import ConfigError, DsgptError, ExitCode
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.state import read_metrics, write_atomically
from dsgpt.train.tail import last_lines
from dsgpt.train.verify_checks import TOLERANCES, Check, Report, drift, first_difference, loss_checks
from dsgpt.verdict import read_verdict

INTERRUPT_AFTER, STEPS = 10, 20
PLAN, VERDICT = "rehearsal.json", "verdict.json"


@dataclass(frozen=True)
class Rehearsal:
    """The two runs to make; `base` is the step they begin at (a fork begins at its origin's)."""

    config: LoadedConfig
    base: int
    max_steps: int

    def configs(self, folder: Path) -> dict[str, str]:
        """The files for a submission's folder: what both runs train, and what the batch script and `compare` go by."""
        plan = {"interrupt_after": self.base + INTERRUPT_AFTER, "base": self.base, "max_steps": self.max_steps}
        runs = {f"{name}.yaml": self._config(folder, name) for name in ("interrupted", "reference")}
        return {**runs, PLAN: json.dumps(plan) + "\n"}

    def _config(self, folder: Path, name: str) -> str:
        """The user's config in a folder of its own; only where it saves, logs and evaluates is set here."""
        own = self.config.config
        parts = {
            "run": {"output_dir": folder / "rehearsal" / name, "stop_at_step": None},
            "checkpoint": {"save_interval": self.max_steps, "save_interval_minutes": None, "keep_last": 2},
            "logging": {"log_interval": 1, "eval_interval": None, "eval_samples": 1},
        }
        spike = own.training.loss_spike.model_copy(update={"action": "warn"})
        changed: dict[str, Any] = {key: getattr(own, key).model_copy(update=values) for key, values in parts.items()}
        changed["training"] = own.training.model_copy(update={"loss_spike": spike})
        return to_yaml(own.model_copy(update={**changed, "resume": "auto"}))


def plan_rehearsal(loaded: LoadedConfig, run: ResolvedRun) -> Rehearsal:
    """What to rehearse. Raises ConfigError where the run is too short to be interrupted."""
    from dsgpt.train.verify_resume import beginning

    base, _ = beginning(loaded.config.model.init_from)
    if run.max_steps - base < STEPS:
        seen = f"{run.max_steps} steps, beginning at {base}"
        raise ConfigError(
            "the run is too short to be rehearsed", seen=seen, do=f"leave --rehearse out below {STEPS} steps"
        )
    return Rehearsal(loaded, base, run.max_steps)


def judge_stop(folder: Path) -> Check:
    """Whether the interrupted run committed after its signal; writes down where both runs are to end."""
    plan, run = _plan(folder), folder / "rehearsal" / "interrupted"
    committed = list_committed(run / "checkpoints")
    attempts = sorted(path.name for path in (run / "logs").glob("*") if path.is_dir())
    verdict = read_verdict(run / "logs" / attempts[-1]) if attempts else None
    name = "a real USR1 from SLURM was answered with a commit"
    if verdict is None or verdict.exit_code != ExitCode.PREEMPTED:
        told = "the run left no verdict" if verdict is None else f"it ended with {verdict.exit_code}: {verdict.message}"
        if verdict is not None and verdict.exit_code == ExitCode.DONE:
            told = f"all {plan['max_steps']} steps were over before the signal came: too short to be rehearsed"
        return Check(name, False, told)
    step = committed[-1][0] if committed else -1
    if step < plan["interrupt_after"]:
        return Check(name, False, f"its last commit is step {step}")
    last = min(plan["max_steps"], max(plan["base"] + STEPS, step + STEPS - INTERRUPT_AFTER))
    if last <= step:
        return Check(name, False, f"it was over at step {step}: too short to be rehearsed")
    write_atomically(folder / "rehearsal" / PLAN, json.dumps({**plan, "committed": step, "last": last}) + "\n")
    return Check(name, True, f"step {step}")


def compare(folder: Path) -> Report:
    """The resumed run against the one that was not interrupted, at every step after the commit."""
    plan = _plan(folder / "rehearsal")
    runs = {name: folder / "rehearsal" / name for name in ("reference", "interrupted")}
    lines = {name: {line["step"]: line for line in read_metrics(run / "metrics.jsonl")} for name, run in runs.items()}
    resumed = [
        event.get("step")
        for event in last_lines(runs["interrupted"] / "events.jsonl", 1 << 20)
        if event.get("event") == "resumed"
    ]
    goes_on = resumed[-1:] == [plan["committed"]]
    checks = [
        Check("a real USR1 from SLURM was answered with a commit", True, f"step {plan['committed']}"),
        Check("the requeued job continued from it", goes_on, "" if goes_on else f"it resumed at {resumed[-1:]}"),
    ]
    reference, other = lines["reference"], lines["interrupted"]
    before, after = (range(plan["base"] + 1, plan["committed"] + 1), range(plan["committed"] + 1, plan["last"] + 1))
    first, found = first_difference(reference, other, before), first_difference(reference, other, after)
    if first is None:
        name = f"the numbers of steps {after[0]} to {after[-1]} have the same bits"
        checks.append(Check(name, found is None, str(found or "")))
    else:  # two starts differ before any interruption: bits prove nothing here
        dtype = str(load_config([runs["reference"] / "config.yaml"]).config.training.dtype)
        checks.append(Check("two runs without interruption have the same bits", None, f"not here: {first}"))
        checks += loss_checks(drift(reference, other, after, TOLERANCES[dtype]), dtype, "", plan["last"])
    ok = all(check.passed is not False for check in checks)
    verdict = "the loop holds on this site" if ok else "the loop DOES NOT HOLD on this site: see NO above"
    return Report(verdict, ok, first is None and found is None, checks, None if ok or found is None else found.step)


def _plan(folder: Path) -> dict[str, int]:
    try:
        plan: dict[str, int] = json.loads((folder / PLAN).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "no rehearsal here", seen=str(error), do="it is queued with dsgpt submit --rehearse"
        ) from error
    return plan


def main(arguments: list[str]) -> int:
    """Print what was found; 0 where it holds. Progress of the rehearsal is kept in its folder, for a requeued job."""
    action, folder = arguments[0], Path(arguments[1])
    try:
        if action == "stopped":
            check = judge_stop(folder)
            report = Report(
                "" if check.passed else "the loop DOES NOT HOLD on this site", bool(check.passed), None, [check]
            )
        else:
            report = compare(folder)
    except (DsgptError, OSError, KeyError) as error:
        report = Report(f"the rehearsal could not be judged: {error}", False, None, [])
    print("\n".join([*map(str, report.checks), report.verdict]), flush=True)
    if action == "compare" or not report.ok:
        write_atomically(folder / "rehearsal" / VERDICT, json.dumps(report.as_dict()) + "\n")
    return int(not report.ok)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
