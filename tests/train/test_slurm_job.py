"""What the batch script is told before and after `srun`, with the records that a real SLURM 22.05 gave in each case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsgpt.errors import ConfigError, DataError
from dsgpt.train import slurm_job
from dsgpt.train.time_limit import TimeLimit
from dsgpt.verdict import Verdict, read_verdict, record_verdict
from tests.launch.test_slurm import RECORD

RUNNING = RECORD.format(name="dsgpt")
CANCELLED = RUNNING.replace("JobState=RUNNING", "JobState=COMPLETING")
TIMED_OUT = CANCELLED.replace("Reason=None", "Reason=TimeLimit")
REQUEUED = CANCELLED.replace("Restarts=2", "Restarts=3")
VARIABLES = {
    "SLURM_JOB_ID": "12",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}


@pytest.fixture()
def job(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    for name in ("DSGPT_REQUEUE", "DSGPT_CHAIN", "DSGPT_SUBMISSION", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)


def prepare(yaml, *words, record=RUNNING):
    return list(slurm_job.prepare([str(yaml), *words], record))


def value(lines, name):
    (line,) = (line for line in lines if line.startswith(f"{name}="))
    return line.partition("=")[2]


def test_prepare_gives_the_ranks_their_environment_and_srun_its_options(job, write_run, tmp_path):
    lines = prepare(write_run(), "training.global_batch_size=12")
    assert (tmp_path / "run/logs" / value(lines, "DSGPT_ATTEMPT")).is_dir()
    assert value(lines, "DSGPT_JOB_SECONDS") == "600"
    assert {"--nodes=2", "--ntasks=3", "--distribution=arbitrary"} <= set(lines)
    hosts = Path(value(lines, "SLURM_HOSTFILE")).read_text().split()
    assert hosts == ["node1", "node1", "node2"]


def test_an_allocation_that_does_not_divide_the_batch_is_used_in_part(job, write_run):
    lines = prepare(write_run())  # 16 = 4 x 3 does not divide
    assert any("1 of 2 nodes stay idle: 2 ranks divide" in line for line in lines)
    assert "--nodelist=node1" in lines


def test_without_an_answer_of_the_controller_the_variables_count(job, write_run, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert "--ntasks=4" in prepare(write_run(), record="")


def test_a_run_that_cannot_work_is_refused_before_any_rank_starts(job, write_run, tmp_path):
    """T613."""
    with pytest.raises(ConfigError):
        prepare(write_run(**{"optimizer.learning_rte": 1}))
    with pytest.raises(DataError):
        prepare(write_run(**{"data.train": [{"path": str(tmp_path / "nowhere")}]}))
    with pytest.raises(ConfigError, match="line break"):
        prepare(write_run(**{"run.output_dir": str(tmp_path / "a\nb")}))


def end_of(tmp_path, code, cause="x", attempt="20260101-000000-aaaa", **fields):
    log_dir = tmp_path / "run/logs" / attempt
    log_dir.mkdir(parents=True, exist_ok=True)
    record_verdict(log_dir, Verdict(code, cause, "why", **fields))
    return log_dir


@pytest.mark.parametrize(
    ("code", "record", "signals", "last"),
    [
        (0, RUNNING, [], "end 0"),
        (75, RUNNING, ["USR1"], "requeue"),
        (76, RUNNING, [], "requeue"),
        (75, TIMED_OUT, ["TERM"], "requeue"),  # the signal came too late: the time limit itself ended it
        (75, CANCELLED, ["TERM"], "end 75"),
        (75, REQUEUED, ["TERM"], "end 75"),  # preempted: SLURM has done it
        (75, "", [], "requeue"),  # the controller does not answer
        (75, "", ["TERM"], "end 75"),
        (77, RUNNING, [], "end 77"),
        *((code, RUNNING, [], f"end {code}") for code in (65, 73, 78, 79, 93)),
    ],
)
def test_only_what_is_worth_it_and_ours_is_requeued(job, tmp_path, code, record, signals, last):
    """T605, T613."""
    lines = list(slurm_job.decide(end_of(tmp_path, code), record, signals))
    assert lines[-1] == last and sum(line == "requeue" for line in lines) <= 1


def test_a_chain_never_requeues_and_a_preempted_part_of_it_has_ended_well(job, tmp_path, monkeypatch):
    monkeypatch.setenv("DSGPT_REQUEUE", "no")
    assert list(slurm_job.decide(end_of(tmp_path, 75), RUNNING, []))[-1] == "end 0"
    assert list(slurm_job.decide(end_of(tmp_path, 76, attempt="b"), RUNNING, []))[-1] == "end 76"


def test_three_ends_without_a_verdict_and_a_commit_are_no_progress(job, tmp_path):
    """T612, where ranks die before they can count their starts."""
    logs = tmp_path / "run/logs"
    last = []
    for number in range(4):
        log_dir = logs / f"20260101-00000{number}-aaaa"
        log_dir.mkdir(parents=True)
        last.append(list(slurm_job.decide(log_dir, RUNNING, []))[-1])
    assert last == ["requeue", "requeue", "end 93", "requeue"], "a person starts it again: it counts anew"
    assert read_verdict(logs / "20260101-000000-aaaa").cause == "no_verdict"


def test_where_no_rank_lived_to_tell_srun_has_seen_who_ended_first(job, tmp_path, write_run, monkeypatch):
    """T614: SLURM can end a dead rank's watchdog before it has written. The lines are those of SLURM 22.05."""
    log = tmp_path / "job.log"
    record = RUNNING.replace("/home/a b/out.log", str(log))
    log.write_text("srun: error: node1: task 0: Killed\n", "utf-8")  # of an earlier start
    log_dir = Path(value(prepare(write_run(), record=record), "DSGPT_LOG_DIR"))
    with log.open("a", encoding="utf-8") as file:
        file.write(
            "0: srun: error: node9: task 9: Killed\n"  # what a rank prints
            "srun: error: node2: task 1: Killed\n"
            "srun: launch/slurm: _step_signal: Terminating StepId=12.0\n"
            "srun: error: node1: task 0: Terminated\n"
        )
    record_verdict(log_dir, Verdict(76, "infrastructure", "rank 0 lost a peer"))
    assert list(slurm_job.decide(log_dir, record, []))[-1] == "requeue"
    verdict = read_verdict(log_dir)
    assert (verdict.cause, verdict.rank, verdict.host) == ("rank_died", 1, "node2")


BYSTANDER = "srun: error: node1: task 0: Exited with exit code 76\n"


@pytest.mark.parametrize(
    ("told", "signals", "blamed"),
    [
        (BYSTANDER, [], ("", -1)),  # node2 has no power: rank 0 lost its peer, waited, and left by itself
        (BYSTANDER + "srun: error: node2: task 1: Killed\n", [], ("", -1)),  # srun's doing, after the first had left
        (
            "srun: error: node2: task 1: Killed\n",
            ["TERM"],
            ("", -1),
        ),  # SLURM ends the job, and what is left of its ranks
        ("srun: error: node[1-2]: tasks 0-1: Killed\nsrun: error: node1: task 0: Killed\n", [], ("", -1)),
        ("srun: error: node2: task 1: Exited with exit code 2\n", [], ("node2", 1)),  # no python there
    ],
)
def test_a_host_whose_ranks_only_lost_a_peer_is_not_blamed(job, tmp_path, write_run, told, signals, blamed):
    """T614: two such ends would exclude the healthy node of the two."""
    log = tmp_path / "job.log"
    record = RUNNING.replace("/home/a b/out.log", str(log))
    log_dir = Path(value(prepare(write_run(), record=record), "DSGPT_LOG_DIR"))
    log.write_text(told, "utf-8")
    record_verdict(log_dir, Verdict(76, "infrastructure", "rank 0 lost a peer"))
    list(slurm_job.decide(log_dir, record, signals))
    verdict = read_verdict(log_dir)
    assert (verdict.host, verdict.rank) == blamed


def test_hosts_that_were_never_to_be_used_stay_so(job, tmp_path):
    """ExcNodeList of `scontrol update` and --exclude of a successor replace what the job was submitted with."""
    record = RUNNING.replace("Features=", "ExcNodeList=node[7-9] Features=")
    for number in range(2):
        log_dir = end_of(tmp_path, 76, "rank_died", str(number), rank=1, host="node2")
    lines = list(slurm_job.decide(log_dir, record, []))
    assert "exclude node[7-9],node2" in lines
    assert [line for line in lines if "--exclude" in line] == ["sbatch --exclude=node[7-9],node2"]
    again = RUNNING.replace("Features=", "ExcNodeList=node[2,7-9] Features=")
    assert "exclude node[2,7-9]" in list(slurm_job.decide(log_dir, again, []))
    lines = list(slurm_job.decide(end_of(tmp_path / "other", 75), record, []))
    assert "sbatch --exclude=node[7-9]" in lines


@pytest.mark.parametrize(
    ("code", "goes_on"), [(0, False), (65, False), (79, False), (93, False), (75, True), (76, True)]
)
def test_a_chain_goes_on_only_where_a_job_would_be_requeued(job, write_run, tmp_path, monkeypatch, code, goes_on):
    """STOP (0), bad data (65), bad numbers (79): its other parts wait in the queue, and must not train."""
    monkeypatch.setenv("DSGPT_REQUEUE", "no")
    monkeypatch.setenv("DSGPT_CHAIN", "12 13")
    first = Path(value(prepare(write_run()), "DSGPT_LOG_DIR"))
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    record_verdict(first, Verdict(code, "x", "why"))
    lines = prepare(write_run())
    assert ("done" in lines) is not goes_on
    if not goes_on:
        assert f"say the chain ends: its last start ended with {code} (why); to go on, submit the run again" in lines
        monkeypatch.setenv("DSGPT_CHAIN", "")
        assert "done" not in prepare(write_run()), "the first part of another chain"


@pytest.fixture()
def start_that_ends(job, tmp_path, write_run):
    """start_that_ends(log_lines) -> (decisions, verdict) of another start of the same run, of which srun told so."""
    log = tmp_path / "job.log"
    record = RUNNING.replace("/home/a b/out.log", str(log))

    def start(text: str):
        log_dir = Path(value(prepare(write_run(), record=record), "DSGPT_LOG_DIR"))
        with log.open("a", encoding="utf-8") as file:
            file.write(text)
        return list(slurm_job.decide(log_dir, record, [])), read_verdict(log_dir)

    return start


def test_a_rank_that_a_warning_ended_before_it_could_listen_was_asked_to_stop(start_that_ends):
    """T604, in the first moment of a start: neither a failure of its host nor a start without progress."""
    text = "srun: error: node2: task 1: User defined signal 1\nsrun: error: node1: task 0: Terminated\n"
    for _ in range(4):
        lines, verdict = start_that_ends(text)
        assert lines[-1] == "requeue" and not any(line.startswith("exclude") for line in lines)
        assert verdict.exit_code == 75


def test_the_ranks_of_other_nodes_are_not_blamed_where_a_node_does_not_answer(start_that_ends):
    """As a real SLURM 22.05 told of node2 without power: once the job is on its nodes again, they would be excluded."""
    text = (
        "srun: error: Task launch for StepId=36.0 failed on node node2: Communication connection failure\n"
        "srun: error: Application launch failed: Communication connection failure\n"
        "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.\n"
        "0: slurmstepd-node1: error: *** STEP 36.0 ON node1 CANCELLED AT 2026-11-27T01:10:35 ***\n"
        "srun: error: node1: task 0: Killed\n"
    )
    for _ in range(2):
        lines, _ = start_that_ends(text)
        assert lines[-1] == "requeue" and not any(line.startswith("exclude") for line in lines)


def test_a_host_that_fails_first_twice_is_excluded_and_most_are_not(job, tmp_path, write_run):
    """T614."""
    write = {"rank": 1, "host": "node2"}
    lines = list(slurm_job.decide(end_of(tmp_path, 76, "rank_died", "a", **write), RUNNING, []))
    assert not any(line.startswith("exclude") for line in lines)
    end_of(tmp_path, 76, "infrastructure", "b", rank=-1, host="")  # who only lost a peer accuses nobody
    lines = list(slurm_job.decide(end_of(tmp_path, 76, "hang", "c", **write), RUNNING, []))
    assert "exclude node2" in lines and "sbatch --exclude=node2" in lines
    told = prepare(write_run())
    assert not any("not used" in line for line in told), "half of the nodes is more than may be left out"


def test_a_successor_asks_for_what_this_job_had(job, tmp_path):
    lines = list(slurm_job.decide(end_of(tmp_path, 75), RUNNING, []))
    options = [line.removeprefix("sbatch ") for line in lines if line.startswith("sbatch ")]
    assert options == [
        "--partition=main", "--time=00:10:00", "--nodes=2", "--cpus-per-task=1", "--mem=512M", "--job-name=dsgpt",
        "--output=/home/a b/out.log", "--gpus=3",
    ]  # fmt: skip


def test_the_command_prints_one_decision_a_line_and_its_errors_have_their_codes(job, write_run):
    yaml = write_run(**{"optimizer.learning_rte": 1})
    done = subprocess.run(
        [sys.executable, "-m", "dsgpt.train.slurm_job", "prepare", str(yaml)],
        input=RUNNING, capture_output=True, text=True, env={**os.environ, **VARIABLES},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (78, "") and "learning_rate" in done.stderr


def test_it_stops_when_what_a_commit_needs_is_all_that_is_left():
    """T608, T609: two steps, two saves and the margin."""
    limit = TimeLimit(end=1000.0, total=10_000.0)
    limit.stepped(5.0)
    limit.saved(30.0)
    assert limit.needed == 2 * (5 + 30) + 90
    assert not limit.is_near(now=839.0) and limit.is_near(now=840.0)
    assert TimeLimit(end=1000.0, total=60.0).needed == 6.0, "a short job keeps time to train"
    assert not TimeLimit().is_near()


def test_job_json_says_which_ranks_were_to_start(job, write_run, tmp_path):
    lines = prepare(write_run(), "training.global_batch_size=12")
    told = json.loads((tmp_path / "run/logs" / value(lines, "DSGPT_ATTEMPT") / "job.json").read_text())
    assert (told["job"], told["hosts"], told["ranks"]) == ("12", ["node1", "node2"], [2, 1])
