"""How a job ends when something goes wrong in one rank: found, told with its cause, and nothing of it left."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from dsgpt.checkpoint import commit
from dsgpt.errors import ExitCode
from tests.integration.test_launch import DSGPT, processes_of, start, wait_for_step, wait_until_gone

HANG_SECONDS = 6


def ranks_of(yaml: Path) -> dict[int, int]:
    """rank -> process id of the ranks of a job."""
    found = {}
    for pid in processes_of(str(yaml)):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None and b"launcher" not in command and b"watchdog" not in command:
            found[int(rank)] = pid
    return found


def watchdogs(folder: Path) -> list[int]:
    """Watchdogs of the job whose processes were started with this folder in their environment."""
    marked = []
    for pid in processes_of("dsgpt.watchdog"):
        try:
            if str(folder).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                marked.append(pid)
        except OSError:
            continue
    return marked


def events(folder: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def verdict(folder: Path) -> dict:
    (path,) = (folder / "logs").glob("*/end.json")
    return json.loads(path.read_text())


def stacks(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "logs").glob("*/stacks-rank-*.txt")}


@pytest.fixture()
def running(write_run, tmp_path):
    """A job under `dsgpt train` that has made five steps and committed; gone at the end whatever happens."""
    yaml = write_run(
        "ending",
        **{
            "training.max_steps": 100000,
            "checkpoint.save_interval": 3,
            "checkpoint.keep_last": 2,
            "run.hang_timeout_seconds": HANG_SECONDS,
        },
    )
    process = start([*DSGPT, "train", str(yaml)], TEST_FOLDER=str(tmp_path))
    wait_for_step(tmp_path / "ending", 5, process)
    yield yaml, process, tmp_path / "ending"
    process.kill()
    for pid in processes_of(str(yaml)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_whole_job_and_is_named(running, rank):
    yaml, process, folder = running
    os.kill(ranks_of(yaml)[rank], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 76, output
    wait_until_gone(yaml, 5)
    assert not watchdogs(folder.parent)
    told = verdict(folder)
    assert (told["cause"], told["rank"], told["exit_code"], told["requeue"]) == ("rank_died", rank, 76, True)
    assert told["host"] and told["step"] >= 5 and told["last_committed"] >= 3
    assert f"rank {rank} on " in output and "was killed or crashed" in output
    (event,) = events(folder, "end")
    assert event["cause"] == "rank_died" and event["rank"] == rank
    assert not commit.verify(commit.list_committed(folder / "checkpoints")[-1][1])


@pytest.mark.slow
def test_a_stopped_rank_is_found_hanging_with_stacks_of_the_living(running):
    yaml, process, folder = running
    os.kill(ranks_of(yaml)[1], signal.SIGSTOP)
    began = time.monotonic()
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 76, output
    assert time.monotonic() - began < HANG_SECONDS + 30, "not a bound that is promised here, only that it ends"
    wait_until_gone(yaml, 5)
    assert not watchdogs(folder.parent)
    told = verdict(folder)
    assert (told["cause"], told["rank"]) == ("hang", 1), told
    assert "stopped by a signal" in told["message"]
    waits = stacks(folder)["stacks-rank-00000.txt"]
    assert "train/loop.py" in waits, (
        "the rank that waits tells where: in a step, or in what the ranks agree on for a save"
    )


FAULTY = """
import os, re, sys, time
from dsgpt.train import loop, save, step
from dsgpt.train.worker import main

kind, rank = os.environ["FAULT"], os.environ["RANK"]
steps = 0

def hold_the_lock():
    re.match("(a+)+b", "a" * 60)  # exponential, in C, without ever giving up the interpreter's lock

def faulty(original):
    def call(*arguments, **named):
        global steps
        steps += 1
        if steps == 4 and rank == "1":
            if kind == "gil":
                hold_the_lock()
            if kind == "raise":
                raise RuntimeError("an error of one rank alone")
            if kind == "exit":
                os._exit(0)
            if kind == "leave":
                import atexit
                atexit.register(time.sleep, 1000)
                raise RuntimeError("an error, and then an exit that hangs")
            if kind == "memory":
                eaten = []
                while True:
                    eaten.append(bytearray(32 << 20))
            if kind == "collective":
                arguments[1].max(0.0)  # one more than rank 0 calls
            if kind == "abort":
                os.abort()
            if kind == "data":
                time.sleep(1000)
        return original(*arguments, **named)
    return call

if kind == "data":
    step.StepLoader._read = faulty(step.StepLoader._read)
elif kind == "save":
    def broken(*arguments):
        if rank == "1":
            raise RuntimeError("this rank cannot write")
        return original(*arguments)
    from dsgpt.checkpoint import saver
    original, saver.write_file = saver.write_file, broken
else:
    loop.train_step = faulty(loop.train_step)
main(sys.argv[1:])
"""

CASES = {
    "gil": ("hang", 1, "stuck in 'step'"),
    "data": ("hang", 1, "stuck in 'load data'"),
    "raise": ("infrastructure", 1, "an error of one rank alone"),
    "leave": ("infrastructure", 1, "an exit that hangs"),
    "exit": ("rank_died", 1, "was killed or crashed in 'step'"),
    "abort": ("rank_died", 1, "was killed or crashed in 'step'"),
}


IN_DEFAULT_TIER = ("gil", "raise")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in IN_DEFAULT_TIER else pytest.mark.slow) for kind in CASES]
)
def test_a_fault_of_one_rank_ends_both_with_its_cause(write_run, tmp_path, kind):
    """T702-T705. Two ranks without any launcher, as under srun: only they and their watchdogs can end the job."""
    cause, rank, text = CASES[kind]
    settings = {"training.max_steps": 1000, "checkpoint.save_interval": 2, "run.hang_timeout_seconds": HANG_SECONDS}
    yaml = write_run("faulty", **settings)
    codes = run_two_ranks(yaml, tmp_path, kind)
    folder = tmp_path / "faulty"
    told = verdict(folder)
    assert (told["cause"], told["rank"], told["exit_code"]) == (cause, rank, 76), told
    assert text in told["message"]
    assert all(code in (76, -signal.SIGKILL, -signal.SIGABRT) or (kind == "exit" and code == 0) for code in codes)
    assert told["last_committed"] == 2
    assert len(events(folder, "end")) == 1
    assert not watchdogs(tmp_path)


def test_the_third_start_that_fails_without_a_commit_has_93_in_its_verdict(write_run, tmp_path):
    """Whoever decides by the marker alone, without a supervisor, must not try a fourth time."""
    for number in range(2):
        (tmp_path / f"faulty/logs/20200101-00000{number}-abcd").mkdir(parents=True)
    codes = run_two_ranks(write_run("faulty", **{"training.max_steps": 1000}), tmp_path, "abort")
    told = verdict(tmp_path / "faulty")
    assert (told["cause"], told["rank"], told["exit_code"], told["requeue"]) == ("rank_died", 1, 93, False), told
    assert "3 starts in a row ended without a new checkpoint" in told["message"] and codes[0] in (93, -signal.SIGKILL)


@pytest.mark.slow
def test_ranks_that_disagree_about_a_collective_do_not_wait_for_ever(write_run, tmp_path):
    """T708. Which of the two is to blame nobody can tell; that they stand still is told, with the stacks of both."""
    settings = {"training.max_steps": 1000, "checkpoint.save_interval": 2, "run.hang_timeout_seconds": HANG_SECONDS}
    run_two_ranks(write_run("faulty", **settings), tmp_path, "collective")
    told = verdict(tmp_path / "faulty")
    assert told["exit_code"] == 76 and told["last_committed"] == 2, told
    assert not watchdogs(tmp_path)


def test_a_rank_that_never_comes_is_waited_for_only_so_long(write_run, tmp_path, monkeypatch):
    """T709: rank 0 of 2, alone. The run's folder is not touched."""
    script = tmp_path / "alone.py"
    script.write_text(
        "import sys\nfrom dsgpt.train import worker\nworker.MEET_SECONDS = 3.0\nworker.main(sys.argv[1:])\n"
    )
    yaml = write_run("alone", **{"run.hang_timeout_seconds": 1})
    ranks_and_port = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    process = start([sys.executable, str(script), str(yaml)], DS_ACCELERATOR="cpu", **ranks_and_port)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 76, output
    assert "rank 1 of 2 did not come to 127.0.0.1:" in output and "within 3 s" in output
    assert not (tmp_path / "alone" / "logs").exists()


@pytest.mark.slow
def test_a_rank_that_cannot_save_is_told_of_and_the_run_ends_after_three(write_run, tmp_path):
    """T106."""
    yaml = write_run("faulty", **{"training.max_steps": 1000, "checkpoint.save_interval": 2})
    assert run_two_ranks(yaml, tmp_path, "save") == [76, 76]
    failed = events(tmp_path / "faulty", "save_failed")
    assert [event["in_a_row"] for event in failed] == [1, 2, 3]
    assert "rank 1: this rank cannot write" in failed[0]["text"]
    assert verdict(tmp_path / "faulty")["cause"] == "save_failed"


@pytest.fixture()
def memory_cgroup():
    """A control group of this machine with 2 GiB of memory; skips where we may not make one."""
    import uuid

    v1 = Path("/sys/fs/cgroup/memory")
    folder = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"dsgpt-test-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
        limit = folder / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")
        limit.write_text(str(2 << 30))
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    yield folder / "cgroup.procs"
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


def test_a_kill_for_want_of_memory_is_told_as_such(write_run, tmp_path, memory_cgroup):
    """The kernel kills rank 1 in a real control group: 77, with plan, phase and what needs less; it had committed."""
    yaml = write_run("faulty", **{"training.max_steps": 1000, "checkpoint.save_interval": 2})
    codes = run_two_ranks(yaml, tmp_path, "memory", memory_cgroup)
    told = verdict(tmp_path / "faulty")
    assert (told["cause"], told["rank"], told["exit_code"], told["phase"]) == ("out_of_memory", 1, 77, "step"), told
    assert told["requeue"] is True and told["committed_here"] is True
    assert codes == [77, -signal.SIGKILL]
    for part in ("want of host memory", "planned", "peak", "training.micro_batch_size_per_gpu=2 or training.activ"):
        assert part in told["message"]


def run_two_ranks(yaml: Path, folder: Path, fault: str, control_group: Path | None = None) -> list[int]:
    from dsgpt.process import free_port

    def enter() -> None:
        if control_group is not None:
            control_group.write_text(str(os.getpid()))

    script = folder / "faulty.py"
    script.write_text(FAULTY)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    processes = [
        start(
            [sys.executable, str(script), str(yaml)],
            before=enter,
            **common,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            DS_ACCELERATOR="cpu",
            FAULT=fault,
            TEST_FOLDER=str(folder),
            DSGPT_ATTEMPT="a1",
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.communicate(timeout=120)
        return [process.returncode for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_three_starts_without_a_commit_end_with_93_and_the_next_one_tries_again(write_run, tmp_path):
    """A run that dies before its first commit, three times; a stop in between (75) would not have counted."""
    from dsgpt.checkpoint import starts
    from dsgpt.checkpoint.starts import Start
    from dsgpt.verdict import Verdict, record_verdict

    yaml = write_run("stuck", **{"training.max_steps": 4})
    folder = tmp_path / "stuck"
    ends = [Verdict(76, "hang"), None, Verdict(76, "rank_died")]
    for number, end in enumerate(ends):
        attempt = f"20200101-00000{number}-abcd"
        (folder / "logs" / attempt).mkdir(parents=True)
        if number != 1:  # the second one died before it came to its line
            starts.record_start(folder, Start(attempt, "7", number, ()))
        if end:
            record_verdict(folder / "logs" / attempt, end)
    process = start([*DSGPT, "train", str(yaml)])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.NO_PROGRESS, output
    assert "the last 3 starts ended without a new checkpoint" in output
    process = start([*DSGPT, "train", str(yaml)])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
