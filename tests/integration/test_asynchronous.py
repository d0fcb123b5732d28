"""Saving by a writer process: the same bytes, in order, and what happens when the writer is lost. Rows T110-T112."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dsgpt.checkpoint import commit
from tests.integration.test_resume import hashes, metrics, train_here
from tests.pool import ranks

EVERY = {"training.max_steps": 12, "checkpoint.save_interval": 1, "checkpoint.keep_last": 0}


def events(folder, name):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def writers():
    """Process ids of this process's writers."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and b"dsgpt.checkpoint.writer" in (entry / "cmdline").read_bytes():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(entry.name)] if parent == os.getpid() else []
        except OSError:
            continue
    return found


def train_and_strike(world, yaml, attempt, number, after):
    """As train_here; rank 1's writer gets a signal as soon as so many checkpoints are committed."""
    folder = yaml.with_suffix("") / "checkpoints"

    def strike():
        until = time.monotonic() + 60
        while time.monotonic() < until and len(commit.list_committed(folder)) < after:
            time.sleep(0.002)
        for pid in writers():
            os.kill(pid, number)

    thread = threading.Thread(target=strike)
    if world.rank == 1:
        thread.start()
    step = train_here(world, yaml, [], 0, attempt)
    if world.rank == 1:
        thread.join()
    return step, writers()


def committed(folder):
    return {step: hashes(path) for step, path in commit.list_committed(folder / "checkpoints")}


@pytest.mark.parametrize("stage", ["zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_it_writes_the_same_bytes_as_saving_in_the_foreground(write_run, tmp_path, stage):
    for name, asynchronous in (("front", False), ("back", True)):
        yaml = write_run(name, **EVERY, deepspeed=stage, **{"checkpoint.asynchronous": asynchronous})
        assert ranks(2).run(train_here, yaml, [], 0, "a") == [12, 12]
    assert metrics(tmp_path / "back") == metrics(tmp_path / "front")
    assert committed(tmp_path / "back") == committed(tmp_path / "front")
    order = [event["step"] for event in events(tmp_path / "back", "committed")]
    assert order == [*range(1, 13)], "no two saves overlap"
    assert len(events(tmp_path / "back", "saving")) == 11, "all but the last, which training waits for"


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_writer_that_is_lost_is_told_of_and_loses_nothing(write_run, tmp_path, number):
    straight = write_run("straight", **EVERY)
    ranks(2).run(train_here, straight, [], 0, "a")
    settings = {**EVERY, "checkpoint.asynchronous": True, "run.hang_timeout_seconds": 5}
    yaml = write_run("struck", **settings)
    (_, _), (step, left) = ranks(2).run(train_and_strike, yaml, "b", number, 3)
    assert step == 12 and left == []
    assert committed(tmp_path / "struck") == committed(tmp_path / "straight")
    (lost,) = events(tmp_path / "struck", "save_writer_lost")
    assert lost["writers"] == 1 and lost["step"] >= 3
    begun = [event["step"] for event in events(tmp_path / "struck", "saving")]
    assert max(begun) <= lost["step"] + 1, "saving is synchronous afterwards"
