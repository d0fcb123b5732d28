"""`dsgpt status`, `logs` and `cancel` on run folders as each kind of end leaves them; SLURM's commands are stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsgpt.checkpoint import commit, starts
from dsgpt.cli import main
from dsgpt.errors import ConfigError, ExitCode
from dsgpt.launch.submission import Submission, create_folder, read_submissions, record
from dsgpt.lease import Lease, Owner
from dsgpt.train.cancel import cancel_run
from dsgpt.train.run_logs import follow, log_files, show
from dsgpt.train.runs import find_runs, require_run
from dsgpt.train.status import MAX_LINES, read_status
from dsgpt.verdict import Verdict, record_verdict

SQUEUE = """#!/bin/sh
[ ! -e "$SHIM/down" ] || { echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1; }
[ -s "$SHIM/jobs" ] || { echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }
cat "$SHIM/jobs"
"""
SCANCEL = """#!/bin/sh
echo "$*" >>"$SHIM/scancel.log"
"""


@pytest.fixture()
def slurm(tmp_path, monkeypatch):
    """queue("7|RUNNING|me|9:00|n1|None", …) is what squeue will say."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("squeue", SQUEUE), ("scancel", SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SHIM", str(folder))

    def queue(*lines: str) -> Path:
        (folder / "jobs").write_text("".join(line + "\n" for line in lines))
        return folder

    return queue


class Made:
    """A run folder built through the package's own writers."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, attempt: str, job: str = "", restarts: int = 0) -> Path:
        log_dir = self.folder / "logs" / attempt
        log_dir.mkdir(parents=True)
        (log_dir / "node1.log").write_text(f"0: first of {attempt}\n1: second\n0: third\n")
        commits = tuple(
            (step, commit.attempt_of(path)) for step, path in commit.list_committed(self.folder / "checkpoints")
        )
        starts.record_start(self.folder, starts.Start(attempt, job, restarts, commits))
        self.event(attempt, "start", host="node1", world_size=2)
        return log_dir

    def event(self, attempt: str, event: str, **fields) -> None:
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "attempt": attempt, "event": event, **fields}) + "\n")

    def steps(self, attempt: str, first: int, last: int) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            for step in range(first, last + 1):
                line = {
                    "time": time.time(),
                    "attempt": attempt,
                    "step": step,
                    "max_steps": 1000,
                    "loss": 9.0 - step / 1000,
                }
                line |= {"tokens_per_second": 1000.0, "consumed_tokens": 512 * step}
                file.write(json.dumps(line) + "\n")

    def commit(self, attempt: str, step: int) -> None:
        checkpoints = self.folder / "checkpoints"
        tmp = commit.begin(checkpoints, step, attempt)
        commit.commit(checkpoints, tmp, {"step": step, "attempt": attempt, "files": {}})

    def submitted(self, job: str, **fields) -> Path:
        folder = create_folder(self.folder)
        words = ("submit", "run.yaml", "--nodes", "2")
        record(folder, Submission(job, time.time(), ("sbatch", "x"), asked=words, cwd=str(Path.cwd()), **fields))
        return folder


@pytest.fixture()
def run(tmp_path) -> Made:
    return Made(tmp_path / "run")


def end(log_dir: Path, code: int, cause: str, **fields) -> None:
    record_verdict(log_dir, Verdict(code, cause, **fields))


def told(run: Made) -> tuple[str, str, int]:
    """(state, all lines, exit code); never more lines than promised."""
    status = read_status(run.folder)
    lines = status.lines()
    assert len(lines) <= MAX_LINES and lines[0].startswith(f"{run.folder}: {status.state}")
    assert json.loads(json.dumps(status.as_dict(), default=str))["state"] == status.state
    return status.state, "\n".join(lines), status.exit_code


def test_a_finished_run_and_one_that_a_person_stopped_are_well(run, slurm):
    slurm()
    end(run.start("20260101-000000-aaaa"), 0, "stopped", message="stopped at step 5 of 1000, committed")
    run.commit("20260101-000000-aaaa", 5)
    assert told(run)[::2] == ("stopped", 0)
    end(run.start("20260101-000001-aaaa"), 0, "done")
    run.steps("20260101-000001-aaaa", 6, 1000)
    run.commit("20260101-000001-aaaa", 1000)
    state, text, code = told(run)
    assert (state, code) == ("finished", 0) and "step 1000/1000, loss 8.0000" in text and "checkpoint export" in text


def test_a_failure_names_cause_rank_host_commit_lost_steps_and_what_to_type(run, slurm):
    slurm()
    log_dir = run.start("20260101-000000-aaaa", job="7")
    run.submitted("7")
    run.steps("20260101-000000-aaaa", 1, 57)
    run.commit("20260101-000000-aaaa", 40)
    message = "out of memory in 'step' at step 57\n" + "\n".join(f"  line {number}" for number in range(50))
    fields = {"rank": 3, "host": "node2", "step": 57, "phase": "step", "message": message}
    end(log_dir, 77, "out_of_memory", **fields)
    state, text, code = told(run)
    assert (state, code) == ("failed", 77)
    for part in (
        "cause      out_of_memory, rank 3 on node2, in 'step'",
        "out of memory in 'step' at step 57",
        "committed  step 40, 0 s ago; 17 steps after it are lost",
        "lines more in the log",
        "log        ",
        "type       correct what it says, then: dsgpt submit run.yaml --nodes 2",
    ):
        assert part in text, text


def test_three_ends_without_a_commit_leave_no_attempt(run, slurm):
    slurm()
    run.commit("20251231-000000-aaaa", 3)
    for number in range(2):
        end(run.start(f"2026010{number}-000000-aaaa"), 76, "rank_died", rank=1, host="node2")
        assert f"{1 + number} in a row without a new commit; {2 - number} left" in told(run)[1]
    third = run.start("20260103-000000-aaaa")
    end(third, 93, "rank_died", message="3 starts in a row ended without a new checkpoint", rank=1, host="node2")
    state, text, code = told(run)
    assert (state, code) == ("failed", 93) and "correct the cause, then" in text


@pytest.mark.parametrize("code", [65, 78, 79])
def test_what_a_person_has_to_correct_is_said_with_the_runs_own_code(run, slurm, code):
    slurm()
    end(run.start("20260101-000000-aaaa"), code, ExitCode(code).name.lower(), message="x\n  do:   y", rank=0, host="n")
    state, text, found = told(run)
    assert (state, found) == ("failed", code) and "do:   y" in text
    assert f"then: dsgpt train {run.folder}/config.yaml" in text


def test_a_preempted_run_is_queued_again_or_says_how_to_go_on(run, slurm):
    end(run.start("20260101-000000-aaaa", job="7"), 75, "preempted", message="stopped at step 9")
    run.commit("20260101-000000-aaaa", 9)
    slurm("7|PENDING|me|1:00:00||BeginTime")
    state, text, code = told(run)
    assert (state, code) == ("queued", 0) and "job 7 PENDING (BeginTime)" in text and "queued again" in text
    slurm()
    state, text, code = told(run)
    assert (state, code) == ("preempted", 75) and "dsgpt train" in text
    (run.folder / "logs" / "20260101-000000-aaaa" / "successor").write_text("8\n")
    slurm("8|PENDING|me|1:00:00||Dependency")
    assert told(run)[0] == "queued", "the job that it submitted for the rest"


def test_a_lost_node_leaves_no_verdict_and_status_says_so(run, slurm):
    slurm("7|NODE_FAIL|me|0:00|n1|None")
    run.start("20260101-000000-aaaa", job="7")
    run.steps("20260101-000000-aaaa", 1, 12)
    state, text, code = told(run)
    assert (state, code) == ("failed", 76) and "no verdict" in text and "NODE_FAIL" in text and "on node1" in text
    assert "committed  nothing yet; 12 steps are lost" in text
    slurm("7|PENDING|me|1:00:00||BeginTime")
    assert told(run)[0] == "queued"


def test_a_running_job_shows_progress_and_what_a_start_is_at(run, slurm):
    slurm("7|RUNNING|me|59:00|node[1-2]|None")
    run.submitted("7")
    assert "the batch script is at work" in told(run)[1]
    run.start("20260101-000000-aaaa", job="7")
    run.event("20260101-000000-aaaa", "building_model")
    assert "starting: building model" in told(run)[1]
    run.event("20260101-000000-aaaa", "first_step")
    run.steps("20260101-000000-aaaa", 1, 100)
    state, text, code = told(run)
    assert (state, code) == ("running", 0)
    assert (
        "step 100/1000, loss 8.9000, 1K tokens/s, 7 min 41 s left" in text
    )  # 900 steps of 512 tokens at 1000 a second
    assert "job 7 RUNNING on node[1-2], 59:00 left" in text and "logs" in text and "--follow" in text


def test_a_run_on_this_host_is_seen_by_its_lease_and_ends_by_a_signal(run, tmp_path):
    code = (
        "import sys, time, signal; from pathlib import Path; from dsgpt.lease import Lease, Owner; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "Lease.acquire(Path(sys.argv[1]), Owner.of_this_process('20260101-000000-aaaa')); "
        "print('here', flush=True); time.sleep(60)"
    )
    run.start("20260101-000000-aaaa")
    process = subprocess.Popen([sys.executable, "-c", code, str(run.folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    assert told(run)[0] == "running"
    assert cancel_run(run.folder) == [f"SIGTERM to process {process.pid}: it commits its step and leaves with 75"]
    assert process.wait(20) == 7
    state, text, code = told(run)
    assert state == "failed" and "no verdict" in text
    assert "gone" in cancel_run(run.folder)[0]


def test_a_holder_elsewhere_without_a_queue_to_ask_counts_by_the_age_of_its_lease(run, slurm):
    (slurm() / "down").touch()
    run.start("20260101-000000-aaaa", job="7")
    owner = Owner("20260101-000000-aaaa", "7", 0, "elsewhere", "another boot", 5, "1")
    lease = Lease(run.folder, owner, 1)
    lease._write()
    state, text, _ = told(run)
    assert state == "running" and "cannot be asked" in text
    with pytest.raises(ConfigError, match="elsewhere"):
        cancel_run(run.folder)
    old = time.time() - 3600
    os.utime(lease.path, (old, old))
    assert told(run)[0] == "failed"


def test_jobs_that_never_started_are_told_from_those_that_wait(run, slurm):
    run.submitted("7")
    slurm("7|PENDING|me|1:00:00||Priority")
    assert told(run)[0] == "queued"
    (slurm() / "down").touch()
    assert told(run)[::2] == ("submitted", 0)
    (slurm() / "down").unlink()
    state, text, code = told(run)
    assert (state, code) == ("failed", 76) and "left the queue before training began" in text
    slurm("7|CANCELLED|me|0:00||None")
    assert told(run)[::2] == ("cancelled", 75)


def test_a_failed_rehearsal_is_why_the_long_job_never_ran(run, slurm):
    slurm()
    folder = run.submitted("6", kind="rehearse")
    run.submitted("7", after="6")
    (folder / "rehearsal").mkdir()
    checks = [{"name": "the requeued job continued from it", "passed": False, "detail": "it resumed at []"}]
    report = {"ok": False, "verdict": "the loop DOES NOT HOLD on this site: see NO above", "checks": checks}
    (folder / "rehearsal" / "verdict.json").write_text(json.dumps(report))
    state, text, code = told(run)
    assert (state, code) == ("failed", 1) and "its rehearsal failed" in text and "it resumed at []" in text


def test_cancel_takes_only_this_users_jobs_of_this_run_newest_first_and_says_so(run, slurm, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "me")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    run.submitted("7")
    run.submitted("12")
    folder = slurm("7|RUNNING|me|9:00|n1|None", "12|PENDING|me|9:00||Dependency", "99|RUNNING|me|9:00|n1|None")
    assert len(cancel_run(run.folder)) == 2
    assert (folder / "scancel.log").read_text() == "12 7\n"
    assert all(one.cancelled for one in read_submissions(run.folder))
    slurm("7|COMPLETING|me|9:00|n1|None")
    assert told(run)[0] == "cancelled"
    slurm("7|RUNNING|other|9:00|n1|None")
    with pytest.raises(ConfigError, match="another user"):
        cancel_run(run.folder)
    slurm()
    assert cancel_run(run.folder) == ["nothing of this run is running or waiting"]


def test_of_somebodys_array_only_the_runs_own_task_goes(run, slurm, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "me")
    run.start("20260101-000000-aaaa", job="7_3")
    folder = slurm("7_3|RUNNING|me|9:00|n1|None", "7_4|RUNNING|me|9:00|n1|None")
    cancel_run(run.folder)
    assert (folder / "scancel.log").read_text() == "7_3\n"


def test_what_a_rewind_superseded_does_not_count(run, slurm):
    slurm()
    end(run.start("20260101-000000-aaaa"), 75, "preempted")
    run.steps("20260101-000000-aaaa", 1, 50)
    run.commit("20260101-000000-aaaa", 30)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"superseded_after": 30}) + "\n" + '{"step": 31, "los')
    status = read_status(run.folder)
    assert (status.step, status.steps_lost) == (30, 0)


def test_only_the_ends_of_long_files_are_read(run, slurm, monkeypatch):
    slurm()
    end(run.start("20260101-000000-aaaa"), 75, "preempted")
    line = json.dumps({"time": 1.0, "step": 1, "max_steps": 2_000_000, "loss": 1.0, "pad": "x" * 100}) + "\n"
    with (run.folder / "metrics.jsonl").open("w") as file:
        file.writelines(line for _ in range(1_000_000))
        file.write(line.replace('"step": 1,', '"step": 1000001,'))
    read = []
    plain = Path.open

    def counting(path, *arguments, **keywords):
        file = plain(path, *arguments, **keywords)
        if path.name == "metrics.jsonl":
            whole = file.read
            file = type("Counting", (), {"__enter__": lambda s: s, "__exit__": lambda s, *_: None, "seek": file.seek})()
            file.read = lambda size: read.append(size) or whole(size)
        return file

    monkeypatch.setattr(Path, "open", counting)
    assert read_status(run.folder).step == 1_000_001
    assert sum(read) < 4 << 20


def test_another_job_that_found_the_folder_taken_is_not_the_runs_end(run, slurm):
    slurm()
    end(run.start("20260101-000000-aaaa"), 0, "done")
    end(run.start("20260102-000000-aaaa"), 73, "locked")
    assert told(run)[0] == "finished"


def test_a_folder_of_runs_gives_a_line_each_and_the_first_bad_code(tmp_path, slurm, capsys):
    slurm()
    for name, code, cause in (("a", 0, "done"), ("b", 79, "numerical"), ("deep/c", 77, "out_of_memory")):
        end(Made(tmp_path / "all" / name).start("20260101-000000-aaaa"), code, cause)
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path / "all")])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 79 and len(lines) == 3 and "finished" in lines[0] and "numerical" in lines[1]
    assert [path.name for path in find_runs(tmp_path / "all")] == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="not a run's folder"):
        require_run(tmp_path / "all")
    with pytest.raises(ConfigError, match="no run here"):
        find_runs(tmp_path / "bin")


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_logs_are_those_of_the_newest_start_or_of_the_one_named(run, slurm):
    run.start("20260101-000000-aaaa")
    newest = run.start("20260102-000000-bbbb")
    (run.folder / "logs" / "slurm-7.log").write_text("batch\n")
    (newest / "stacks-rank-00001.txt").write_text("Thread\n")
    assert [path.name for path in log_files(run.folder)] == ["slurm-7.log", "node1.log"]
    text = "\n".join(show(run.folder, 50))
    assert "batch" in text and "first of 20260102-000000-bbbb" in text and "first of 20260101" not in text
    assert "first of 20260101-000000-aaaa" in "\n".join(show(run.folder, 50, attempt="20260101-000000-aaaa"))
    assert [line for line in show(run.folder, 1, rank=0) if not line.startswith("=")] == ["0: third"]
    assert "Thread" in list(show(run.folder, 9, stacks=True))
    with pytest.raises(ConfigError, match="no such start"):
        list(show(run.folder, 9, attempt="nix"))


def test_following_goes_on_with_the_next_start_and_ends_with_the_run(run, slurm):
    slurm()
    first = run.start("20260101-000000-aaaa")
    lines = follow(run.folder)
    got = [next(lines) for _ in range(4)]
    assert got[0].startswith("==>") and got[3] == "0: third"
    end(first, 76, "rank_died")
    second = run.start("20260102-000000-bbbb")
    end(second, 0, "done")
    assert list(lines)[-1] == "0: third", "and it came to an end"


def test_the_verbs_are_there(run, slurm, capsys):
    slurm()
    end(run.start("20260101-000000-aaaa"), 76, "rank_died", rank=1, host="node2")
    with pytest.raises(SystemExit) as ended:
        main(["status", str(run.folder), "--json"])
    assert ended.value.code == 76 and json.loads(capsys.readouterr().out)["host"] == "node2"
    with pytest.raises(SystemExit):
        main(["cancel", str(run.folder), "--json"])
    assert "nothing" in json.loads(capsys.readouterr().out)["done"][0]
    with pytest.raises(SystemExit):
        main(["logs", str(run.folder), "--lines", "1"])
    assert capsys.readouterr().out.endswith("0: third\n")
