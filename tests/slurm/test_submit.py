"""`dsgpt submit`, `status` and `cancel` with a real SLURM: its sbatch reads our header, its queue is what status tells."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsgpt.errors import ConfigError
from dsgpt.launch import sbatch
from dsgpt.launch.queue import cancel, look
from dsgpt.launch.submission import read_submissions
from tests.faults._names import hostile_texts

pytestmark = pytest.mark.slurm

ECHO = "#!/bin/bash\n#SBATCH -n1\necho arrived\n"


def dsgpt(*words: object, code: int = 0, **environment: str) -> str:
    """What the command prints, as a process of its own."""
    command = [sys.executable, "-m", "dsgpt", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def until(found, seconds: float, what: str):
    """The first true value of found(); fails with `what` when none came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(1)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


@pytest.fixture()
def runs(cluster, tmp_path) -> Iterator[Path]:
    """Where the runs of a test are; whatever is left of their jobs is cancelled."""
    yield tmp_path
    jobs = [one.job_id for folder in tmp_path.rglob("submissions") for one in read_submissions(folder.parent)]
    if jobs:
        cancel(jobs)
        until(lambda: not [job for job in look(jobs) or [] if job.runs or job.waits], 60, "the end of all jobs")


def field(job: str, name: str, after: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, check=True).stdout.decode()
    return shown.partition(f" {name}=")[2].partition(f" {after}=")[0]


def test_the_real_sbatch_reads_hostile_names_as_they_were_written(cluster, tmp_path):
    canary = Path("/tmp") / f"canary-{os.getpid()}"
    names = [text for text in hostile_texts(random.Random(3), canary, 200) if text][:80]
    arrived = refused = 0
    for number, name in enumerate(names):
        script = tmp_path / f"{number}.sbatch"
        try:
            options = {"job-name": name, "hold": "", "output": sbatch.log_pattern(str(tmp_path), "%j.log"), "time": "1"}
            script.write_text(sbatch.render(ECHO, options, {}), "utf-8")
        except ConfigError:
            refused += 1
            continue
        job = sbatch.submit(["sbatch", "--parsable", str(script)], options)
        shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, check=True).stdout.decode()
        assert f"JobId={job} JobName={name} UserId=" in shown
        cancel([job])
        arrived += 1
    assert arrived > 30 and refused > 10 and not canary.exists()


def test_the_real_sbatch_writes_its_log_into_folders_of_odd_names(cluster, tmp_path):
    for name in ("50%j%%", "a b", "it's", '"q"', "$(x)", "é日", "-n", "a#b", "[1-2]", "%x"):
        folder = tmp_path / name
        folder.mkdir()
        options = {"output": sbatch.log_pattern(str(folder), "slurm-%j.log"), "time": "1", "open-mode": "append"}
        (folder / "x.sbatch").write_text(sbatch.render(ECHO, options, {}), "utf-8")
        job = sbatch.submit(["sbatch", "--parsable", str(folder / "x.sbatch")], options)
        log = folder / f"slurm-{job}.log"
        until(lambda log=log: log.exists() and log.read_text(), 60, f"the log {log}")
        assert log.read_text() == "arrived\n"


def test_a_chain_is_queued_told_of_and_taken_back_whole(runs, write_run):
    config = write_run(name="chained")
    words = ["submit", config, "--nodes", "2", "--time", "5", "--chain", "3", "--sbatch-option", "begin=now+3600"]
    told = json.loads(dsgpt(*words, "--json"))
    jobs = [one["job_id"] for one in told["jobs"]]
    assert len(jobs) == 3 and told["world_size"] == 2
    assert field(jobs[1], "Dependency", "Requeue").startswith(f"afterany:{jobs[0]}")
    text = dsgpt("status", runs / "chained")
    assert "queued" in text.splitlines()[0] and f"job {jobs[0]} PENDING" in text
    assert dsgpt("cancel", runs / "chained").count("cancelled") == 3
    assert not [job for job in look(jobs) or [] if job.runs or job.waits]
    assert "cancelled" in dsgpt("status", runs / "chained", code=75)


def test_a_submitted_run_is_watched_to_its_end_and_not_submitted_again(runs, write_run):
    config = write_run(name="whole", **{"training.max_steps": 40})
    words = ["submit", config, "--nodes", "2", "--time", "5"]
    dsgpt(*words)
    config.write_text("run: {}")  # the job has its own copy
    folder, seen = runs / "whole", set()

    def ended() -> bool:
        seen.add(json.loads(dsgpt("status", folder, "--json"))["state"])
        return not seen.isdisjoint({"finished", "failed"})

    until(ended, 180, "the run's end")
    assert "finished" in seen and seen <= {"queued", "running", "finished"}
    assert "finished: step 40" in dsgpt("logs", folder, "--lines", "300")
    done = json.loads(dsgpt("submit", folder / "submissions" / "1" / "config.yaml", "--nodes", "2", "--json"))
    assert done["jobs"] == [] and "nothing to train" in done["nothing_left"]


def test_a_cancelled_run_has_committed_and_is_not_requeued(runs, write_run):
    config = write_run(name="taken", **{"training.max_steps": 100000})
    [job] = json.loads(dsgpt("submit", config, "--nodes", "2", "--time", "10", "--json"))["jobs"]
    folder = runs / "taken"
    until(lambda: '"step": 5,' in _read(folder / "metrics.jsonl"), 180, "step 5")
    assert "cancelled" in dsgpt("cancel", folder)
    until(lambda: not [one for one in look([job["job_id"]]) or [] if one.runs], 60, "the job's end")
    time.sleep(5)  # a requeued job would be there by now
    assert not [one for one in look([job["job_id"]]) or [] if one.runs or one.waits]
    text = dsgpt("status", folder, code=75)
    assert "cancelled" in text.splitlines()[0] and "committed  step" in text and "type       dsgpt submit" in text


def test_a_rehearsal_stops_requeues_resumes_and_lets_the_long_job_go(runs, write_run):
    config = write_run(name="rehearsed", **{"training.max_steps": 400})
    told = json.loads(dsgpt("submit", config, "--nodes", "2", "--time", "10", "--rehearse", "--json"))
    first, second = (one["job_id"] for one in told["jobs"])
    folder = runs / "rehearsed"
    verdict = folder / "submissions" / "1" / "rehearsal" / "verdict.json"
    until(lambda: verdict.exists() or not look([first]), 400, "the rehearsal's verdict")
    report = json.loads(verdict.read_text())
    log = _read(folder / "logs" / f"slurm-{first}.log")
    assert report["ok"] and report["identical"], log[-6000:]
    assert "scancel -s USR1" in log and "requeueing this job" in log
    until(lambda: '"first_step"' in _read(folder / "events.jsonl"), 180, f"the first step of job {second}")


def _read(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""
