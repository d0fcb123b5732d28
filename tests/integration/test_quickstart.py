"""The README's first command as a user runs it: whole, short, twice; and what its interruption must not change."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from dsgpt.checkpoint import commit

pytestmark = pytest.mark.slow
DSGPT = [sys.executable, "-m", "dsgpt"]


def quickstart(folder, *options):
    command = [*DSGPT, "quickstart", "--output-dir", str(folder), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_quickstart_learns_python_to_the_promised_bits_per_byte(tmp_path):
    output = quickstart(tmp_path / "qs")
    print(output[-6000:])
    assert re.search(r"stopped at step \d+ of \d+, committed", output)
    bits = float(re.search(r"bits per byte\D+([\d.]+) on packages", output).group(1))
    assert bits <= 1.95
    first, last = map(float, re.search(r"last step\W+([\d.]+) -> ([\d.]+)", output).groups())
    assert last < first - 3
    difference = json.loads(next((tmp_path / "qs").glob("export-*.json")).read_text())["logit_difference"]
    assert difference < 1e-3
    assert "xz -9e" in output and "dsgpt tokenizer train my-text" in output


def test_an_interrupted_quickstart_has_the_weights_of_an_uninterrupted_run_and_runs_twice(tmp_path):
    folder = tmp_path / "qs"
    output = quickstart(folder, "--steps", "24")
    assert "stopped with code 75" in output
    line = next(line for line in output.splitlines() if line.startswith("$ dsgpt train quickstart"))
    import shlex

    arguments = shlex.split(line[2:])[1:]
    other = [f"run.output_dir={tmp_path / 'whole'}" if a.startswith("run.output_dir=") else a for a in arguments]
    done = subprocess.run([*DSGPT, *other], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (step, whole), (_, stopped) = (
        commit.list_committed(run / "checkpoints")[-1] for run in (tmp_path / "whole", folder / "run")
    )
    assert step == 24
    files = [
        {name: entry["sha256"] for name, entry in commit.read_manifest(path)["files"].items()}
        for path in (whole, stopped)
    ]
    assert files[0] == files[1]

    again = quickstart(folder, "--steps", "24")
    for text in ("corpus: exists", "tokenizer: exists", "data: exists", "nothing to train", "export: exists"):
        assert text in again
