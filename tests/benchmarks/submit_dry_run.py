"""Seconds of `dsgpt submit RUN.yaml --dry-run`, the wait before every job, and whether torch was imported on the way.

Median over the trials, by the clock outside, page cache and Python's bytecode warm; the dataset is prepared before. A machine
that is busy with other work makes it worse: the load average stands beside it.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.startup import CLONE, _row
from tests.frame import Outcome, Row
from tests.run_fixtures import make_dataset, write_config

OPTIONS = ["--nodes", "2-8", "--gpus-per-node", "2", "--time", "12:00:00", "--partition", "gpu", "--dry-run"]


def run(trials: int | None, seed: int) -> Outcome:
    """Ten trials unless `trials` says otherwise."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dsgpt-submit-") as name:
        folder = Path(name)
        config = write_config(make_dataset(folder / "made"), folder)
        environment = {**os.environ, "PYTHONPATH": str(CLONE), "HOME": name}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = ["-m", "dsgpt", "submit", str(config), *OPTIONS]
        seconds, before = [], resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range((trials or 10) + 1):
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
            seconds.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(seconds)
        traced = [sys.executable, "-X", "importtime", *command]
        told = subprocess.run(traced, check=True, capture_output=True, env=environment, text=True).stderr
        heavy = {line.rpartition("|")[2].strip() for line in told.splitlines()} & {"torch", "deepspeed", "transformers"}
        rows = [
            _row("dsgpt submit --dry-run", seconds[1:], 0.8),
            Row("processor time of one", round(used, 3), "s", note="without waiting for a processor or a disk"),
            Row("torch, deepspeed, transformers imported", len(heavy), at_most=0),
            Row("files written", sum(1 for _ in (folder / "run").rglob("*")), at_most=0, note="below run.output_dir"),
            Row("load average before", load, note=f"{os.cpu_count()} CPUs; others at work make every figure worse"),
        ]
    return Outcome(rows, len(seconds) - 1)
