"""The scripts for data and evaluation as real jobs: the same files and numbers as the commands give here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsgpt.data.manifest import load_manifest
from tests.slurm import lab

pytestmark = pytest.mark.slurm
PREPARE, EVALUATE = lab.SCRIPTS / "prepare_data.sbatch", lab.SCRIPTS / "evaluate.sbatch"


@pytest.fixture(scope="module")
def texts(tmp_path_factory, dataset) -> Path:
    """A folder with the session's text cut into six files, so that tasks have something to share."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (dataset.parent / "texts.jsonl").read_text("utf-8").splitlines(keepends=True)
    for number in range(6):
        (folder / f"{number}.jsonl").write_text("".join(lines[number::6]), "utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared_here(texts, dataset, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("here") / "data"
    command = [sys.executable, "-m", "dsgpt", "data", "prepare", *arguments(texts, dataset, folder), "--workers=1"]
    subprocess.run(command, check=True, capture_output=True)
    return files_of(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    """The shards; dataset.json is left out, as it says when and by whom it was made."""
    found = {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".bin", ".idx")}
    assert found and load_manifest(folder).splits
    return found


def arguments(texts: Path, dataset: Path, output: Path) -> list[str]:
    return [str(texts), "--tokenizer", str(dataset.parent / "tokenizer"), "--output", str(output)]


@pytest.mark.parametrize(
    "array", [[], ["--array=0-2"], ["--array=5-9:2"]], ids=["one job", "three tasks", "odd numbers"]
)
def test_any_array_makes_the_dataset_that_one_process_makes(array, submit, texts, dataset, prepared_here, tmp_path):
    output = tmp_path / "data"
    job = submit(PREPARE, *arguments(texts, dataset, output), options=["--cpus-per-task=1", *array])
    ended = lab.wait_all(job, 300)
    assert [one.state for one in ended] == ["COMPLETED"] * max(1, 3 * len(array)), lab.log_of(job)
    assert files_of(output) == prepared_here


def test_an_array_with_gaps_is_refused_with_one_that_works(submit, texts, dataset, tmp_path):
    job = submit(PREPARE, *arguments(texts, dataset, tmp_path / "data"), options=["--cpus-per-task=1", "--array=0,3"])
    assert {(one.state, one.exit_code) for one in lab.wait_all(job, 120)} == {("FAILED", 78)}
    assert "do:   sbatch --array=0-1 " in next(tmp_path.glob("*.log")).read_text("utf-8")
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def model(dataset, tmp_path_factory) -> Path:
    """A small GPT-2 with random weights, as transformers saves it, beside the session's tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=320, n_positions=64)).save_pretrained(folder)
    shutil.copytree(dataset.parent / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def test_an_evaluation_prints_what_it_prints_here_and_nothing_else(submit, model, texts, tmp_path):
    what = [str(model), "--text", str(texts / "0.jsonl"), "--text", str(texts / "1.jsonl"), "--json"]
    options = ["--cpus-per-task=1", "--output=out.json", "--error=err.log"]
    job = submit(EVALUATE, *what, options=options)
    here = subprocess.run(
        [sys.executable, "-m", "dsgpt", "evaluate", *what], check=True, capture_output=True, text=True
    )
    assert lab.wait(job, 300).state == "COMPLETED", (tmp_path / "err.log").read_text("utf-8")
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == json.loads(here.stdout)


def test_each_task_of_an_array_evaluates_its_own_model(submit, model, texts, tmp_path):
    for number in (4, 7):
        os.symlink(model, tmp_path / f"model-{number}")
    what = ["model-{task}", "--text", str(texts / "0.jsonl"), "--json"]
    job = submit(
        EVALUATE, *what, options=["--cpus-per-task=1", "--array=4,7", "--output=out-%a.json", "--error=%a.log"]
    )
    assert {one.state for one in lab.wait_all(job, 300)} == {"COMPLETED"}
    for number in (4, 7):
        assert json.loads((tmp_path / f"out-{number}.json").read_text("utf-8"))["model"] == f"model-{number}"


def test_a_failure_is_the_jobs_failure(submit, model, tmp_path):
    """78 and 65 reach whoever waits for the job: `afterok` must not go on."""
    job = submit(EVALUATE, "nothing-here", "--text", str(model / "config.json"), options=["--cpus-per-task=1"])
    ended = lab.wait(job, 120)
    assert (ended.state, ended.exit_code) == ("FAILED", 65), lab.log_of(job)
