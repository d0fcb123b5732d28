"""A job that is killed leaves nothing, whatever its processes did to get away; and it sees as many GPUs as it has ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dsgpt.launch import marked
from dsgpt.launch.hardware import Hardware
from dsgpt.launch.marked import MarkedJob

# A child in a session of its own whose parent is gone, one that ignores SIGTERM, and one that its parent waits for.
ESCAPING = "setsid sh -c 'sleep 300 & exit' ; (trap '' TERM; sleep 300) & echo started; sleep 300"


def alive(job: MarkedJob) -> list[int]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                if job.mark in Path(f"/proc/{entry.name}/environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_every_process_of_a_killed_job_is_gone(tmp_path):
    with MarkedJob(["sh", "-c", ESCAPING], tmp_path / "log") as job:
        until = time.monotonic() + 10
        while len(alive(job)) < 4 and time.monotonic() < until:
            time.sleep(0.02)
        assert len(alive(job)) == 4 and job.poll() is None
        job.kill()
        # The shell is killed, or says that the child it waited for was.
        assert alive(job) == [] and job.poll() in (-9, 137)
    assert (tmp_path / "log").read_text().startswith("started\n"), "a shell may add that a child was killed"


@pytest.mark.parametrize(
    ("visible", "ranks", "seen"),
    [(None, 2, "0,1"), ("4,5,6,7", 2, "4,5"), ("4,5,6,7", 4, "4,5,6,7"), (None, None, "")],
)
def test_gpus_beyond_the_ranks_are_hidden_from_the_job(monkeypatch, tmp_path, visible, ranks, seen):
    monkeypatch.setattr(marked, "detect", lambda: Hardware("cuda", num_gpus=4))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with MarkedJob(["sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES$SLURM_RESTART_COUNT"'], tmp_path / "log", ranks) as job:
        while job.poll() is None:
            time.sleep(0.01)
    assert (tmp_path / "log").read_text() == f"{seen}\n"
