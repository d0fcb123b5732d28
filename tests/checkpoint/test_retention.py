"""What stays on the disk and what goes; RUN@STEP and RUN@best."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from dsgpt.checkpoint import commit, retention
from dsgpt.checkpoint.locate import locate_checkpoint
from dsgpt.cli import cli
from dsgpt.errors import CheckpointError


def save(folder: Path, step: int, loss: float | None = None) -> Path:
    tmp = commit.begin(folder, step, "a")
    (tmp / "rank-00000.safetensors").write_bytes(b"%d" % step)
    path = commit.commit(folder, tmp, {"step": step, "files": commit.hash_files(tmp, ["rank-00000.safetensors"])})
    if loss is not None:
        retention.record_evaluation(path, {"loss": loss})
    return path


def steps(folder: Path) -> list[int]:
    return [step for step, _ in commit.list_committed(folder)]


def test_the_newest_every_nth_the_best_and_the_pinned_stay(tmp_path):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: None, 60: 2.0, 70: None}
    for step, loss in losses.items():
        save(tmp_path, step, loss)
    (tmp_path / "step-00000010" / retention.PIN).touch()
    assert retention.prune(tmp_path, 2, keep_every=25, keep_best=True) == [30, 40]
    assert steps(tmp_path) == [10, 20, 50, 60, 70]
    assert retention.prune(tmp_path, 0) == []
    assert retention.prune(tmp_path, 1) == [20, 50, 60]
    assert steps(tmp_path) == [10, 70]


def test_the_newest_good_checkpoint_never_goes(tmp_path):
    """T109: the two newest are damaged, so the one before them is what the run would continue from."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (3, 4):
        (tmp_path / f"step-0000000{step}" / "rank-00000.safetensors").write_bytes(b"short of it")
    assert retention.prune(tmp_path, 1) == [1, 3]
    assert steps(tmp_path) == [2, 4]


def test_pruning_by_hand_knows_a_flipped_bit(tmp_path):
    """Sizes are right, hashes are not: the newest one whose hashes are right stays."""
    for step in (10, 20, 30):
        save(tmp_path / "checkpoints", step)
    (broken,) = (tmp_path / "checkpoints/step-00000030").glob("*.safetensors")
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    command = ["checkpoint", "prune", str(tmp_path), "--keep-last", "1"]
    assert "would delete: 10\n" in CliRunner().invoke(cli, [*command, "--dry-run"]).output
    assert "deleted: 10\n" in CliRunner().invoke(cli, command).output
    assert steps(tmp_path / "checkpoints") == [20, 30]


def test_what_a_crashed_delete_left_is_cleaned_up(tmp_path):
    """T108."""
    save(tmp_path, 1)
    (tmp_path / ".trash-step-00000000-77").mkdir()
    retention.prune(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_loss_that_is_not_finite_or_not_readable_is_never_the_best(tmp_path):
    save(tmp_path, 1, float("nan"))
    save(tmp_path, 2, 4.0)
    save(tmp_path, 3, 4.0)
    (save(tmp_path, 4) / retention.EVALUATION).write_text('{"loss": "low"}')
    assert retention.best(commit.list_committed(tmp_path)) == (2, tmp_path / "step-00000002")


def test_a_run_a_step_and_the_best_are_found_by_name(tmp_path):
    for step, loss in ((5, 2.0), (10, 1.0), (15, 3.0)):
        save(tmp_path / "run@home" / "checkpoints", step, loss)
    run, folder = tmp_path / "run@home", tmp_path / "run@home" / "checkpoints"
    assert locate_checkpoint(f"{run}") == folder / "step-00000015"
    assert locate_checkpoint(f"{run}@5") == folder / "step-00000005"
    assert locate_checkpoint(f"{run}@best") == folder / "step-00000010"
    assert locate_checkpoint(f"{folder}/step-00000005") == folder / "step-00000005"
    with pytest.raises(CheckpointError, match="committed: 5, 10, 15"):
        locate_checkpoint(f"{run}@7")
    with pytest.raises(CheckpointError, match="no committed checkpoint at"):
        locate_checkpoint(str(tmp_path / "nowhere"))


def test_a_reader_whose_checkpoint_is_deleted_meanwhile_reads_nothing_else(tmp_path):
    """T903: an export or evaluation beside a training run meets retention: the old values or an error, never others."""
    import torch
    from safetensors.torch import save_file

    from dsgpt.checkpoint.reader import CheckpointReader

    def write(step: int) -> Path:
        tmp = commit.begin(tmp_path, step, "a")
        for rank in range(2):
            values = {"master:w": torch.full((4,), float(10 * step + rank))}
            save_file(values, tmp / f"rank-0000{rank}.safetensors")
        names = sorted(path.name for path in tmp.iterdir())
        index = {"w": {"shape": [8], "fragments": [[0, 0, 4], [1, 4, 4]]}}
        return commit.commit(tmp_path, tmp, {"step": step, "files": commit.hash_files(tmp, names), "parameters": index})

    whole, late = CheckpointReader(write(1)), CheckpointReader(tmp_path / "step-00000001")
    expected = [10.0] * 4 + [11.0] * 4
    assert whole.tensor("w").tolist() == expected
    assert late.read("w", "master", 0, 4).tolist() == expected[:4]
    write(2)
    assert retention.prune(tmp_path, 1) == [1]
    assert whole.tensor("w").tolist() == expected, "open files outlive their folder"
    with pytest.raises(CheckpointError, match="a file of the checkpoint cannot be opened"):
        late.tensor("w")
