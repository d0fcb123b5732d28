"""Steps that go wrong in numbers: spikes told or gone round, five bad steps in a row with their evidence."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest

from dsgpt.config.schema import LossSpikeSection
from dsgpt.train.spikes import LossSpikes
from tests.integration.test_resume import hashes, metrics, train_here
from tests.integration.test_rewind import events
from tests.pool import ranks

NUM_LOSSES = 40


def test_a_spike_lies_so_many_standard_deviations_above_the_mean():
    rng = np.random.default_rng(0)
    losses = list(rng.normal(3.0, 0.1, NUM_LOSSES))
    watch = LossSpikes(LossSpikeSection(window=20, threshold=6.0))
    assert not any(watch.is_spike(loss) for loss in losses)
    mean, deviation = statistics.fmean(losses[-20:]), statistics.pstdev(losses[-20:])
    assert not watch.is_spike(mean + 5.9 * deviation)
    watch.restore(losses[-20:])
    assert watch.is_spike(mean + 6.1 * deviation)
    assert watch.recent == losses[-20:], "a spike does not join what the next loss is compared with"
    assert not watch.is_spike(math.nan), "that is a bad step, left out by itself"
    assert not LossSpikes(LossSpikeSection(window=0)).is_spike(1e9)


def test_samples_that_are_left_out_are_jumped_over():
    watch = LossSpikes(LossSpikeSection())
    watch.skipped = [[16, 16], [32, 16], [64, 8]]
    assert [watch.next_start(k) for k in (0, 16, 24, 40, 48, 64, 71, 72)] == [0, 48, 48, 48, 48, 72, 72, 72]


def train_with_bad_sample(world, yaml, overrides, attempt, at):
    """At one set of samples (of step `at` of an undisturbed run) the loss comes out ten times as large, on all ranks."""
    from dsgpt.train import loop

    original, bad = loop.train_step, []

    def spoiled(engine, world, micro_batches, **named):
        from dataclasses import replace

        report = original(engine, world, micro_batches, **named)
        if not bad and named["step"] == at:
            bad.append(report.data_crc)
        return replace(report, loss=10 * report.loss) if report.data_crc in bad else report

    loop.train_step = spoiled
    try:
        return train_here(world, yaml, overrides, 0, attempt)
    finally:
        loop.train_step = original


SETTINGS = {"training.max_steps": 24, "checkpoint.save_interval": 6, "optimizer.warmup_steps": 0}


def test_a_spike_is_told_with_its_samples_and_training_goes_on(write_run, tmp_path):
    yaml = write_run("spike", **SETTINGS)
    assert ranks(2).run(train_with_bad_sample, yaml, [], "a", 15) == [24, 24]
    (event,) = events(tmp_path / "spike", "loss_spike")
    assert event["step"] == 16 and event["first_sample"] == 15 * 16 and len(event["sample_ids"]) == 16
    assert events(tmp_path / "spike", "spike_rollback") == []


def test_a_spike_is_gone_round_and_everything_else_repeated_exactly(write_run, tmp_path):
    """T717: equal bit for bit to a run that never had these samples; also when it is killed after going back."""
    skip = {"training.loss_spike": {"action": "rollback", "skip_steps": 2}}
    yaml = write_run("around", **SETTINGS, **skip)
    assert ranks(2).run(train_with_bad_sample, yaml, [], "a", 15) == [24, 24]
    folder = tmp_path / "around"
    (event,) = events(folder, "spike_rollback")
    assert json.loads((folder / "skipped_samples.json").read_text()) == [[14 * 16, 32]] and event["first"] == 14 * 16
    assert [e["step"] for e in events(folder, "resumed")] == [12]

    without = write_run("without", **SETTINGS, **skip)
    (tmp_path / "without").mkdir()
    (tmp_path / "without/skipped_samples.json").write_text(json.dumps([[14 * 16, 32]]))
    assert "stopped at step 13" in ranks(2).run(train_here, without, [], 13, "b")[0]
    assert ranks(2).run(train_here, without, [], 0, "c") == [24, 24]
    assert metrics(folder) == metrics(tmp_path / "without")
    last = "checkpoints/step-00000024"
    assert hashes(folder / last) == hashes(tmp_path / "without" / last)


def train_with_nan(world, yaml, overrides, attempt, first, last):
    """From one step to another rank 1's loss is not a number."""
    from dsgpt.train import loop, step

    original, train_step = step.Engine.forward_backward, loop.train_step

    def call(engine, world, micro_batches, **named):
        def forward_backward(self, *arguments):
            loss = original(self, *arguments)
            return loss * math.nan if world.rank == 1 and first <= named["step"] + 1 <= last else loss

        step.Engine.forward_backward = forward_backward
        try:
            return train_step(engine, world, micro_batches, **named)
        finally:
            step.Engine.forward_backward = original

    loop.train_step = call
    try:
        return train_here(world, yaml, overrides, 0, attempt)
    finally:
        loop.train_step = train_step


@pytest.mark.parametrize("stage", ["zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_five_bad_steps_in_a_row_end_with_evidence_and_four_do_not(write_run, tmp_path, stage):
    """T711, T713, T714: nothing of a bad step is in any checkpoint."""
    yaml = write_run("bad", **{**SETTINGS, "training.max_steps": 12, "deepspeed": stage})
    assert ranks(2).run(train_with_nan, yaml, ["checkpoint.save_interval=3"], "a", 5, 8) == [12, 12]
    assert [event["step"] for event in events(tmp_path / "bad", "bad_step")] == [5, 6, 7, 8]
    again = write_run("worse", **{**SETTINGS, "training.max_steps": 12, "deepspeed": stage})
    result = ranks(2).run(train_with_nan, again, ["checkpoint.save_interval=3"], "a", 5, 12)
    assert all(text.startswith("NumericalError: the loss or the gradients are not finite (5 steps") for text in result)
    evidence = json.loads((tmp_path / "worse/logs/a/evidence.json").read_text())
    assert [one["step"] for one in evidence["steps"]] == [5, 6, 7, 8, 9]
    assert evidence["last_committed"] == 6 and evidence["seed"] == 5
    for number, one in enumerate(evidence["steps"], start=4):
        assert [math.isnan(float(value)) for value in one["loss_sum_of_rank"]] == [False, True]
        assert one["sample_ids"] == expected_ids(yaml, number)


def expected_ids(yaml, step):
    from dsgpt.config import load_config
    from dsgpt.data.dataset import SampleOrder
    from dsgpt.train.resolve import resolve_run

    plan = resolve_run(load_config([yaml]).config, world_size=2, device="cpu")
    order = SampleOrder(plan.data.train[0].num_samples, 5, plan.data.train[0].fingerprint)
    return [int(i) for i in order.sample_ids(step * 16, 16)]
