"""Runs with optimizer (and weights) in host memory or on disk, as shipped: stopped and resumed like any other."""

from __future__ import annotations

import signal

import pytest

from dsgpt.checkpoint import commit
from dsgpt.config import Dropout, ModelConfig
from tests import test_engine as plain
from tests.integration.test_launch import DSGPT, start, wait_for_step
from tests.integration.test_resume import hashes, metrics, train_here
from tests.pool import ranks

OFFLOADS = ["zero2_offload_optimizer", "zero3_offload"]


@pytest.mark.parametrize("name", [OFFLOADS[0], pytest.param(OFFLOADS[1], marks=pytest.mark.slow)])
def test_an_offloaded_run_stopped_and_resumed_equals_an_uninterrupted_one_bit_for_bit(write_run, tmp_path, name):
    keys = {"training.max_steps": 8, "deepspeed": name}
    straight, stopped = write_run("straight", **keys), write_run("stopped", **keys)
    ranks(2).run(train_here, straight, [], 0, "a")
    assert "stopped at step 3 of 8" in ranks(2).run(train_here, stopped, [], 3, "b")[0]
    ranks(2).run(train_here, stopped, [], 0, "c")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    last = "checkpoints/step-00000008"
    assert hashes(tmp_path / "stopped" / last) == hashes(tmp_path / "straight" / last)


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLOADS)
def test_dsgpt_train_offloads_without_compiling_anything(write_run, tmp_path, name):
    yaml = write_run("command", **{"training.max_steps": 4000, "deepspeed": name})
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    process = start([*DSGPT, "train", str(yaml)], **extensions)
    wait_for_step(tmp_path / "command", 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    ((step, _),) = commit.list_committed(tmp_path / "command/checkpoints")
    again = start([*DSGPT, "train", str(yaml), f"training.max_steps={step + 2}"], **extensions)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and f"continuing from step {step}" in output, output
    assert not (tmp_path / "extensions").exists(), "an extension was compiled"


# DeepSpeed leaves tensors of less than 1 MB in memory.
LARGER = ModelConfig(
    hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512,
    vocab_size=2000, max_position_embeddings=16, dropout=Dropout(),
)  # fmt: skip


def on_disk(world, folder, function, *arguments):
    """A function of test_engine with the larger model, and with optimizer and all weights in files."""
    model, config = plain.MODEL, plain.deepspeed_config

    def with_folder(name, dtype="fp32"):
        filled = config(name, dtype)
        zero = filled["zero_optimization"]
        zero["reduce_bucket_size"] = 1_000_000
        for offload in (zero["offload_optimizer"], zero["offload_param"]) if name == "zero3_nvme" else ():
            offload["nvme_path"] = str(folder)
        zero.get("offload_param", {})["max_in_cpu"] = 0
        return filled

    plain.MODEL, plain.deepspeed_config = LARGER, with_folder
    try:
        return function(world, *arguments)
    finally:
        plain.MODEL, plain.deepspeed_config = model, config


@pytest.mark.slow
def test_state_on_disk_trains_resumes_and_survives_a_bad_step_as_in_memory(tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip(
            "DeepSpeed's asynchronous I/O cannot be compiled here: it needs a C++ compiler and libaio's headers"
        )
    pool = ranks(plain.WORLD)
    same, losses, norms, _ = pool.run(on_disk, tmp_path, plain.train_on_ranks, "zero3_nvme", timeout=900)[0]
    _, expected_losses, expected_norms, _ = pool.run(on_disk, tmp_path, plain.train_on_ranks, "zero3")[0]
    assert same, "the rehearsal changed the weights"
    assert losses == pytest.approx(expected_losses, rel=1e-5) and norms == pytest.approx(expected_norms, rel=1e-5)
    for expected, resumed, _ in pool.run(on_disk, tmp_path, plain.resume_on_ranks, "zero3_nvme", "fp32"):
        assert resumed == expected
    for results in pool.run(on_disk, tmp_path, plain.poison_on_ranks, "zero3_nvme", "bf16"):
        assert [(applied, unchanged) for applied, unchanged, _ in results] == [(False, True)] * 3
        assert results[0][2] == results[1][2] == results[2][2]
