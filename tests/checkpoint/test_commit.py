"""The order of system calls of a commit, what a rank touches, and errors that pass."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from dsgpt.checkpoint import commit
from tests.integration.test_resume import train_here
from tests.pool import ranks


@pytest.fixture()
def calls(monkeypatch) -> list[tuple[str, str]]:
    """What is forced to storage and renamed, in order: ("fsync", name) and ("rename", name)."""
    seen: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recorded_rename(source, target) -> None:
        seen.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    return seen


def test_every_file_and_folder_is_on_storage_before_the_rename_and_the_parent_after_it(tmp_path, calls):
    """T113: fsync(file), fsync(folder), rename, fsync(parent)."""
    folder = tmp_path / "checkpoints"
    tmp = commit.begin(folder, 7, "a")
    names = ["rank-00000.safetensors", "rank-00001.safetensors"]
    for name in names:
        (tmp / name).write_bytes(b"x")
    files = commit.hash_files(tmp, names)
    commit.commit(folder, tmp, {"step": 7, "files": files})
    assert calls == [
        ("fsync", tmp_path.name),
        *[("fsync", name) for name in names],
        ("fsync", "manifest.json"),
        ("fsync", tmp.name),
        ("rename", "step-00000007"),
        ("fsync", "checkpoints"),
    ]


def test_a_checkpoint_of_the_same_step_left_by_another_job_is_set_aside_whole(tmp_path):
    for attempt in ("a", "b"):
        tmp = commit.begin(tmp_path, 3, attempt)
        (tmp / "rank-00000.safetensors").write_text(attempt)
        files = commit.hash_files(tmp, ["rank-00000.safetensors"])
        commit.commit(tmp_path, tmp, {"step": 3, "attempt": attempt, "files": files})
    assert commit.attempt_of(tmp_path / "step-00000003") == "b"
    aside = tmp_path / "abandoned-1/step-00000003"
    assert commit.attempt_of(aside) == "a" and commit.verify(aside) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_error_that_passes_is_tried_again_and_counted(number):
    """T205; an error that does not pass, and a full disk, are not."""
    left = [2]

    def action(wanted=number):
        if left[0]:
            left[0] -= 1
            raise OSError(wanted, "injected")
        return "done"

    assert commit.retrying(action) == ("done", 2)
    left[0] = 3
    with pytest.raises(OSError, match="injected"):
        commit.retrying(action)
    left[0] = 1
    with pytest.raises(OSError, match="injected"):
        commit.retrying(lambda: action(errno.ENOSPC))


def touched_during_a_save(world, yaml):
    """Files of the checkpoint folder that this rank opened or looked at while saving."""
    from dsgpt.train import loop

    seen, recording, save = set(), [False], loop.save
    stat, lstat = os.stat, os.lstat

    def note(path):
        if recording[0] and isinstance(path, str | os.PathLike) and "step-" in str(path):
            seen.add(Path(path).name)

    def hook(event, arguments):
        if event in ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "shutil.rmtree"):
            note(arguments[0])

    def recorded(*arguments, **named):
        recording[0] = True
        try:
            return save(*arguments, **named)
        finally:
            recording[0] = False

    sys.addaudithook(hook)  # stays, and sees nothing once recording is over
    os.stat = lambda path, *a, **k: (note(path), stat(path, *a, **k))[1]
    os.lstat = lambda path, *a, **k: (note(path), lstat(path, *a, **k))[1]
    loop.save = recorded
    try:
        assert train_here(world, yaml, [], 0, "a") == 2
    finally:
        os.stat, os.lstat, loop.save = stat, lstat, save
    return sorted(seen)


def test_a_checkpoint_holds_12_bytes_per_parameter_and_little_else(write_run, tmp_path):
    """T414: master and two moments in fp32, at a size where headers still count."""
    import math

    settings = {"training.max_steps": 1, "optimizer.warmup_steps": 0, "model.hidden_size": 64}
    ranks(2).run(train_here, write_run("sized", **settings), [], 0, "a")
    manifest = commit.read_manifest(tmp_path / "sized/checkpoints/step-00000001")
    parameters = sum(math.prod(entry["shape"]) for entry in manifest["parameters"].values())
    assert 12 * parameters <= sum(entry["bytes"] for entry in manifest["files"].values()) <= 1.1 * 12 * parameters


def test_no_rank_looks_at_the_files_of_another(write_run):
    settings = {"training.max_steps": 2, "checkpoint.save_interval": 1, "optimizer.warmup_steps": 0}
    first, second = ranks(2).run(touched_during_a_save, write_run("alone", **settings))
    assert second == ["rank-00001.safetensors"]
    assert "rank-00000.safetensors" in first and "rank-00001.safetensors" not in first
