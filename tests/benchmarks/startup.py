"""Seconds until something happens: `dsgpt --help`, `dsgpt config validate`, and `dsgpt train` to its first step.

Medians over the trials. Training runs the quickstart's model on two CPU ranks from an empty home folder, so whatever a
library would build or cache for its first use is paid for, and counted: a file built on the way is a failed must. The
clock is outside: it runs from the start of the command until the event of the first step can be read in the run's
folder. The page cache is as the machine has it; the dataset is prepared before the clock starts.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dsgpt.quickstart.corpus import build_corpus
from tests.frame import Outcome, Row

CLONE = Path(__file__).parents[2]
DSGPT = [sys.executable, "-m", "dsgpt"]
GIVE_UP_SECONDS = 300
VOCAB_SIZE = 4096
BUILT = (".so", ".o", ".ninja", ".cubin", ".ptx")
CACHES = (
    "XDG_CACHE_HOME",
    "TORCH_HOME",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_CACHE_DIR",
    "TRITON_HOME",
    "HF_HOME",
    "LOCAL_RANK",
)


def run(trials: int | None, seed: int) -> Outcome:
    """Five trials of the light commands and three of training unless `trials` says otherwise."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dsgpt-startup-") as name:
        folder = Path(name)
        helps = [_seconds(["--help"], folder) for _ in range(trials or 5)]
        validates = [_seconds(["config", "validate", "quickstart"], folder) for _ in range(trials or 5)]
        dataset = _dataset(folder, seed)
        starts = [_first_step(dataset, folder / f"trial-{number}") for number in range(trials or 3)]
        rows = [
            _row("dsgpt --help", helps, 0.4),
            _row("dsgpt config validate", validates, 1.0),
            _row("dsgpt train to first step, cold", [seconds for seconds, _ in starts], 20.0),
            Row("files built on the way", max(built for _, built in starts), at_most=0, note="below the empty home"),
            Row("load average before", load, note=f"{os.cpu_count()} CPUs; others at work make every figure worse"),
        ]
    return Outcome(rows, len(starts))


def _row(label: str, seconds: list[float], at_most: float) -> Row:
    note = f"median of {len(seconds)}: {min(seconds):.2f} to {max(seconds):.2f}"
    return Row(label, round(statistics.median(seconds), 3), "s", at_most=at_most, note=note)


def _environment(home: Path) -> dict[str, str]:
    """This environment with an empty home and without the variables that point to caches elsewhere."""
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in CACHES}
    path = os.pathsep.join([str(CLONE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "HOME": str(home), "PYTHONPATH": path}


def _seconds(arguments: list[str], folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run(
        [*DSGPT, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_environment(folder / "home"),
    )
    return time.perf_counter() - started


def _dataset(folder: Path, seed: int) -> Path:
    corpus = build_corpus(folder / "corpus")
    text, tokenizer, data = str(corpus.heldout), str(folder / "tokenizer"), str(folder / "data")
    size = ["--vocab-size", str(VOCAB_SIZE), "--seed", str(seed)]
    _seconds(["tokenizer", "train", text, "--output", tokenizer, *size], folder)
    _seconds(["data", "prepare", text, "--tokenizer", tokenizer, "--output", data], folder)
    return folder / "data"


def _first_step(dataset: Path, folder: Path) -> tuple[float, int]:
    """(seconds to the first step, files built below the home folder); the run is stopped after it."""
    home, output = folder / "home", folder / "run"
    overrides = [f"data.train.0.path={dataset}", f"run.output_dir={output}", "device=cpu"]
    command = [*DSGPT, "train", "quickstart", *overrides, "--num-processes", "2"]
    log = folder / "output.txt"
    environment = _environment(home)
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            while not _has_first_step(output / "events.jsonl"):
                seconds = time.perf_counter() - started
                if process.poll() is not None or seconds > GIVE_UP_SECONDS:
                    raise RuntimeError(
                        f"no first step after {seconds:.0f} s:\n{log.read_text(errors='replace')[-3000:]}"
                    )
                time.sleep(0.02)
            seconds = time.perf_counter() - started
            process.send_signal(signal.SIGTERM)
            process.wait(GIVE_UP_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    built = [path for path in home.rglob("*") if path.suffix in BUILT]
    return seconds, len(built)


def _has_first_step(events: Path) -> bool:
    try:
        return '"first_step"' in events.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
