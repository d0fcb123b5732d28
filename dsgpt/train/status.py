"""How a run stands: running, queued, or how it ended and what to type next; for `dsgpt status`. Torch-free.

    status = read_status(Path("runs/mine"))
    print("\n".join(status.lines()))        # at most 15 lines
    status.exit_code                        # 0 while it runs, waits or ended well

Put together from what is there: the newest start's verdict, its lease, commits, the ends of metrics.jsonl and events.jsonl,
what was submitted, and SLURM's queue where it can be asked within seconds. Whether a job on another host still lives is
known from the queue; without one only from the age of its lease.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import starts
from dsgpt.checkpoint.commit import MANIFEST, attempt_of, list_committed
from dsgpt.errors import ExitCode
from dsgpt.launch.queue import QueuedJob, look
from dsgpt.launch.submission import Submission, read_submissions
from dsgpt.lease import LEASE_SECONDS, Owner, read_holder
from dsgpt.train.runs import LOOK_BACK, attempts_of, job_ids, last_host, newest_log, slurm_log
from dsgpt.train.tail import last_lines
from dsgpt.units import format_count, format_seconds
from dsgpt.verdict import MAX_STARTS_WITHOUT_PROGRESS, Verdict, read_verdict

MAX_LINES = 15
GOOD = ("running", "queued", "finished", "stopped")
_NO_VERDICT = "no verdict: its node was lost, or it was killed"


@dataclass(frozen=True)
class Status:
    """`state` is a word: running, queued, finished, stopped, preempted, cancelled, failed, submitted or empty."""

    run_dir: Path
    state: str
    exit_code: int
    step: int = -1
    max_steps: int = -1
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    metrics_age: float | None = None
    last_commit: int = -1
    commit_age: float | None = None
    steps_lost: int = 0
    attempt: str = ""
    attempts_left: int = MAX_STARTS_WITHOUT_PROGRESS
    job: str = ""
    cause: str = ""
    message: str = ""
    rank: int = -1
    host: str = ""
    phase: str = ""
    queue: list[str] = field(default_factory=list)
    queue_known: bool = True
    log: str = ""
    do: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One line, for a list of runs."""
        loss = "" if self.loss is None else f"  loss {self.loss:.4f}"
        cause = f"  {self.cause}" if self.state not in GOOD and self.cause else ""
        return f"{self.run_dir}  {self.state}{cause}  {self._progress()}{loss}"

    def _progress(self) -> str:
        if self.step < 0:
            return "no step yet"
        return f"step {self.step}" + (f"/{self.max_steps}" if self.max_steps > 0 else "")

    def lines(self) -> list[str]:
        """Everything that matters, in at most MAX_LINES lines."""
        code = f" (exit code {self.exit_code})" if self.exit_code else ""
        told = [f"{self.run_dir}: {self.state}{code}"]
        rest = []
        if self.cause and self.state not in ("running", "finished"):
            where = f", rank {self.rank} on {self.host}" if self.rank >= 0 else f", on {self.host}" if self.host else ""
            phase = f", in {self.phase!r}" if self.phase and self.rank >= 0 else ""
            told.append(f"cause      {self.cause}{where}{phase}")
        numbers = [*([self.phase] if self.state == "running" and self.phase else []), self._progress()]
        numbers += [] if self.loss is None else [f"loss {self.loss:.4f}"]
        if self.state == "running":
            numbers += [] if not self.tokens_per_second else [f"{format_count(self.tokens_per_second)} tokens/s"]
            numbers += [] if self.seconds_left is None else [f"{format_seconds(self.seconds_left)} left"]
            numbers += [] if self.metrics_age is None else [f"logged {format_seconds(self.metrics_age)} ago"]
        rest.append(f"progress   {', '.join(numbers)}")
        if self.last_commit >= 0:
            age = f", {format_seconds(self.commit_age)} ago" if self.commit_age is not None else ""
            lost = f"; {self.steps_lost} steps after it are lost" if self.steps_lost else ""
            rest.append(f"committed  step {self.last_commit}{age}{lost}")
        else:
            rest.append("committed  nothing yet" + (f"; {self.steps_lost} steps are lost" if self.steps_lost else ""))
        if self.state in ("failed", "preempted") and self.attempts_left < MAX_STARTS_WITHOUT_PROGRESS:
            made = MAX_STARTS_WITHOUT_PROGRESS - self.attempts_left
            rest.append(
                f"starts     {made} in a row without a new commit; {self.attempts_left} left before it ends with 93"
            )
        rest += [f"queue      {one}" for one in self.queue[:3]]
        rest += [f"queue      and {len(self.queue) - 3} more"] if len(self.queue) > 3 else []
        rest += (
            [] if self.queue_known else ["queue      SLURM's queue cannot be asked here: what waits in it is not shown"]
        )
        rest += [f"log        {self.log}"] if self.log and self.state not in ("running", "queued") else []
        rest += [f"type       {self.do}"] if self.do else []
        room = MAX_LINES - len(told) - len(rest)
        message = [line for line in self.message.splitlines() if line.strip()]
        if len(message) > room:
            message = [*message[: room - 1], f"… {len(message) - room + 1} lines more in the log"] if room > 1 else []
        return [*told, *(f"           {line[:300]}" for line in message), *rest]


def read_status(run_dir: Path, now: float | None = None) -> Status:
    """Look at everything once."""
    now = time.time() if now is None else now
    submissions = read_submissions(run_dir)
    known = look(job_ids(run_dir, submissions))
    alive = [job for job in known or [] if job.runs or job.waits]
    # The queue is missed only by a run that was submitted to one.
    facts = _facts(run_dir, now)
    facts = replace(facts, queue=[str(job) for job in alive], queue_known=known is not None)
    attempts = _that_had_the_folder(run_dir, attempts_of(run_dir))
    verdict = read_verdict(run_dir / "logs" / attempts[-1]) if attempts else None
    taken = {one.job_id for one in submissions if one.cancelled}
    going = [job for job in alive if job.state == "COMPLETING" and job.base_id in taken]  # nothing to wait for
    running = _running(run_dir, [job for job in alive if job not in going], known is not None)
    if running is not None:
        do = f"dsgpt logs {shlex.quote(str(run_dir))} --follow"
        job = running.job if isinstance(running, Owner) else running.id
        host = running.host if isinstance(running, Owner) else running.nodes
        begun = replace(facts, attempt=attempts[-1] if attempts else "", message="", phase=_stage(run_dir, attempts))
        return replace(begun, state="running", exit_code=0, job=job, host=host, do=do, steps_lost=0)
    ended = _ended(run_dir, facts, attempts, verdict, submissions, known or [])
    waiting = [job for job in alive if job.waits]
    if waiting and ended.state not in ("finished",):
        again = f"{ended.state}: {ended.cause}; queued again" if verdict or attempts else ""
        text = again.strip(": ") or ""
        return replace(ended, state="queued", exit_code=0, job=waiting[0].id, message=ended.message, cause=text, do="")
    return ended


def _that_had_the_folder(run_dir: Path, attempts: list[str]) -> list[str]:
    """Without the newest starts of other jobs that found the folder taken; where there are no others, all."""
    left = list(attempts)
    while left and (verdict := read_verdict(run_dir / "logs" / left[-1])) and verdict.exit_code == ExitCode.LOCKED:
        left.pop()
    return left or attempts


def _running(run_dir: Path, alive: Sequence[QueuedJob], queue_known: bool) -> Owner | QueuedJob | None:
    """Who is at work: the holder of the lease, where it lives, or a job that has not come so far yet."""
    holder = read_holder(run_dir)
    active = [job for job in alive if job.runs]
    if holder is not None:
        owner, age = holder
        if owner.is_here():
            if not owner.is_gone():
                return owner
        elif owner.job and queue_known:
            if any(owner.job in (job.id, job.base_id) for job in active):
                return owner
        elif age < 2 * LEASE_SECONDS:
            return owner
    return active[0] if active else None


def _stage(run_dir: Path, attempts: Sequence[str]) -> str:
    """How far the newest start has come, where it has not taken a step yet."""
    if not attempts or read_verdict(run_dir / "logs" / attempts[-1]) is not None:
        return "the batch script is at work"
    told = [line for line in last_lines(run_dir / "events.jsonl", LOOK_BACK) if line.get("attempt") == attempts[-1]]
    if any(line.get("event") == "first_step" for line in told):
        return ""
    steps = last_lines(run_dir / "metrics.jsonl", LOOK_BACK)[-1:]
    if steps and steps[0].get("attempt") == attempts[-1]:
        return ""
    return (
        f"starting: {told[-1]['event'].replace('_', ' ')}" if told else "starting: the ranks are importing and meeting"
    )


def _facts(run_dir: Path, now: float) -> Status:
    """Progress: the newest line of the metrics that counts, and the newest commit."""
    committed = list_committed(run_dir / "checkpoints")
    last, commit_age = -1, None
    if committed:
        last = committed[-1][0]
        commit_age = max(0.0, now - (committed[-1][1] / MANIFEST).stat().st_mtime)
    line = _newest_metrics(run_dir)
    step = int(line.get("step", last)) if line else last
    most, rate = int(line.get("max_steps", -1)), line.get("tokens_per_second")
    left = None
    if rate and line.get("consumed_tokens") and step > 0 and most > 0:
        left = (most - step) * line["consumed_tokens"] / step / rate
    recorded = starts.read_starts(run_dir)
    commits = [(number, attempt_of(path)) for number, path in committed[-_newest_that_count(recorded) :]]
    failed = starts.starts_without_progress(run_dir, recorded, commits)
    return Status(
        run_dir,
        "empty",
        0,
        step=max(step, last),
        max_steps=most,
        loss=line.get("loss"),
        tokens_per_second=rate,
        seconds_left=left,
        metrics_age=max(0.0, now - line["time"]) if isinstance(line.get("time"), int | float) else None,
        last_commit=last,
        commit_age=commit_age,
        steps_lost=max(0, step - max(last, 0)),
        attempts_left=max(0, MAX_STARTS_WITHOUT_PROGRESS - failed),
    )


def _newest_that_count(recorded: Sequence[starts.Start]) -> int:
    """How many of the newest commits can be of the starts that are judged; the manifests of others need not be read."""
    return 2 * MAX_STARTS_WITHOUT_PROGRESS if recorded else 1


def _newest_metrics(run_dir: Path) -> dict[str, Any]:
    cap: int | None = None
    line: dict[str, Any]
    for line in reversed(last_lines(run_dir / "metrics.jsonl", LOOK_BACK)):
        if "superseded_after" in line:
            cap = line["superseded_after"] if cap is None else min(cap, line["superseded_after"])
        elif isinstance(line.get("step"), int) and (cap is None or line["step"] <= cap):
            return line
    return {}


def _ended(
    run_dir: Path,
    facts: Status,
    attempts: Sequence[str],
    verdict: Verdict | None,
    submissions: Sequence[Submission],
    known: Sequence[QueuedJob],
) -> Status:
    """How the newest start ended, or what became of jobs that never started one."""
    again = _again(run_dir, submissions)
    cancelled = _is_cancelled(run_dir, attempts, submissions, known)
    if not attempts:
        return _never_started(facts, submissions, known, cancelled, again)
    log = newest_log(run_dir, attempts[-1])
    facts = replace(facts, attempt=attempts[-1], log=str(log or ""))
    if verdict is None:
        states = {job.state for job in known if not (job.runs or job.waits)}
        word = next((state for state in ("NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "FAILED") if state in states), "")
        cause = f"{_NO_VERDICT}{f' (SLURM: {word})' if word else ''}"
        state, code = ("cancelled", ExitCode.PREEMPTED) if cancelled else ("failed", ExitCode.INFRASTRUCTURE)
        host = last_host(run_dir)
        return replace(facts, state=state, exit_code=int(code), cause=cause, host=host, do=again)
    told = replace(
        facts,
        exit_code=verdict.exit_code,
        cause=verdict.cause,
        message=verdict.message,
        rank=verdict.rank,
        host=verdict.host,
        phase=verdict.phase,
    )
    if verdict.exit_code == 0:
        name = shlex.quote(str(run_dir))
        if verdict.cause == "stopped":
            return replace(told, state="stopped", do=again, steps_lost=0)
        return replace(told, state="finished", steps_lost=0, do=f"dsgpt checkpoint export {name} --output MODEL")
    if verdict.exit_code == ExitCode.PREEMPTED:
        return replace(told, state="cancelled" if cancelled else "preempted", do=again)
    return replace(told, state="cancelled" if cancelled else "failed", do=_remedy(verdict.exit_code, again))


def _is_cancelled(
    run_dir: Path, attempts: Sequence[str], submissions: Sequence[Submission], known: Sequence[QueuedJob]
) -> bool:
    """Whether an operator took the run's newest job away."""
    recorded = starts.read_starts(run_dir)
    jobs = {recorded[-1].job, recorded[-1].job.partition("_")[0]} - {""} if recorded and attempts else set()
    jobs = jobs or {one.job_id for one in submissions[-1:]}
    taken = {one.job_id for one in submissions if one.cancelled}
    return bool(jobs & (taken | {job.base_id for job in known if job.state == "CANCELLED"}))


def _never_started(
    facts: Status, submissions: Sequence[Submission], known: Sequence[QueuedJob], cancelled: bool, again: str
) -> Status:
    if not submissions:
        return replace(facts, state="empty", do="dsgpt train or dsgpt submit with this output_dir")
    newest = submissions[-1]
    state = next((job.state for job in known if job.base_id == newest.job_id), "")
    rehearsal = next((one for one in submissions if one.job_id == newest.after), None)
    failed = _rehearsal_verdict(rehearsal)
    if failed:
        log = str(slurm_log(newest, newest.after) or "")
        cause = "its rehearsal failed"
        return replace(facts, state="failed", exit_code=1, cause=cause, message=failed, log=log, do=again)
    log = str(slurm_log(newest, newest.job_id) or "")
    if cancelled or state == "CANCELLED":
        cause = f"job {newest.job_id} was cancelled before it started"
        return replace(facts, state="cancelled", exit_code=int(ExitCode.PREEMPTED), cause=cause, log=log, do=again)
    if not facts.queue_known:
        return replace(facts, state="submitted", exit_code=0, job=newest.job_id, do=f"squeue -j {newest.job_id}")
    cause = f"job {newest.job_id} left the queue before training began" + (f" (SLURM: {state})" if state else "")
    return replace(facts, state="failed", exit_code=int(ExitCode.INFRASTRUCTURE), cause=cause, log=log, do=again)


def _rehearsal_verdict(rehearsal: Submission | None) -> str:
    """What a failed rehearsal says, or ""."""
    if rehearsal is None:
        return ""
    try:
        report: dict[str, Any] = json.loads((rehearsal.folder / "rehearsal" / "verdict.json").read_text("utf-8"))
        if report["ok"]:
            return ""
        failed = [f"{one['name']}: {one['detail']}" for one in report["checks"] if one["passed"] is False]
        return "\n".join([report["verdict"], *failed])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _remedy(code: int, again: str) -> str:
    if code in (ExitCode.INFRASTRUCTURE, ExitCode.LOCKED):
        return again
    if code == ExitCode.NO_PROGRESS:
        return f"correct the cause, then: {again}"
    return f"correct what it says, then: {again}"


def _again(run_dir: Path, submissions: Sequence[Submission]) -> str:
    """The command that continues the run, as it was typed where that is known."""
    trained = [one for one in submissions if one.kind == "train" and one.asked]
    if not trained:
        return f"dsgpt train {shlex.quote(str(run_dir / 'config.yaml'))}"
    newest = trained[-1]
    place = f"cd {shlex.quote(newest.cwd)} && " if newest.cwd and Path(newest.cwd) != Path.cwd() else ""
    return f"{place}dsgpt {shlex.join(newest.asked)}"
