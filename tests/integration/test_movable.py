"""A run folder needs no other place: it works where it was moved to, where it is read-only, and without its origin."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsgpt.errors import ConfigError
from dsgpt.train.start import plan_run
from tests.faults.hostile import command
from tests.integration.test_resume import hashes, metrics, train_here
from tests.pool import ranks
from tests.run_fixtures import write_config

CLONE = Path(__file__).parents[2]
LAST = "checkpoints/step-00000008"
SETTINGS = {"training.max_steps": 8, "checkpoint.save_interval": 4}
CHILD = """import json, sys
from tests.faults.hostile import command
print(json.dumps([command(*words) for words in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def moved(tmp_path_factory, dataset):
    """(a run that stayed where it was, one that went on after the move of its folder and its data, the data)."""
    folder = tmp_path_factory.mktemp("movable")
    before, after = folder / "before", folder / "after"
    shutil.copytree(dataset, before / "sets/data")
    for name in ("straight", "moved"):
        write_config(before / "sets/data", before, name, **SETTINGS)
    pool = ranks(2)
    assert pool.run(train_here, before / "straight.yaml", [], 0, "a") == [8, 8]
    assert "stopped at step 5" in pool.run(train_here, before / "moved.yaml", [], 5, "b")[0]
    (after / "disk").mkdir(parents=True)
    os.rename(before / "moved", after / "renamed")
    os.rename(before / "sets", after / "disk/sets")
    run = after / "renamed"
    assert "output_dir: .\n" in (run / "config.yaml").read_text()
    assert pool.run(train_here, run / "config.yaml", [f"data.root={after / 'disk'}"], 0, "c") == [8, 8]
    return before / "straight", run, after / "disk/sets/data"


def test_a_moved_run_goes_on_bit_for_bit_from_its_own_config(moved):
    straight, run, _ = moved
    assert not (straight.parent / "moved").exists(), (
        "nothing of it is left at the old place, and nothing was made there"
    )
    assert metrics(run) == metrics(straight)
    assert hashes(run / LAST) == hashes(straight / LAST)


def reading(run: Path, data: Path, output: Path) -> list[list[str]]:
    words = [
        ["checkpoint", "ls", run],
        ["checkpoint", "verify", run],
        ["checkpoint", "diff", run, run],
        ["evaluate", run, "--data", data, "--samples", "4"],
        ["generate", run, "--prompt", "def", "--max-new-tokens", "2"],
        ["checkpoint", "export", run, "--output", output, "--no-check"],
        ["data", "verify", data],
    ]
    return [list(map(str, line)) for line in words]


def contents(*folders: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder with its times of change and its size."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {str(path): (s.st_mtime_ns, s.st_ctime_ns, s.st_size) for path in paths if (s := path.stat())}


def set_modes(folder: Path, of_folders: int, of_files: int) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(of_folders if path.is_dir() else of_files)


def test_what_reads_a_moved_run_changes_nothing_in_it(moved, tmp_path):
    _, run, data = moved
    before = contents(run, data)
    for words in reading(run, data, tmp_path / "exported"):
        code, told = command(*words)
        assert code == 0, told
    assert contents(run, data) == before


def obey_permissions() -> None:
    """Take root's way past permissions from this process and all it starts; other users have none."""
    libc, drop_from_bounding_set = ctypes.CDLL(None), 24
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(drop_from_bounding_set, capability, 0, 0, 0)


def test_a_run_that_may_only_be_read_is_read_and_what_would_write_is_refused(moved, tmp_path):
    _, run, data = moved
    for folder in (run, data):
        set_modes(folder, 0o555, 0o444)
    before = contents(run, data)
    lines = reading(run, data, tmp_path / "exported")
    lines.append(["checkpoint", "prune", str(run), "--keep-last", "1"])
    try:
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=json.dumps(lines),
            capture_output=True,
            text=True,
            cwd=CLONE,
            preexec_fn=obey_permissions,
            timeout=100,
        )
        after = contents(run, data)
    finally:
        for folder in (run, data):
            set_modes(folder, 0o755, 0o644)
    assert child.returncode == 0, child.stderr
    *read, pruned = json.loads(child.stdout.splitlines()[-1])
    assert [told for code, told in read if code] == []
    assert pruned[0] == 73, f"the permissions hold: {pruned}"
    assert after == before


def test_a_tuned_run_goes_on_when_the_folder_it_started_from_is_gone(moved, tmp_path):
    straight, _, data = moved
    origin = tmp_path / "origin"
    assert command("checkpoint", "export", str(straight), "--output", str(origin), "--no-check")[0] == 0
    yaml = write_config(data, tmp_path, "tuned", **{**SETTINGS, "model": {"init_from": f"hf:{origin}"}})
    assert "stopped at step 3" in ranks(2).run(train_here, yaml, [], 3, "a")[0]
    shutil.rmtree(origin)
    assert ranks(2).run(train_here, yaml, [], 0, "b") == [8, 8]
    resumed = [line for line in (tmp_path / "tuned/events.jsonl").read_text().splitlines() if '"resumed"' in line]
    assert len(resumed) == 1 and "continuing from step 3" in resumed[0]


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_refused_with_commands_that_work(moved):
    _, run, data = moved
    words = [str(run / "config.yaml"), f"data.root={data.parents[1]}", "training.max_steps=9"]
    with pytest.raises(ConfigError, match="cannot continue on 3 ranks") as refused:
        plan_run(words, 3)
    assert "--num-processes 2 or 4" in str(refused.value) and "training.global_batch_size" not in str(refused.value)
    assert [plan_run(words, number).run.world_size for number in (2, 4)] == [2, 4]
    with pytest.raises(ConfigError, match="cannot continue on 8 ranks") as refused:
        plan_run(words, 8)
    assert "--num-processes 4 or training" not in str(refused.value)
    assert "dsgpt train RUN.yaml training.micro_batch_size_per_gpu=2" in str(refused.value)
    assert plan_run([*words, "training.micro_batch_size_per_gpu=2"], 8).run.gradient_accumulation_steps == 1
