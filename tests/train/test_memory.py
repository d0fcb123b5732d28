"""What does not fit fails before step 1, with 77 and the two cheapest changes. The limit is the kernel's, not a mock."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

LIMIT_BYTES = 6 << 30  # of address space: twice what the imports map


def limit_address_space():
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))


# 64 x 32 tokens x 300,000 values in fp32 are 2.4 GB for each of the MLP's activations.
@pytest.mark.slow
@pytest.mark.parametrize("intermediate_size, code", [(64, 0), (300_000, 77)])
def test_a_step_that_does_not_fit_ends_with_77_before_step_1(write_run, tmp_path, intermediate_size, code):
    sizes = {"training.micro_batch_size_per_gpu": 64, "training.global_batch_size": 64, "training.max_steps": 4}
    yaml = write_run("memory", **sizes, **{"model.intermediate_size": intermediate_size})
    done = subprocess.run(
        [sys.executable, "-m", "dsgpt.train", str(yaml)],
        capture_output=True,
        text=True,
        preexec_fn=limit_address_space,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert "out of memory" in done.stderr
        assert "training.micro_batch_size_per_gpu=32 or training.activation_checkpointing=full" in done.stderr
        assert "step 1/" not in done.stdout
        assert not list((tmp_path / "memory/checkpoints").iterdir())
