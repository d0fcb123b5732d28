"""`dsgpt train --hostfile` with an ssh and a pdsh that reach this machine, and torchrun: arguments, kills, exit codes.

The real programs between real hosts are tried by tests/slurm/test_hosts.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dsgpt.checkpoint import commit
from tests.faults._hosts import HostJob, fake_programs, kill
from tests.faults._jobs import lines_of
from tests.run_fixtures import write_config


@pytest.fixture()
def hosts(tmp_path):
    """(options, environment) for two hosts that are this machine."""
    (tmp_path / "hosts").write_text("hosta slots=1\nhostb slots=1\n")
    options = ["--hostfile", str(tmp_path / "hosts"), "--master-addr", "127.0.0.1"]
    return options, fake_programs(tmp_path / "programs")


def wait_for_step(run: Path, step: int, job: HostJob, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not any(line.get("step", 0) >= step for line in lines_of(run / "metrics.jsonl")):
        assert job.process.poll() is None and time.monotonic() < until, job.output()
        time.sleep(0.1)


@pytest.mark.slow
def test_arguments_and_folder_arrive_as_they_are_and_no_planted_environment_does(dataset, hosts, tmp_path):
    options, environment = hosts
    canary = tmp_path / "X"
    folder = tmp_path / f"a b'c\"$(touch {canary.name})`touch X`\nü;*"
    folder.mkdir()
    write_config(dataset, folder, "run", **{"training.max_steps": 6, "checkpoint.save_interval": 3})
    name = "q\"$(touch X)`touch X` 'ü\n%n #"
    planted = f"DSGPT_PLANTED=1\nX=$(touch {canary})\n"
    for place in (folder, tmp_path / "programs/home"):
        (place / ".deepspeed_env").write_text(planted)
    environment |= {"HOME": str(tmp_path / "programs/home"), "NCCL_DEBUG": f'"; touch {canary}; "'}
    command = [
        sys.executable,
        "-m",
        "dsgpt",
        "train",
        "run.yaml",
        "run.output_dir=o u t",
        f"run.name={json.dumps(name)}",
    ]
    for launcher, steps in (("ssh", 6), ("pdsh", 100000)):
        words = [*command, f"training.max_steps={steps}", *options, "--launcher", launcher]
        job = HostJob(words, tmp_path / f"{launcher}.log", cwd=folder, **environment)
        with job:
            if launcher == "pdsh":
                wait_for_step(folder / "o u t", 8, job)
                ranks = [Path(f"/proc/{pid}/environ").read_bytes() for pid in job.of("rank")]
                assert len(ranks) == 2 and all(
                    b"PLANTED" not in told and b'NCCL_DEBUG="; touch' in told for told in ranks
                )
                job.process.send_signal(signal.SIGTERM)
            assert job.wait_until_gone(90) == [], job.output()
        assert job.process.returncode == (0 if launcher == "ssh" else 75), job.output()
    assert "continuing from step 6" in (tmp_path / "pdsh.log").read_text()
    assert yaml.safe_load((folder / "o u t/config.yaml").read_text())["run"]["name"] == name
    assert sorted((tmp_path / "programs/reached").read_text().split()) == ["hosta", "hosta", "hostb", "hostb"]
    assert not list(tmp_path.rglob("X"))


@pytest.mark.parametrize(
    "victim",
    ["ssh", pytest.param("launcher", marks=pytest.mark.slow), pytest.param("supervisor", marks=pytest.mark.slow)],
)
def test_whatever_dies_of_a_job_on_two_hosts_it_is_no_success_and_nothing_stays(dataset, hosts, tmp_path, victim):
    options, environment = hosts
    file = write_config(dataset, tmp_path, "run", **{"training.max_steps": 100000})
    command = [sys.executable, "-m", "dsgpt", "train", str(file), *options]
    with HostJob(command, tmp_path / "log", **environment) as job:
        wait_for_step(tmp_path / "run", 3, job)
        kill(job.of(victim, "--node_rank=1" if victim == "launcher" else "")[-1])
        assert job.wait_until_gone(90) == [], job.output()
    assert job.process.returncode != 0
    (end,) = (tmp_path / "run").glob("logs/*/end.json")
    assert json.loads(end.read_text())["exit_code"] == 75
    ((_, path),) = commit.list_committed(tmp_path / "run/checkpoints")
    assert commit.verify(path) == []


def test_a_host_that_cannot_be_reached_is_named(dataset, hosts, tmp_path):
    options, environment = hosts
    (tmp_path / "programs/bin/ssh").write_text(
        '#!/bin/sh\necho "ssh: connect to host hosta: No route to host" >&2; exit 255\n'
    )
    command = [sys.executable, "-m", "dsgpt", "train", str(write_config(dataset, tmp_path)), *options]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 76, done.stderr
    assert "hosta ended with 255" in done.stderr and "No route to host" in done.stderr


@pytest.mark.slow
def test_no_ssh_runs_one_part_on_each_host_with_the_verdict_of_all(dataset, hosts, tmp_path):
    options, _ = hosts
    file = write_config(dataset, tmp_path, "run", **{"training.max_steps": 4})
    from dsgpt.process import free_port

    words = [sys.executable, "-m", "dsgpt", "train", str(file), *options, "--launcher", "no-ssh"]
    words += ["--master-port", str(free_port())]
    parts = [subprocess.Popen([*words, "--node-rank", rank], stderr=subprocess.PIPE, text=True) for rank in ("1", "0")]
    ends = [(part.communicate(timeout=120)[1], part.returncode) for part in parts]
    assert [code for _, code in ends] == [0, 0], ends
    assert commit.list_committed(tmp_path / "run/checkpoints")[-1][0] == 4


@pytest.mark.slow
def test_torchrun_starts_the_ranks_and_passes_a_stop_on(dataset, tmp_path):
    file = write_config(dataset, tmp_path, "run", **{"training.max_steps": 100000})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with HostJob([*torchrun, "-m", "dsgpt.train", str(file)], tmp_path / "log") as job:
        wait_for_step(tmp_path / "run", 3, job)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait_until_gone(60) == [], job.output()
    assert job.process.returncode != 0
    ((step, path),) = commit.list_committed(tmp_path / "run/checkpoints")
    assert commit.verify(path) == []
    (end,) = (tmp_path / "run").glob("logs/*/end.json")
    assert json.loads(end.read_text())["exit_code"] == 75

    with HostJob(
        [*torchrun, "-m", "dsgpt.train", str(file), f"training.max_steps={step + 2}"], tmp_path / "log2"
    ) as job:
        assert job.wait_until_gone(90) == [], job.output()
    assert job.process.returncode == 0 and f"continuing from step {step}" in job.output()
