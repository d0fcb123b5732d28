"""Storage that fails while a run starts, saves, logs and reads. Rows T201-T210 of the fault matrix but T208.

Each test is a run of two pooled ranks with trouble in some of its steps (tests/faults/_trouble.py). `python -m tests.faults
storage` does the same in numbers, and T208, a slow disk under real watchdogs. A quota (EDQUOT) cannot be set up everywhere;
it is an error like ENOSPC to the code, and a limit on the size of files (EFBIG) stands for it here.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import threading
from unittest import mock

import pytest

from dsgpt.checkpoint import commit, store
from dsgpt.errors import CheckpointError, LockedError
from tests.faults import storage
from tests.faults._trouble import (
    BadSync,
    FileLimit,
    FullDisk,
    NoInodes,
    OtherUser,
    ReadOnly,
    Trouble,
    can_mount,
    events,
    hashes,
    mount,
    small_disk,
    steps,
    train,
    unsound,
)
from tests.faults.storage import SETTINGS, SYNCS, attack, every_second, failed_saves
from tests.pool import ranks

mounts = pytest.mark.skipif(not can_mount(), reason="nothing can be mounted here")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(scope="module")
def plain(dataset, tmp_path_factory):
    """(bytes of a shard, bits of the third step, folder) of a run of three steps without trouble."""
    folder = tmp_path_factory.mktemp("plain")
    assert attack(dataset, folder, "plain", Trouble({2: None}))[0] == []
    _, newest = commit.list_committed(folder / "plain/checkpoints")[-1]
    files = commit.read_manifest(newest)["files"].values()
    return min(entry["bytes"] for entry in files), hashes(folder / "plain", 3), folder / "plain"


@pytest.fixture()
def disk(tmp_path):
    """A file system of 8 MiB."""
    with small_disk(tmp_path / "disk", "size=8m,nr_inodes=300") as folder:
        yield folder


def survived(dataset, folder, trouble, name="run", **overrides):
    """Run through the trouble: exactly the attacked saves fail, each is told of, and nothing else happens."""
    wrong, ends = attack(dataset, folder, name, trouble, **overrides)
    assert wrong == []
    assert failed_saves(folder / name) == sorted(trouble.at)
    return ends


def test_a_save_cut_off_at_a_random_byte_costs_only_itself(dataset, tmp_path, plain):
    """T201, T202 and T209: on one rank or on both; the number of open files does not grow."""
    limits = storage.random_limits(8, plain[0], random.Random(3))
    assert {rank for rank, _ in limits.values()} == {0, 1, None}
    assert storage.leaked(survived(dataset, tmp_path, FileLimit(limits))) <= 0


@mounts
def test_a_disk_that_is_full_at_a_random_byte_costs_only_the_save(dataset, disk, plain):
    """T201, with ENOSPC itself; the last one is full when the manifest is written (T203)."""
    free = [random.Random(4).randrange(2 * plain[0]) for _ in range(3)]
    pages = -(-plain[0] // 4096) * 2 + 1
    survived(dataset, disk, FullDisk(every_second([*free, 4096 * pages]), disk))
    assert all("No space left" in event["text"] for event in events(disk / "run", "save_failed"))
    assert "rank" not in events(disk / "run", "save_failed")[-1]["text"], "all shards were written"


def test_three_saves_in_a_row_that_fail_end_all_ranks_with_76(dataset, tmp_path):
    """T201, its end."""
    trouble = FileLimit(dict.fromkeys((3, 4, 5, 6), (1, 4096)))
    _, ends = attack(dataset, tmp_path, "run", trouble)
    assert [(end["code"], "the checkpoint of step 5 was not written" in end["text"]) for end in ends] == [
        (76, True)
    ] * 2
    assert [event["in_a_row"] for event in events(tmp_path / "run", "save_failed")] == [1, 2, 3]
    assert steps(tmp_path / "run") == [1, 2] and unsound(tmp_path / "run") == []


def test_logs_that_cannot_be_written_do_not_stop_training(dataset, tmp_path, plain, write_run):
    """T203. /dev/full takes nothing and says ENOSPC."""
    yaml, folder = write_run("run", **{**SETTINGS, "training.max_steps": 3}), tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).symlink_to("/dev/full")
    ends = ranks(2).run(train, yaml, [], "a")
    assert [(end["code"], end["step"]) for end in ends] == [(0, 3)] * 2
    assert "lines of" in ends[0]["told"] and "No space left" in ends[0]["told"]
    assert unsound(folder) == [] and hashes(folder, 3) == plain[1]


@mounts
def test_a_disk_without_inodes_and_one_that_is_read_only_cost_only_the_save(dataset, disk, tmp_path):
    """T204: no name left for the folder, or for the second file in it; then a read-only mount."""
    survived(dataset, disk, NoInodes(every_second([0, 2]), disk))
    survived(dataset, tmp_path, ReadOnly({2: tmp_path / "run"}))
    (failed,) = events(tmp_path / "run", "save_failed")
    assert "Read-only file system" in failed["text"]


@root_only
@pytest.mark.parametrize("rank", [0, 1, None])
def test_lost_permissions_cost_only_the_save(dataset, tmp_path, rank):
    """T204, EACCES from the kernel: the ranks are another user during that step, to whom even looking is forbidden."""
    survived(dataset, tmp_path, OtherUser({2: rank}))
    assert "Permission denied" in events(tmp_path / "run", "save_failed")[0]["text"]


def refused(yaml):
    """Start in a folder that cannot be used: 73 before anything is built. Returns what it says."""
    ends = ranks(2).run(train, yaml, [], "a")
    assert (ends[0]["code"], ends[1]["step"]) == (73, -1)
    assert "first_step" not in ends[0]["told"] and ends[1]["text"].startswith(("PeerError", "LockedError"))
    return ends[0]["text"]


@mounts
def test_a_run_folder_that_cannot_be_written_is_refused_with_73(write_run, tmp_path, disk):
    """T204, at the start: read-only, for the command and for the ranks; and without a byte or a name left."""
    from dsgpt.train.start import start_run

    yaml = write_run("run", **{**SETTINGS, "training.max_steps": 2, "run.output_dir": str(disk / "run")})
    mount("-o", "remount,ro", str(disk))
    with pytest.raises(LockedError, match="cannot be written"):
        start_run([str(yaml)])
    assert "Read-only" in refused(yaml)
    mount("-o", "remount,rw", str(disk))
    for trouble in (FullDisk({}, disk), NoInodes({}, disk)):
        trouble.begin(0)
        assert "No space left" in refused(yaml)
        trouble.end()
    assert [end["code"] for end in ranks(2).run(train, yaml, [], "b")] == [0, 0], "nothing is left in the way"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_call_that_fails_once_is_tried_again(dataset, tmp_path, plain, number):
    """T205: each call of fsync in a save of each rank; told of, and the bits are the same."""
    trouble = BadSync(every_second([(rank, number, call, 1) for rank, call in SYNCS]))
    wrong, _ = attack(dataset, tmp_path, "run", trouble, **{"checkpoint.keep_last": 0})
    assert wrong == [] and failed_saves(tmp_path / "run") == []
    retried = [(event["step"], event["retries"]) for event in events(tmp_path / "run", "save_retried")]
    assert retried == [(step, 1) for step in trouble.at]
    assert len(steps(tmp_path / "run")) == 2 * len(SYNCS) + 1


def test_a_call_that_always_fails_fails_the_save_on_all_ranks(dataset, tmp_path):
    """T205, the other half: EIO for good on a rank, and for the manifest only."""
    survived(dataset, tmp_path, BadSync(every_second([(1, errno.EIO, 1, math.inf), (0, errno.EIO, 2, math.inf)])))
    assert ["rank 1" in event["text"] for event in events(tmp_path / "run", "save_failed")] == [True, False]


@pytest.fixture()
def copied(plain, write_run, tmp_path):
    """(YAML, folder) of a copy of the run without trouble."""
    shutil.copytree(plain[2], tmp_path / "run")
    return write_run("run", **{**SETTINGS, "training.max_steps": 3}), tmp_path / "run"


def read_with_errors(world, yaml, name, number, count):
    """A start whose reads of the newest step's file `name` fail so many times on rank 1, or on rank 0 for a manifest."""
    left = [count if world.rank == (name != commit.MANIFEST) else 0]

    def failing(real):
        def fails(path, *arguments, **named):
            if str(path).endswith(f"step-00000003/{name}") and left[0] > 0:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **named)

        return fails

    with mock.patch("io.open", failing(open)), mock.patch("os.open", failing(os.open)):
        return train(world, yaml, ["training.max_steps=4"], "b")


@pytest.mark.parametrize("name", [commit.MANIFEST, "rank-00001.safetensors"])
@pytest.mark.parametrize(("count", "resumed"), [(1, 3), (10**6, 2)])
def test_a_checkpoint_that_cannot_be_read_is_passed_over_but_not_for_one_error(copied, name, count, resumed):
    """T206 (forever: the one before, with a warning) and T205 for reading (once: nothing is lost)."""
    yaml, folder = copied
    ends = ranks(2).run(read_with_errors, yaml, name, errno.ESTALE, count)
    assert [(end["code"], end["step"]) for end in ends] == [(0, 4)] * 2, ends
    assert [event["step"] for event in events(folder, "resumed")] == [resumed]
    assert len(events(folder, "checkpoint_rejected")) == (resumed == 2)


def find_late(world, committed, late, seconds):
    """Rank 1 sees the newest checkpoint only some seconds later, under a name that does not exist before."""
    store.VISIBLE_SECONDS = 2.0
    (_, older), (_, newest) = committed
    mine = late if world.rank == 1 else newest
    appear = threading.Timer(seconds, lambda: late.symlink_to(newest, target_is_directory=True))
    if world.rank == 1:
        appear.start()
    try:
        found, rejected = store.find_checkpoint([(2, older), (3, mine)], world, "hash")
        return found.name, len(rejected)
    except CheckpointError as error:
        return str(error), -1
    finally:
        appear.cancel()
        store.VISIBLE_SECONDS = 30.0


def test_a_rank_with_a_stale_view_waits_and_all_decide_the_same(copied, tmp_path):
    """T207: seen within the bound, it is used; not seen, all ranks take the older one, and nobody waits for ever."""
    committed = commit.list_committed(copied[1] / "checkpoints")
    late = tmp_path / "elsewhere"
    late.mkdir()
    for seconds, end in ((0.5, ["step-00000003", 0]), (100.0, ["step-00000002", 1])):
        view = late / f"{seconds}/step-00000003"
        view.parent.mkdir()
        assert ranks(2).run(find_late, committed, view, seconds) == [tuple(end)] * 2


def test_a_forecast_larger_than_the_disk_warns_or_with_strict_space_refuses(write_run, tmp_path):
    """T210. A thousand million checkpoints fit on no disk."""
    many = {**SETTINGS, "training.max_steps": 10**9, "checkpoint.keep_last": 0}
    yaml = write_run("strict", **many, **{"checkpoint.strict_space": True})
    ends = ranks(2).run(train, yaml, [], "a")
    assert ends[0]["code"] == 73 and "will not fit on the disk" in ends[0]["text"]
    assert ends[1]["text"].startswith("PeerError")
    assert not events(tmp_path / "strict", "first_step") and steps(tmp_path / "strict") == []

    ends = ranks(2).run(train, write_run("lax", **many), [], "a", Trouble(stop_at=1))
    assert [end["code"] for end in ends] == [75, 75]
    (short,), (space,) = events(tmp_path / "lax", "space_short"), events(tmp_path / "lax", "space")
    assert space["needed_bytes"] > space["free_bytes"] and "needed" in short["text"] and "free at" in short["text"]
    written = sum(path.stat().st_size for path in (tmp_path / "lax/checkpoints/step-00000001").iterdir())
    assert json.dumps(space) and 0.9 < space["checkpoint_bytes"] / written < 1.1
