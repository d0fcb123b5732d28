"""Workers report while they work, and neither their death nor their parent's goes unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsgpt.data.workers import Counts, Pool, count


def work(amount: int) -> int:
    count(num_bytes=amount, tokens=1)
    count(num_bytes=amount)
    if amount == 13:
        raise ValueError("thirteen")
    return amount


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_counts_arrive(workers: int) -> None:
    seen: list[Counts] = []
    with Pool(workers) as pool:
        for _ in range(2):
            assert sorted(pool.run(work, [(i,) for i in range(10)], seen.append)) == list(range(10))
            assert seen[-1] == Counts(num_bytes=90, documents=0, tokens=10, bad_lines=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_task_is_raised(workers: int) -> None:
    with pytest.raises(ValueError, match="thirteen"), Pool(workers) as pool:
        list(pool.run(work, [(13,), (1,), (2,)], lambda counts: None))


def test_a_killed_worker_is_an_error_and_no_worker_outlives_its_parent() -> None:
    program = """
import os, signal, sys
from dsgpt.data.workers import Pool
from dsgpt.errors import DsgptError
if __name__ == "__main__":
    try:
        with Pool(2) as pool:
            list(pool.run(signal.raise_signal, [(signal.SIGKILL,)] * 2, lambda counts: None))
    except DsgptError as error:
        print(error)
    with Pool(2) as pool:
        for pid in pool.run(os.getpid, [()] * 2, lambda counts: None):
            print(pid)
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "a worker process died" in found.stdout
    pids = [int(line) for line in found.stdout.splitlines() if line.isdigit()]
    assert pids
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
