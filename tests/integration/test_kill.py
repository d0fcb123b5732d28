"""A job killed at any instant, in a save or all at once continues by itself, bit by bit; and the comparison that says so sees.

Rows T101, T104, T001-T003, T105 and T113 in small; `python -m tests.faults kill controls` has the trials.
"""

from __future__ import annotations

import random

import pytest

from tests.faults import _bare, _mutations, controls, kill
from tests.faults._jobs import SETTINGS, Reference
from tests.faults.kill import Kill, Tally
from tests.integration.test_resume import train_here
from tests.pool import ranks


def test_a_job_killed_in_a_save_while_starting_and_all_at_once_ends_as_if_nothing_had_been(write_run, tmp_path):
    """T101, T104: three kills of one run; its reference ran undisturbed in other processes."""
    straight, killed = write_run("straight", **SETTINGS), write_run("killed", **SETTINGS)
    ranks(2).run(train_here, straight, [], 0, "a")
    tally, rng = Tally(), random.Random(5)
    kills = [Kill(everything=False, save=2), Kill(everything=True, share=0.15), Kill(everything=True, save=1)]
    reference = Reference.of(tmp_path / "straight")
    struck = kill.attack(killed, tmp_path / "killed", kills, reference, rng, tally)
    assert not tally.broken, "\n".join(tally.broken)
    assert struck == 3 and tally.kinds["all at once"] == 2
    assert tally.lost_steps <= SETTINGS["checkpoint.save_interval"]


@pytest.mark.slow
def test_what_a_resume_forgets_is_seen_by_the_comparison(write_run, tmp_path):
    """T002 with three pieces; a resume that forgets nothing passes."""
    yaml, forgotten = write_run("run", **_mutations.SETTINGS), ["exp_avg", "data cursor", "dropout seed"]
    found = _mutations.forget(ranks(2), yaml, tmp_path, forgotten)
    assert found.pop("plain") == []
    assert [name for name in forgotten if found[name]] == forgotten


def test_a_checkpoint_is_not_visible_before_the_slowest_rank_has_written(write_run, tmp_path):
    """T105; T003: without the barrier the same look finds a rank's part missing."""
    yaml = write_run("run", **_mutations.SETTINGS)
    whole, hurried = (
        ranks(2).run(_mutations.save_with_a_slow_rank, yaml, tmp_path / f"barrier-{barrier}", barrier)[0]
        for barrier in (True, False)
    )
    assert whole == []
    assert hurried == ["rank-00001.safetensors is not in the manifest"]


def test_everything_is_forced_to_storage_before_the_rename_that_commits_it(tmp_path):
    """T113."""
    assert controls.unforced(tmp_path / "order", controls._whole_save) == []


@pytest.mark.parametrize("save", controls.UNFORCED, ids=lambda save: save.__name__)
def test_a_save_that_leaves_a_gap_before_storage_is_caught(tmp_path, save):
    """T003."""
    assert controls.unforced(tmp_path / "order", save)


@pytest.mark.slow
def test_the_same_run_twice_has_the_same_bits(dataset, tmp_path):
    """T001, as processes."""
    assert controls._same_twice(dataset, tmp_path) == 0


@pytest.mark.slow
def test_each_piece_of_state_that_a_resume_forgets_is_seen(write_run, tmp_path):
    """T002, all of them."""
    yaml = write_run("run", **_mutations.SETTINGS)
    found = _mutations.forget(ranks(2), yaml, tmp_path, [*_mutations.MUTATIONS])
    assert [name for name in found if not found[name]] == [*_mutations.VARIANTS]


@pytest.mark.slow
def test_bare_deepspeed_can_be_killed_by_the_same_schedule(tmp_path):
    """T004: that it runs; what it shows is context and printed by the entry."""
    struck, _, runs, _ = _bare.run(tmp_path, 2, random.Random(1))
    assert struck == 2 and runs >= 1
