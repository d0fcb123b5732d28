"""Being asked to stop at any moment of a run: one rank is, all leave at one step, and it goes on as if nothing was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dsgpt.errors import ExitCode
from dsgpt.process import StopRequest, free_port
from dsgpt.train.state import read_metrics
from dsgpt.verdict import Verdict, read_verdict, record_verdict
from tests.faults._trouble import events, train
from tests.pool import ranks

START_STAGES = 4  # how often a start looks whether it is to leave
SETTINGS = {"training.max_steps": 6, "logging.eval_interval": 2, "checkpoint.save_interval": 100}


class AskedAt(StopRequest):
    """Asked by a signal at the so-manieth look, on one rank only."""

    def __init__(self, look: int, rank: int, name: str = "SIGUSR1"):
        super().__init__()
        self.look, self.on, self.name = look, rank, name
        self.rank, self.looks, self.open_files, self.found = 0, 0, [], []

    def poll(self) -> bool:
        return bool(self.requested)

    def is_asked(self) -> bool:
        self.looks += 1
        if self.looks == self.look and self.rank == self.on:
            self.requested = self.name
        return bool(self.requested)

    def end(self) -> None: ...


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    from tests.run_fixtures import write_config

    folder = tmp_path_factory.mktemp("undisturbed")
    assert {end["code"] for end in ranks(2).run(train, write_config(dataset, folder, **SETTINGS), [], "a")} == {0}
    return losses(folder / "run")


@pytest.mark.parametrize(
    "look", [pytest.param(look, marks=() if look % 2 else pytest.mark.slow) for look in range(1, START_STAGES + 1)]
)
def test_a_start_that_is_asked_leaves_before_its_first_step_and_the_next_one_trains(write_run, tmp_path, look):
    """T604: model build, rehearsal, reading of a checkpoint."""
    yaml = write_run(**SETTINGS)
    ends = ranks(2).run(train, yaml, [], "a", AskedAt(look, rank=1, name="SIGTERM"))
    assert [end["code"] for end in ends] == [75, 75] and "nothing new to commit" in ends[0]["text"]
    assert not events(tmp_path / "run", "first_step", "committed")


def test_a_warning_before_the_first_step_twice_in_a_row_means_that_the_time_limit_is_too_short(write_run, tmp_path):
    """It would be requeued for ever."""
    yaml = write_run(**SETTINGS)
    (end, _) = ranks(2).run(train, yaml, [], "a", AskedAt(1, rank=1))
    assert end["code"] == 75
    record_verdict(tmp_path / "run/logs/a", Verdict(75, "warned_at_start"))
    (end, _) = ranks(2).run(train, yaml, [], "b", AskedAt(2, rank=1))
    assert end["code"] == ExitCode.CONFIG and "a longer --time" in end["text"]
    (end, _) = ranks(2).run(train, yaml, [], "c", AskedAt(2, rank=0, name="SIGTERM"))
    assert end["code"] == 75, "preemption says nothing about the time limit"


def test_a_stop_in_an_evaluation_cuts_it_short_and_commits_its_step(write_run, tmp_path, undisturbed):
    """T604: 8 validation samples are one batch on each of 2 ranks."""
    yaml = write_run(**SETTINGS)
    ends = ranks(2).run(train, yaml, [], "a", AskedAt(START_STAGES + 1, rank=1))
    assert [end["code"] for end in ends] == [75, 75]
    folder = tmp_path / "run"
    assert [event["step"] for event in events(folder, "evaluation_stopped", "committed")] == [2, 2]
    assert {end["code"] for end in ranks(2).run(train, yaml, [], "b")} == {0}
    assert losses(folder) == undisturbed


def test_a_stop_in_a_save_leaves_with_that_step(write_run, tmp_path, undisturbed):
    """T604: no second save, and no further step."""
    yaml = write_run(**{**SETTINGS, "checkpoint.save_interval": 3})
    ends = ranks(2).run(train, yaml, ["logging.eval_interval=100"], "a", AskedAt(START_STAGES + 1, rank=1))
    assert [end["code"] for end in ends] == [75, 75]
    assert [event["step"] for event in events(tmp_path / "run", "committed")] == [3]
    assert {end["code"] for end in ranks(2).run(train, yaml, [], "b")} == {0}
    assert losses(tmp_path / "run") == undisturbed


RANK = """
import sys, time
from dsgpt.checkpoint.saver import Saver
from dsgpt.train.worker import main
close = Saver.close
def late(self):
    close(self)
    if self.world.rank == 1:
        time.sleep(5)
Saver.close = late
main(sys.argv[1:])
"""


def start_as_srun_does(yaml, folder, code=RANK, **environment):
    """Two ranks with the variables of a step; SIGTERM and SIGKILL to the others are srun's part, and not played here."""
    log_dir = folder / "run/logs/20260101-000000-aaaa"
    log_dir.mkdir(parents=True)
    started = []
    for rank in range(2):
        told = {
            "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2",
            "MASTER_PORT": started[0][1] if started else str(free_port()),
            "DSGPT_ATTEMPT": log_dir.name, "DSGPT_LOG_DIR": str(log_dir),
        }  # fmt: skip
        log = (folder / f"rank-{rank}.log").open("wb")
        command = [sys.executable, "-c", code, str(yaml)]
        process = subprocess.Popen(
            command, env={**os.environ, **told, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
        started.append((process, told["MASTER_PORT"]))
    return [process for process, _ in started], log_dir


@pytest.mark.slow
def test_under_srun_all_ranks_leave_with_0_after_the_slowest_while_the_verdict_says_75(write_run, tmp_path):
    """T602: one rank is warned; rank 1 needs five more seconds to leave, in which srun would have killed it."""
    yaml = write_run(**{"training.max_steps": 10_000, "checkpoint.asynchronous": True})
    processes, log_dir = start_as_srun_does(yaml, tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    wait_for_lines(metrics, 3, processes, tmp_path)
    processes[1].send_signal(signal.SIGUSR2)
    ended = {}
    while len(ended) < 2:
        for rank, process in enumerate(processes):
            if rank not in ended and process.poll() is not None:
                ended[rank] = time.monotonic()
        time.sleep(0.02)
    assert [process.returncode for process in processes] == [0, 0]
    verdict = read_verdict(log_dir)
    assert (verdict.exit_code, verdict.requeue) == (75, True)
    committed = json.loads(next((tmp_path / "run/checkpoints").glob("step-*/manifest.json")).read_text())["step"]
    assert read_metrics(metrics)[-1]["step"] == committed == verdict.last_committed, "the agreed step, and no other"
    assert abs(ended[0] - ended[1]) < 3, "rank 0 waited for the late one"


def test_an_error_of_all_ranks_before_they_meet_is_told_in_the_verdict(write_run, tmp_path):
    """T613: nothing but the verdict tells the batch script not to start again."""
    processes, log_dir = start_as_srun_does(write_run(**{"training.global_batch_size": 15}), tmp_path)
    assert {process.wait(120) for process in processes} == {78}
    assert read_verdict(log_dir).exit_code == 78


def wait_for_lines(metrics, number, processes, folder):
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > number):
        assert all(process.poll() is None for process in processes), (folder / "rank-0.log").read_text()[-2000:]
        time.sleep(0.1)


SLOW_SAVE = """
import sys, time
from dsgpt.checkpoint.saver import Saver
from dsgpt.train.worker import main
begin = Saver.begin
def slow(self, manifest, *rest, **more):
    if manifest["step"] > 2:
        time.sleep(120)
    return begin(self, manifest, *rest, **more)
Saver.begin = slow
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_grace_shorter_than_the_save_costs_only_what_came_after_the_last_commit(write_run, tmp_path):
    """T603: SIGTERM, 3 s, SIGKILL, while a save takes 120 s. A token in the environment is in no file of the run (T918)."""
    yaml = write_run(**{"training.max_steps": 6, "checkpoint.save_interval": 2})
    secret = {"HF_TOKEN": "hf_canary_of_a_token", "WANDB_API_KEY": "canary_of_a_key"}
    processes, _ = start_as_srun_does(yaml, tmp_path, SLOW_SAVE, **secret)
    wait_for_lines(tmp_path / "run/metrics.jsonl", 3, processes, tmp_path)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    time.sleep(3)
    assert [process.poll() for process in processes] == [None, None], "they are saving"
    for process in processes:
        process.kill()
        process.wait()
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == ["step-00000002"]

    assert {end["code"] for end in ranks(2).run(train, yaml, [], "next")} == {0}
    assert [event["step"] for event in events(tmp_path / "run", "resumed")] == [2]
    held = [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert held == []


def train_until(world, yaml, seconds, attempt):
    """One start in a job that ends in so many seconds, as the batch script tells it."""
    end = int(time.time()) + seconds
    os.environ.update(DSGPT_JOB_END_TIME=str(end), DSGPT_JOB_SECONDS="40")
    try:
        return train(world, yaml, [], attempt) | {"job_ends": end}
    finally:
        del os.environ["DSGPT_JOB_END_TIME"], os.environ["DSGPT_JOB_SECONDS"]


@pytest.mark.slow
def test_the_end_of_the_job_is_met_with_a_commit_without_any_signal(write_run, tmp_path):
    """T608: rank 0 looks at the clock; a tenth of the job's time is left for leaving."""
    yaml = write_run(**{"training.max_steps": 100_000})
    ends = ranks(2).run(train_until, yaml, 20, "a", timeout=60)
    assert [end["code"] for end in ends] == [75, 75] and "the time limit" in ends[0]["text"]
    committed = events(tmp_path / "run", "committed")[-1]
    assert committed["step"] == losses(tmp_path / "run")[-1][0] and committed["time"] < ends[0]["job_ends"]


@pytest.mark.slow
def test_another_dtype_on_resume_carries_the_fp32_state_to_the_bit_and_is_told(write_run, tmp_path):
    """T507: masters and moments are fp32 in every checkpoint, so nothing is lost, and nothing has to be refused."""
    from dsgpt.checkpoint.diff import compare

    stop = {"training.max_steps": 6, "run.stop_at_step": 3}
    assert {end["code"] for end in ranks(2).run(train, write_run(**stop), [], "a")} == {0}
    step = tmp_path / "run/checkpoints/step-00000003"
    fork = write_run("fork", **stop, **{"model.init_from": f"fork:{tmp_path / 'run'}@3", "training.dtype": "bf16"})
    ends = ranks(2).run(train, fork, [], "b")
    assert {end["code"] for end in ends} == {0}, ends[0]["text"]
    assert not compare(step, tmp_path / "fork/checkpoints/step-00000003").tensors
    told = ranks(2).run(train, write_run(**{"training.max_steps": 6}), ["training.dtype=bf16"], "c")
    assert {end["code"] for end in told} == {0}
    changed = " ".join(event["text"] for event in events(tmp_path / "run", "config_changed"))
    assert "training.dtype" in changed
