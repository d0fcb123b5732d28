"""What the batch script asks before and after `srun`: which ranks to start, and whether the job goes on. Torch-free.

    TZ=UTC0 scontrol show job -d -o ID | python -m dsgpt.train.slurm_job prepare RUN.yaml key=value…
    TZ=UTC0 scontrol show job -d -o ID | python -m dsgpt.train.slurm_job decide USR1 TERM

Both print one decision a line, for bash to carry out (slurm/train.sbatch says what each means): in a container SLURM's
commands are not there, so they are the script's part. A config that cannot work ends here, on one node, with its code.
The verdict that the ranks wrote (logs/<attempt>/end.json) decides how it goes on; srun's exit code does not.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dsgpt.checkpoint import starts
from dsgpt.checkpoint.commit import attempt_of, list_committed
from dsgpt.config import RunConfig, load_config, split_arguments
from dsgpt.errors import ConfigError, DsgptError, ExitCode
from dsgpt.launch import slurm
from dsgpt.launch.layout import Layout, choose_layout, write_hostfile
from dsgpt.process import free_port, new_attempt, scheduler_job
from dsgpt.train.resolve import nothing_left, resolve_run
from dsgpt.train.runs import attempts_of, jobs_of
from dsgpt.verdict import (
    MAX_STARTS_WITHOUT_PROGRESS,
    STOPPED_AT_START,
    Verdict,
    amend_verdict,
    read_verdict,
    record_verdict,
)

MAX_EXCLUDED_SHARE = 0.25
FAILURES_TO_EXCLUDE = 2
FAILURES_COUNT_FOR_SECONDS = 7 * 86400.0  # a node is repaired one day
_TASK_ENDED = re.compile(
    rb"srun: error: (\S+): tasks? (\d+)[\d,-]*: (?!Terminated)(?:Exited with exit code (\d+))?(.*)"
)
# A node is lost, or does not answer: SLURM ends the ranks of the others, and judges the node itself.
_NODE_LOST = (b"srun: error: Node failure", b"srun: error: Task launch for", b"srun: error: Application launch failed")
_ASKED = b"User defined signal"  # USR1 or USR2, which a rank heeds as soon as python runs our code
_CODES_OF_RANKS = [code for code in ExitCode if code > ExitCode.USAGE]  # 1 and 2: a python that cannot start
SHOWN_CAUSES = ("rank_died", "hang", "infrastructure")


# --- before srun


def prepare(arguments: Sequence[str], record_text: str) -> Iterator[str]:
    """Lines NAME=value (the ranks' environment), --option (srun's), `say TEXT`, or `done` where nothing is left to train.

    Raises ConfigError or DataError for a run that cannot work.
    """
    loaded = load_config(*split_arguments(slurm.fill_task(arguments)))
    config = loaded.config
    yield from (f"say warning: {one_line(text)}" for text in loaded.warnings)
    records = slurm.parse_job(record_text)
    record = records[0] if records else None
    layout, told = layout_for(config, records, failing_hosts(config.run.output_dir))
    yield from (f"say {one_line(text)}" for text in told)
    run = resolve_run(config, world_size=layout.world_size, device="cuda" if has_gpus(layout, config) else "cpu")
    if left := nothing_left(run) or why_chain_ends(run.output_dir):
        yield f"say {left}"
        yield "done"
        return
    attempt = new_attempt()
    if "\n" in str(run.output_dir):
        raise ConfigError("run.output_dir holds a line break", seen=repr(str(run.output_dir)), do="choose another name")
    log_dir = run.output_dir / "logs" / attempt
    log_dir.mkdir(parents=True)
    job, restarts = scheduler_job()
    hosts = [node.host for node in layout.nodes]
    told_job = {"job": job, "restarts": restarts, "hosts": hosts, "ranks": list(layout.ranks), "time": time.time()}
    told_job["log_bytes"] = log_bytes(record)
    (log_dir / "job.json").write_text(json.dumps(told_job) + "\n", "utf-8")
    yield f"DSGPT_ATTEMPT={attempt}"
    yield f"DSGPT_LOG_DIR={log_dir}"
    yield f"MASTER_PORT={free_port()}"
    if end := slurm.end_time(record):
        began = (record.start_time if record else None) or time.time()
        yield f"DSGPT_JOB_END_TIME={end:.0f}"
        yield f"DSGPT_JOB_SECONDS={end - began:.0f}"
    if layout.idle_gpus:
        yield f"{slurm.IDLE_GPUS}=1"
    if not layout.is_uniform:
        yield f"SLURM_HOSTFILE={write_hostfile(layout, log_dir)}"
    yield from layout.srun_options(parts=len(records))
    if slurm.get("SLURM_GPUS") and len(layout.nodes) < len(layout.allocated):
        yield f"--gpus={sum(node.gpus for node in layout.nodes)}"


def one_record(text: str) -> slurm.JobRecord | None:
    """The record of this job's (first) part; None where the controller did not answer."""
    records = slurm.parse_job(text)
    return records[0] if records else None


def has_gpus(layout: Layout, config: RunConfig) -> bool:
    return config.device != "cpu" and any(node.gpus for node in layout.nodes)


def layout_for(config: RunConfig, records: Sequence[slurm.JobRecord], bad: Sequence[str]) -> tuple[Layout, list[str]]:
    """Which nodes get how many ranks, and what a person should know of it. `records` are the parts of a heterogeneous job."""
    tasks = slurm.tasks_of_hosts()
    nodes = [node for record in records for node in record.nodes] or slurm.nodes_of_environment(list(tasks))
    healthy = [node for node in nodes if node.host not in bad]
    told = []
    if len(healthy) < len(nodes) and len(healthy) >= (1 - MAX_EXCLUDED_SHARE) * len(nodes):
        out = ", ".join(node.host for node in nodes if node.host in bad)
        told.append(f"not used, because a rank failed there first, twice: {out}")
    else:
        healthy = nodes
    total, micro = config.training.global_batch_size, config.training.micro_batch_size_per_gpu

    def choose(among: Sequence[slurm.Node]) -> Layout:
        counts = [tasks.get(node.host, 1) for node in among]
        return choose_layout(among, counts, total, micro if isinstance(micro, int) else None)

    layout = choose(healthy)
    if len(records) > 1 and not (layout.is_uniform and len(layout.nodes) == len(nodes)):
        layout = choose(records[0].nodes)
        told.append("the other parts of this heterogeneous job stay idle: their nodes cannot have equally many ranks")
    if idle := layout.idle_text():
        each = f" by {micro}" if isinstance(micro, int) else ""
        told.append(
            f"{idle} stay idle: {layout.world_size} ranks divide the global batch of {total}{each}, more do not"
        )
    told.append(f"{layout.world_size} ranks on {len(layout.nodes)} nodes, rank 0 on {layout.nodes[0].host}")
    return layout, told


def why_chain_ends(run_dir: Path) -> str:
    """Why this part of a chain does not go on: an earlier part ended as no job goes on by itself. "" where it does."""
    earlier, attempts = slurm.get("DSGPT_CHAIN").split(), attempts_of(run_dir)
    verdict = read_verdict(run_dir / "logs" / attempts[-1]) if earlier and attempts else None
    if verdict is None or verdict.requeue or not set(earlier) & set(jobs_of(run_dir / "logs" / attempts[-1])):
        return ""
    told = verdict.message.partition("\n")[0] or verdict.cause
    return f"the chain ends: its last start ended with {verdict.exit_code} ({told}); to go on, submit the run again"


def failing_hosts(run_dir: Path) -> list[str]:
    """Hosts whose rank was the first to fail in at least two starts of this run, of late."""
    failed: Counter[str] = Counter()
    for path in (run_dir / "logs").glob("*/end.json"):
        verdict = read_verdict(path.parent)
        recent = time.time() - path.stat().st_mtime < FAILURES_COUNT_FOR_SECONDS
        if verdict and recent and verdict.host and verdict.rank >= 0 and verdict.cause in SHOWN_CAUSES:
            failed[verdict.host] += 1
    return sorted(host for host, times in failed.items() if times >= FAILURES_TO_EXCLUDE)


# --- after srun


def decide(log_dir: Path, record_text: str, signals: Sequence[str]) -> Iterator[str]:
    """Lines `say TEXT`, `exclude HOSTS`, `sbatch --option` (of a successor), and last `requeue` or `end CODE`."""
    run_dir = log_dir.parent.parent
    before = set(failing_hosts(run_dir))
    record = one_record(record_text)
    verdict = read_verdict(log_dir) or record_verdict(log_dir, _without_verdict(log_dir))
    if "TERM" not in signals:  # else SLURM may have ended the ranks itself, as it does with those of a lost node
        verdict = with_first_failed(verdict, log_dir, record)
    yield f"say {one_line(verdict.message or 'finished')}"
    over = why_over(record, signals)
    if not verdict.requeue or over or slurm.get("DSGPT_REQUEUE") == "no":
        if over and verdict.requeue:
            yield f"say not started again: {over}"
        done = verdict.exit_code == ExitCode.PREEMPTED and not over
        yield f"end {0 if done else verdict.exit_code}"
        return
    if bad := sorted(set(failing_hosts(run_dir)) | before):
        yield f"say a rank failed first, twice, on: {', '.join(bad)}"
        yield f"exclude {excluded(record, bad)}"
    yield from (f"sbatch {option}" for option in successor_options(record, bad))
    yield "requeue"


def why_over(record: slurm.JobRecord | None, signals: Sequence[str]) -> str:
    """Why this job is not ours to start again, "" where it is.

    A job that is being ended is COMPLETING, whatever ends it; of the reasons only the time limit, and a preemption that does
    not requeue, leave it to us.
    """
    if record is None:  # the controller does not answer: SIGTERM to the batch script says that it ends the job
        return "SLURM ended the job" if "TERM" in signals else ""
    if int(record.fields.get("Restarts", "0")) > scheduler_job()[1]:
        return "SLURM has requeued the job already"
    reason = record.fields.get("Reason", "")
    if record.state == "RUNNING" or reason == "TimeLimit" or "Preempt" in reason:
        return ""
    return f"the job was cancelled, or SLURM ended it ({record.state}, reason {reason})"


def _without_verdict(log_dir: Path) -> Verdict:
    """No rank lived to say how the job ended. Three of these without a new commit are no progress (93)."""
    run_dir, attempt = log_dir.parent.parent, log_dir.name
    commits = [(step, attempt_of(path)) for step, path in list_committed(run_dir / "checkpoints")]
    failed = starts.starts_without_progress(run_dir, starts.read_starts(run_dir), commits, but=attempt)
    committed_here = any(made_by == attempt for _, made_by in commits)
    last = commits[-1][0] if commits else -1
    message = "the ranks ended without a verdict; the job's log has their last words"
    verdict = Verdict(
        int(ExitCode.INFRASTRUCTURE), "no_verdict", message, last_committed=last, committed_here=committed_here
    )
    return verdict.after(min(failed, MAX_STARTS_WITHOUT_PROGRESS))


def with_first_failed(verdict: Verdict, log_dir: Path, record: slurm.JobRecord | None) -> Verdict:
    """Name the rank that failed first, where the verdict cannot: SLURM can end a dead rank's watchdog before it writes."""
    if verdict.rank >= 0 or verdict.cause not in ("no_verdict", "infrastructure"):
        return verdict
    if not (found := first_failed_task(log_dir, record)):
        return verdict
    rank, host, asked = found
    if asked:
        told = f"rank {rank} on {host} was asked to stop before it could listen: there is nothing new to commit"
        return amend_verdict(log_dir, Verdict(int(ExitCode.PREEMPTED), STOPPED_AT_START, told))
    told = f"{verdict.message}; srun saw rank {rank} on {host} end first"
    return amend_verdict(log_dir, replace(verdict, cause="rank_died", rank=rank, host=host, message=told))


def log_bytes(record: slurm.JobRecord | None) -> int:
    """Size of the job's log so far: all its starts write into one."""
    try:
        return Path(record.fields["StdOut"]).stat().st_size if record else 0
    except (OSError, KeyError):
        return 0


def first_failed_task(log_dir: Path, record: slurm.JobRecord | None) -> tuple[int, str, bool] | None:
    """(rank, host) that srun itself saw end first in this start, from the job's log; None where it cannot be read. And whether
    a warning ended it: one that came before python had installed the handlers.

    A rank's own lines carry its number (srun --label), so that none of them can pass for one of srun's. A rank that left
    with a code of ours could tell and blamed nobody: it lost a peer, whose end srun has not seen.
    """
    try:
        began = json.loads((log_dir / "job.json").read_text("utf-8"))["log_bytes"]
        with Path(record.fields["StdOut"] if record else "").open("rb") as file:
            file.seek(began)
            for line in file:
                if line.startswith(_NODE_LOST):
                    return None
                if match := _TASK_ENDED.match(line):
                    host, told = match[1].decode(), match[3] and int(match[3]) in _CODES_OF_RANKS
                    if told or "[" in host:  # several hosts at once: nobody first
                        return None
                    return int(match[2]), host, match[4].startswith(_ASKED)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # another file system, or inside a container: the host stays unknown
    return None


# field of the record -> sbatch's option; _NOTHING is left out
_OPTIONS = {
    "Partition": "--partition",
    "Account": "--account",
    "QOS": "--qos",
    "TimeLimit": "--time",
    "NumNodes": "--nodes",
    "CPUs/Task": "--cpus-per-task",
    "MinMemoryNode": "--mem",
    "MinMemoryCPU": "--mem-per-cpu",
    "Features": "--constraint",
    "ReqNodeList": "--nodelist",
    "ExcNodeList": "--exclude",
    "Licenses": "--licenses",
    "Reservation": "--reservation",
    "JobName": "--job-name",
    "StdOut": "--output",
}
_RESOURCES = {"TresPerNode": "--gres", "TresPerJob": "--gpus", "TresPerTask": "--gpus-per-task"}
_NOTHING = ("(null)", "N/A", "")


def excluded(record: slurm.JobRecord | None, bad: Sequence[str]) -> str:
    """The nodes that the job is not to get: those it was submitted without, which this list replaces, and the bad ones."""
    asked = record.fields.get("ExcNodeList", "") if record else ""
    if asked in _NOTHING:
        return ",".join(bad)
    return ",".join([asked, *sorted(set(bad) - set(slurm.expand_hosts(asked)))])


def successor_options(record: slurm.JobRecord | None, bad: Sequence[str]) -> Iterator[str]:
    """Options of sbatch that ask for the same again, for sites that refuse `scontrol requeue`.

    A script made by `dsgpt submit` holds its options itself. A heterogeneous job has no such command.
    """
    if bad:
        yield f"--exclude={excluded(record, bad)}"
    if task := slurm.get("SLURM_ARRAY_TASK_ID"):
        yield f"--array={task}"
    if record is None or slurm.get("DSGPT_SUBMISSION"):
        return
    for name, option in _OPTIONS.items():
        value = record.fields.get(name, "(null)")
        if value not in _NOTHING and "\n" not in value and not (bad and option == "--exclude"):
            value = value.replace("%", "%%") if name == "StdOut" else value
            yield f"{option}={value}"
    for name, option in _RESOURCES.items():
        if match := re.search(r"gres[:/]gpu:?((?:[\w.-]+:)?\d+)", record.fields.get(name, "")):
            yield f"{option}={'gpu:' if option == '--gres' else ''}{match[1]}"
    tasks = record.fields.get("NtasksPerN:B:S:C", "0").split(":")[0]
    if tasks not in ("0", "*"):
        yield f"--ntasks-per-node={tasks}"
    elif "TresPerTask" in record.fields:
        yield f"--ntasks={record.tasks}"
    if record.fields.get("OverSubscribe") == "NO":
        yield "--exclusive"


def one_line(text: str) -> str:
    """Whatever a name or a message holds, bash reads one line of it."""
    return " | ".join(text.splitlines())


def main(arguments: Sequence[str]) -> int:
    verb, *rest = arguments
    record = sys.stdin.read()
    try:
        if verb == "prepare":
            lines = list(prepare(rest, record))
        else:
            lines = list(decide(Path(slurm.get("DSGPT_LOG_DIR")), record, rest))
    except (DsgptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code if isinstance(error, DsgptError) else ExitCode.LOCKED)
    print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
