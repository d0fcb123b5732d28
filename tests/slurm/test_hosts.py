"""`dsgpt train --hostfile` between real hosts: the nodes of our own cluster, with sshd, pdsh and mpirun.

Nothing here asks SLURM for anything: the cluster gives hosts that have a network and a process tree of their own.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from dsgpt.checkpoint import commit
from tests.faults._hosts import HostJob, kill
from tests.faults._jobs import lines_of
from tests.run_fixtures import write_config
from tests.slurm import lab

pytestmark = pytest.mark.slurm
PROGRAMS = {"ssh": "ssh", "pdsh": "pdsh", "openmpi": "mpirun"}


@pytest.fixture()
def start(own_cluster, cluster, dataset, tmp_path):
    """start(launcher, *overrides) -> a job on two nodes with one rank each, started on the first."""
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in cluster[:2]))
    folder = tmp_path / "a b'c\"$(touch X)`touch X`\nü"
    folder.mkdir()
    write_config(dataset, folder, "run", **{"training.max_steps": 100000, "run.hang_timeout_seconds": 20})

    def one(launcher: str, *overrides: str) -> HostJob:
        if shutil.which(PROGRAMS[launcher]) is None or shutil.which("sshd", path="/usr/sbin:/usr/bin") is None:
            pytest.skip(f"{PROGRAMS[launcher]} or sshd is not installed")
        name = json.dumps("q\"$(touch X)`touch X` 'é\n%n")
        words = ["train", "run.yaml", f"run.name={name}", "run.output_dir=o u t", *overrides]
        words += ["--hostfile", str(tmp_path / "hosts"), "--launcher", launcher]
        command = ["bash", str(lab.CLUSTER), "exec", "-H", cluster[0], "--", sys.executable, "-m", "dsgpt", *words]
        environment = {name: text for name, text in lab.job_environment().items() if name != "DSGPT_FAULTS_JOB"}
        return HostJob(command, tmp_path / f"{launcher}.log", cwd=folder, **environment)

    one.run, one.folder = folder / "o u t", folder
    return one


def wait_for_step(run: Path, step: int, job: HostJob) -> None:
    until = time.monotonic() + 150
    while not any(line.get("step", 0) >= step for line in lines_of(run / "metrics.jsonl")):
        assert job.process.poll() is None and time.monotonic() < until, job.output()
        time.sleep(0.1)


@pytest.mark.parametrize("launcher", PROGRAMS)
def test_two_real_hosts_train_with_arguments_as_they_were_given(start, launcher, tmp_path):
    with start(launcher, "training.max_steps=6") as job:
        assert job.wait_until_gone(150) == [], job.output()
    assert job.process.returncode == 0, job.output()
    assert commit.list_committed(start.run / "checkpoints")[-1][0] == 6
    assert len(list(start.run.glob("logs/*/node*.log"))) == 2, "each host has its log"
    assert not list(tmp_path.rglob("X"))


@pytest.mark.parametrize(
    "launcher, victim, where",
    [
        ("ssh", "launcher", "--node_rank=1"),
        ("ssh", "node", "--node-rank=1"),
        ("ssh", "ssh", ""),
        ("ssh", "rank", ""),
        ("pdsh", "pdsh", ""),
        ("openmpi", "mpirun", ""),
        ("openmpi", "rank", ""),
    ],
)
def test_a_part_that_is_killed_on_a_real_host_is_no_success_and_leaves_nothing(start, launcher, victim, where):
    with start(launcher) as job:
        wait_for_step(start.run, 3, job)
        kill(job.of(victim, where)[-1])
        assert job.wait_until_gone(90) == [], job.output()
    (end,) = start.run.glob("logs/*/end.json")
    verdict = json.loads(end.read_text())
    assert job.process.returncode == verdict["exit_code"] in (75, 76), job.output()
    assert verdict["cause"] == ("rank_died" if victim == "rank" else "preempted")
    with start(launcher, "training.max_steps=5" if victim == "rank" else "training.max_steps=100000") as job:
        if victim != "rank":
            wait_for_step(start.run, verdict["step"] + 2, job)
            (supervisor,) = job.of("supervisor", f"{sys.executable} -m dsgpt")[-1:]
            kill(supervisor)
        assert job.wait_until_gone(90) == [], job.output()
    assert "continuing from step" in job.output() or victim == "rank"
    assert all(commit.verify(path) == [] for _, path in commit.list_committed(start.run / "checkpoints"))


def test_a_host_that_is_off_is_named(start, own_cluster, cluster):
    own_cluster("fail", cluster[1])
    with start("ssh") as job:
        assert job.wait_until_gone(150) == [], job.output()
    assert job.process.returncode == 76 and f"{cluster[1]} ended with 255" in job.output(), job.output()
