"""run.stop_at_step: a start commits that step and ends well, with the schedule of the whole run; a fork may stop at once."""

from __future__ import annotations

import json

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.diff import compare
from dsgpt.config import load_config
from tests.integration.test_resume import hashes, metrics, train_here
from tests.pool import ranks

STEPS = 8


def steps_of(folder):
    return [step for step, _ in commit.list_committed(folder / "checkpoints")]


def test_a_run_stopped_at_a_step_and_continued_is_the_whole_run_bit_for_bit(write_run, tmp_path):
    pool = ranks(2)
    straight, parts = (write_run(name, **{"training.max_steps": STEPS}) for name in ("straight", "parts"))
    assert pool.run(train_here, straight, [], 0, "a") == [STEPS, STEPS]
    for text in pool.run(train_here, parts, ["run.stop_at_step=5"], 0, "b"):
        assert "Stopped: stopped at step 5 of 8, committed" in text and "run.stop_at_step=5" in text
    assert steps_of(tmp_path / "parts") == [5]
    assert pool.run(train_here, parts, ["run.stop_at_step=5"], 0, "c") == [5, 5], "nothing is left to train"
    assert steps_of(tmp_path / "parts") == [5]
    assert pool.run(train_here, parts, ["run.stop_at_step=800"], 0, "d") == [STEPS, STEPS]
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "straight")
    last = f"checkpoints/step-{STEPS:08d}"
    assert hashes(tmp_path / "parts" / last) == hashes(tmp_path / "straight" / last)
    evaluated = [
        event["step"]
        for event in map(json.loads, (tmp_path / "parts/events.jsonl").read_text().splitlines())
        if event["event"] == "evaluation"
    ]
    assert evaluated == [STEPS], "a stop is no end of the run"


def test_a_fork_that_stops_where_it_was_forked_commits_the_state_as_it_was_read(write_run, tmp_path):
    origin = write_run("origin", **{"training.max_steps": STEPS})
    ranks(2).run(train_here, origin, ["run.stop_at_step=4"], 0, "a")
    fork = write_run("fork", **{"training.max_steps": STEPS, "model.init_from": f"fork:{tmp_path / 'origin'}@4"})
    words = ["deepspeed=zero3"]
    for text in ranks(1).run(train_here, fork, [*words, "run.stop_at_step=3"], 0, "b"):
        assert "the fork has nothing to train" in text and "run.stop_at_step 3" in text
    assert steps_of(tmp_path / "fork") == []
    assert ranks(1).run(train_here, fork, [*words, "run.stop_at_step=4"], 0, "c") == [4]
    (read,), (saved,) = (commit.list_committed(tmp_path / name / "checkpoints") for name in ("fork", "origin"))
    assert read[0] == saved[0] == 4
    found = compare(saved[1], read[1])
    assert found.tensors == [] and found.compared > 10
    assert found.recorded.keys() <= {"learning_rate", "world_size", "zero_stage"}
    assert ranks(1).run(train_here, fork, words, 0, "d") == [STEPS], "and goes on from it"


def test_a_stop_after_the_end_is_told_to_have_no_effect(write_run):
    yaml = write_run("late", **{"training.max_steps": STEPS})
    (warning,) = load_config([yaml], [f"run.stop_at_step={STEPS}"]).warnings
    assert "run.stop_at_step has no effect: the run has 8 steps" in warning
    assert load_config([yaml], [f"run.stop_at_step={STEPS - 1}"]).warnings == []
