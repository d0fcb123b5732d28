"""Going back, forking, being cut off: which checkpoint a start continues from, in real ranks."""

from __future__ import annotations

import errno
import json
from unittest import mock

import pytest

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.diff import compare
from dsgpt.checkpoint.starts import read_starts
from dsgpt.errors import DsgptError, Preempted
from dsgpt.process import StopRequest
from dsgpt.train.state import read_metrics
from tests.integration.test_resume import StopAt, hashes, metrics, train_here
from tests.pool import ranks


def train_as_job(world, yaml, overrides, stop_after, attempt, job, restarts):
    """train_here, as a start of a scheduler's job."""
    world.job, world.restarts = job, restarts
    try:
        return train_here(world, yaml, overrides, stop_after, attempt)
    finally:
        world.job, world.restarts = "", 0


def steps(folder):
    return [step for step, _ in commit.list_committed(folder / "checkpoints")]


def events(folder, name):
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def test_a_rewind_counts_for_the_first_start_of_a_job_only(write_run, tmp_path):
    """40 -> 20, preempted at 30; the requeue, with resume=20 still on its command line, continues at 30."""
    settings = {"training.max_steps": 40, "checkpoint.save_interval": 10, "checkpoint.keep_last": 0}
    yaml, pool, folder = write_run("back", **settings), ranks(2), tmp_path / "back"
    assert pool.run(train_here, yaml, [], 0, "a") == [40, 40]
    before = hashes(folder / "checkpoints/step-00000040")
    assert "stopped at step 30" in pool.run(train_as_job, yaml, ["resume=20"], 10, "b", "7", 0)[0]
    assert steps(folder) == [10, 20, 30]
    aside = folder / "checkpoints/abandoned-1"
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000030", "step-00000040"]
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [*range(1, 31)]
    assert pool.run(train_as_job, yaml, ["resume=20"], 0, "c", "7", 1) == [40, 40]
    assert [event["step"] for event in events(folder, "resumed")] == [20, 30]
    assert len(events(folder, "rewound_before")) == 1
    assert [start.rewound_to for start in read_starts(folder)] == [None, 20, None]
    assert hashes(folder / "checkpoints/step-00000040") == before, "the same steps again give the same weights"
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 41)]


@pytest.mark.slow
def test_a_step_that_is_not_there_is_an_error_and_not_another_one(write_run, tmp_path):
    """T308, and a damaged one: no silent fallback where a step was asked for."""
    yaml, pool = write_run("exact", **{"training.max_steps": 4, "checkpoint.save_interval": 2}), ranks(2)
    pool.run(train_here, yaml, [], 0, "a")
    assert all("no committed checkpoint of step 3" in text for text in pool.run(train_here, yaml, ["resume=3"], 0, "b"))
    (tmp_path / "exact/checkpoints/step-00000002/rank-00001.safetensors").write_bytes(b"")
    result = pool.run(train_here, yaml, ["resume=2"], 0, "c")
    assert all(text.startswith("CheckpointError: the checkpoint is damaged") for text in result)
    assert steps(tmp_path / "exact") == [2, 4]


@pytest.mark.slow
def test_the_decay_branch_of_a_stable_run_is_forked_with_all_its_state(write_run, tmp_path):
    """Warmup-stable-decay: the stable run goes on; a fork of it decays to the end, as if it had been planned so."""
    stable = {"optimizer.lr_schedule": "constant", "training.max_steps": 20, "checkpoint.save_interval": 5}
    trunk, pool = write_run("trunk", **stable, **{"checkpoint.keep_last": 0}), ranks(2)
    assert pool.run(train_here, trunk, [], 0, "a") == [20, 20]
    source = tmp_path / "trunk/checkpoints/step-00000010"
    before = hashes(source)
    decay = {"optimizer.lr_schedule": "warmup_stable_decay", "optimizer.decay_steps": 5, "training.max_steps": 15}
    dropout = {"embedding": 0.1, "attention": 0.1, "residual": 0.1}
    model = {"init_from": f"fork:{tmp_path / 'trunk'}@10", "dropout": dropout}
    branch = write_run("branch", **decay, model=model)
    assert pool.run(train_here, branch, [], 0, "b") == [15, 15]
    (forked,) = events(tmp_path / "branch", "forked")
    assert any("optimizer.lr_schedule: 'constant' -> 'warmup_stable_decay'" in line for line in forked["differences"])
    assert not any("data" in line or "model.hidden_size" in line for line in forked["differences"])
    planned = write_run("planned", **decay)
    assert pool.run(train_here, planned, [], 0, "c") == [15, 15]
    whole = metrics(tmp_path / "planned")
    assert metrics(tmp_path / "branch") == {step: whole[step] for step in range(11, 16)}
    last = "checkpoints/step-00000015"
    assert hashes(tmp_path / "branch" / last) == hashes(tmp_path / "planned" / last)
    assert hashes(source) == before and steps(tmp_path / "trunk") == [5, 10, 15, 20]
    # From now on the branch continues from its own checkpoints.
    assert pool.run(train_here, branch, ["training.max_steps=16"], 0, "d") == [16, 16]
    assert len(events(tmp_path / "branch", "forked")) == 1


def test_two_checkpoints_are_compared_bit_for_bit(write_run, tmp_path):
    yaml, pool = write_run("pair", **{"training.max_steps": 4, "checkpoint.save_interval": 2}), ranks(2)
    pool.run(train_here, yaml, [], 0, "a")
    folder = tmp_path / "pair/checkpoints"
    same = compare(folder / "step-00000004", folder / "step-00000004")
    assert same.tensors == [] and same.recorded == {} and same.compared > 50
    other = compare(folder / "step-00000002", folder / "step-00000004")
    assert other.recorded["counters.step"] == (2, 4)
    assert {one.kind for one in other.tensors} == {"master", "exp_avg", "exp_avg_sq"}
    assert all(one.largest > 0 for one in other.tensors)


@pytest.mark.slow
def test_commits_of_a_job_that_was_cut_off_are_set_aside(write_run, tmp_path):
    """A job whose node hung wakes up after the next one has begun and commits once more: nobody continues from that."""
    yaml, pool = write_run("cut", **{"training.max_steps": 12, "checkpoint.save_interval": 2}), ranks(2)
    folder = tmp_path / "cut"
    assert "stopped at step 4" in pool.run(train_here, yaml, [], 4, "slow")[0]
    assert "stopped at step 5" in pool.run(train_here, yaml, [], 1, "fast")[0]
    newest = folder / "checkpoints/step-00000004"
    manifest = commit.read_manifest(newest)
    tmp = commit.begin(folder / "checkpoints", 8, "slow")
    for name in manifest["files"]:
        (tmp / name).write_bytes((newest / name).read_bytes())
    commit.commit(folder / "checkpoints", tmp, {**manifest, "step": 8, "attempt": "slow"})
    assert steps(folder) == [2, 4, 5, 8]
    assert pool.run(train_here, yaml, [], 0, "next") == [12, 12]
    assert [event["step"] for event in events(folder, "resumed")] == [4, 5]
    assert events(folder, "cut_off_commits")[0]["steps"] == "step-00000008"
    assert (folder / "checkpoints/abandoned-1/step-00000008").is_dir()


def commit_after_losing_the_folder(world, yaml, attempt):
    from dsgpt.config import load_config
    from dsgpt.errors import LockedError
    from dsgpt.train.loop import train
    from dsgpt.train.resolve import resolve_run

    def lost():
        raise LockedError("another job has taken over this run folder")

    world.attempt = attempt
    plan = resolve_run(load_config([yaml]).config, world_size=world.size, device="cpu")
    try:
        train(plan, world, StopAt(world.rank, 0, 0), guard=lost)
    except DsgptError as error:
        return type(error).__name__
    return "it went on"


def test_a_job_that_lost_its_folder_does_not_commit(write_run, tmp_path):
    yaml = write_run("lost", **{"training.max_steps": 4, "checkpoint.save_interval": 2})
    assert ranks(2).run(commit_after_losing_the_folder, yaml, "a") == ["LockedError", "PeerError"]
    assert steps(tmp_path / "lost") == []
    assert [path.name for path in (tmp_path / "lost/checkpoints").iterdir()] == []


@pytest.mark.slow
def test_a_requeued_job_whose_folder_is_gone_does_not_start_again_at_step_0(write_run, tmp_path):
    """T310, and T309: a folder that knows of its first start, which committed nothing, begins at 0 and says so."""
    yaml, pool = write_run("gone", **{"training.max_steps": 2, "optimizer.warmup_steps": 0}), ranks(2)
    result = pool.run(train_as_job, yaml, [], 0, "b", "7", 1)
    assert result[0].startswith("CheckpointError: the job was requeued, but its run folder does not know")
    from dsgpt.checkpoint.starts import Start, record_start

    record_start(tmp_path / "gone", Start("a", "7", 0, ()))
    assert pool.run(train_as_job, yaml, [], 0, "c", "7", 1) == [2, 2]
    assert len(events(tmp_path / "gone", "nothing_committed")) == 1


class StopFile(StopRequest):
    """Touches a control file after so many steps, on one rank; never asks by itself."""

    def __init__(self, folder, name, after):
        super().__init__()
        self.folder, self.name, self.left = folder, name, after

    def poll(self):
        self.left -= 1
        if self.left == 0:
            (self.folder / self.name).touch()
        return False


def train_with_file(world, yaml, overrides, name, after, attempt):
    from dsgpt.config import load_config
    from dsgpt.errors import Stopped
    from dsgpt.train import save
    from dsgpt.train.loop import train
    from dsgpt.train.resolve import resolve_run

    world.attempt, poll_seconds, save.POLL_SECONDS = attempt, save.POLL_SECONDS, 0.0
    plan = resolve_run(load_config([yaml], overrides).config, world_size=world.size, device="cpu")
    try:
        return train(plan, world, StopFile(plan.output_dir, name, after if world.rank == 1 else -1)).step
    except (Stopped, Preempted) as error:
        return type(error).__name__, int(error.exit_code), str(error)
    finally:
        save.POLL_SECONDS = poll_seconds


@pytest.mark.parametrize("name", ["SAVE", "STOP"])
def test_a_touched_file_commits_or_stops_and_is_removed(write_run, tmp_path, name):
    """T617, with exit code 0 and the verdict `stopped` as the operator asked for it."""
    yaml, pool, folder = write_run("touched", **{"training.max_steps": 12}), ranks(2), tmp_path / "touched"
    result = pool.run(train_with_file, yaml, [], name, 4, "a")
    assert not (folder / name).exists()
    (first, *_) = steps(folder)
    assert 4 <= first <= 6
    if name == "SAVE":
        assert result == [12, 12] and steps(folder) == [first, 12]
    else:
        assert [one[:2] for one in result] == [("Stopped", 0)] * 2 and steps(folder) == [first]
        assert f"stopped at step {first} of 12, committed" in result[0][2]
        assert pool.run(train_here, yaml, [], 0, "b") == [12, 12]


def train_on_a_full_disk(world, yaml, overrides, attempt, until):
    """As train_here; no save can be begun while the run has taken fewer than `until` steps."""
    begin = commit.begin

    def full(folder, step, attempt):
        if step < until:
            raise OSError(errno.ENOSPC, "No space left on device")
        return begin(folder, step, attempt)

    with mock.patch.object(commit, "begin", full):
        return train_here(world, yaml, overrides, 0, attempt)


def test_a_save_that_is_asked_for_is_tried_once_not_at_every_step_until_the_run_ends(write_run, tmp_path):
    yaml, folder = write_run("full", **{"training.max_steps": 12}), tmp_path / "full"
    folder.mkdir()
    (folder / "SAVE").touch()
    assert ranks(2).run(train_on_a_full_disk, yaml, [], "a", 12) == [12, 12]
    assert len(events(folder, "save_failed")) == 1
    assert steps(folder) == [12] and not (folder / "SAVE").exists()


def test_time_alone_is_a_reason_to_save(write_run, tmp_path):
    yaml = write_run("timed", **{"training.max_steps": 5, "checkpoint.save_interval_minutes": 1e-9})
    ranks(2).run(train_here, yaml, ["checkpoint.keep_last=0"], 0, "a")
    assert steps(tmp_path / "timed") == [1, 2, 3, 4, 5]


def test_the_best_checkpoint_stays_with_its_validation_loss(write_run, tmp_path):
    settings = {"training.max_steps": 8, "checkpoint.save_interval": 2, "logging.eval_interval": 2}
    yaml = write_run("best", **settings, **{"checkpoint.keep_last": 1, "checkpoint.keep_best": True})
    # The learning rate explodes after step 4, so the later losses are worse.
    overrides = ["optimizer.learning_rate=0.02", "optimizer.min_learning_rate=0.02", "optimizer.warmup_steps=0"]
    assert "stopped at step 4" in ranks(2).run(train_here, yaml, overrides, 4, "a")[0]
    worse = ["optimizer.learning_rate=3", "optimizer.min_learning_rate=3", "optimizer.warmup_steps=0"]
    ranks(2).run(train_here, yaml, worse, 0, "b")
    losses = {event["step"]: event["loss"] for event in events(tmp_path / "best", "evaluation")}
    lowest = min(losses, key=losses.get)
    assert steps(tmp_path / "best") == sorted({lowest, 8}) and lowest < 8


def test_a_person_who_stops_a_run_counts_more_than_a_preemption_in_the_same_step():
    from dsgpt.errors import Preempted, Stopped
    from dsgpt.train import stopping
    from dsgpt.train.step import Wishes

    run = mock.MagicMock()
    assert isinstance(stopping.ended(run, Wishes(preempt=True, stop=True, save=False)), Stopped)
    assert isinstance(stopping.ended(run, Wishes(preempt=True, stop=False, save=False)), Preempted)
