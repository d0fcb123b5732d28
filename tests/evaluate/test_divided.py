"""A model divided over ranks has the loss it has whole; every model kind, from a run and from a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dsgpt.checkpoint.divided import load_divided
from dsgpt.checkpoint.weights import find_model, load_model
from dsgpt.evaluate.loss import evaluate_dataset, evaluate_divided
from dsgpt.tokenizer.tokenizer import Tokenizer
from tests.hf_models import make_hf_folder
from tests.integration.test_resume import train_here
from tests.pool import ranks
from tests.run_fixtures import write_config


def divided_loss(world, place, dataset):
    """(loss, tokens, the largest part of a parameter that this rank holds)."""
    location = find_model(str(place))
    model = load_divided(location, world, "fp32", 2)
    held = sum(p.ds_tensor.numel() for p in model.module.parameters())
    whole = sum(p.ds_numel for p in model.module.parameters())
    result = evaluate_divided(model, Tokenizer.load(location.tokenizer), dataset, "validation", 10, 2)
    return result.loss, result.tokens, held / whole


@pytest.mark.parametrize("kind", ["run", "batchnorm run", "llama", "mistral", "gpt2"])
def test_a_divided_model_has_the_loss_of_the_whole_one(kind, dataset, tmp_path):
    place = tmp_path / "model"
    if kind.endswith("run"):
        norm = {"model.norm": "batchnorm"} if kind.startswith("batchnorm") else {}
        yaml = write_config(
            dataset, tmp_path, "model", **{"training.max_steps": 2, "optimizer.warmup_steps": 0}, **norm
        )
        assert ranks(2).run(train_here, yaml, [], 0, "a") == [2, 2]
    else:
        make_hf_folder(place, kind, dataset.parent / "tokenizer", 300)
    location = find_model(str(place))
    whole = evaluate_dataset(load_model(location), Tokenizer.load(location.tokenizer), dataset, "validation", 10)
    found = ranks(2).run(divided_loss, place, dataset)
    assert found[0] == found[1]
    loss, tokens, share = found[0]
    assert tokens == whole.tokens and loss == pytest.approx(whole.loss, rel=1e-5)
    assert share < 0.55


@pytest.mark.slow
def test_the_command_starts_its_ranks_and_fails_with_the_codes_of_the_contract(dataset, tmp_path):
    make_hf_folder(tmp_path / "model", "llama", dataset.parent / "tokenizer", 300)

    def run(*options, data=dataset):
        command = [sys.executable, "-m", "dsgpt", "evaluate", tmp_path / "model", "--data", data, "--json", *options]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ}, timeout=300)

    divided, whole = run("--num-processes", 2, "--samples", 7), run("--samples", 7)
    two, one = json.loads(divided.stdout), json.loads(whole.stdout)
    assert two["ranks"] == 2 and two["tokens"] == one["tokens"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    wrong = run("--num-processes", 2, "--split", "none")
    assert wrong.returncode == 65 and wrong.stderr.count("dsgpt evaluate:") == 1
