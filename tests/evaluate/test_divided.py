"""A model divided over ranks has the loss it has whole; every model kind, from a run and from a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dsgpt.checkpoint.divided import load_divided
from dsgpt.checkpoint.inference import load_tokenizer
from dsgpt.checkpoint.weights import find_model, load_model
from dsgpt.evaluate.answers import evaluate_answers
from dsgpt.evaluate.choices import evaluate_choices
from dsgpt.evaluate.loss import evaluate_dataset, evaluate_divided, evaluate_texts
from dsgpt.evaluate.questions import PromptWriter, Question
from dsgpt.tokenizer.tokenizer import Tokenizer
from tests.evaluate.test_questions import TASK, write
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


def said_of(model, tokenizer, questions, texts):
    """(answers, what of choices is likely, loss of texts)."""
    writer = PromptWriter(tokenizer, None, model.config.max_position_embeddings, 6)
    answers = evaluate_answers(model, tokenizer, questions, writer, batch_size=3)
    choices = evaluate_choices(model, tokenizer, questions, writer)
    return answers.answers, answers.losses, choices.chosen, choices.loss, evaluate_texts(model, tokenizer, texts).loss


def said_divided(world, place, questions, texts):
    location = find_model(str(place))
    model = load_divided(location, world, "fp32", 2).as_one()
    held = sum(p.ds_tensor.numel() for p in model.parameters()) / sum(p.ds_numel for p in model.parameters())
    return said_of(model, load_tokenizer(location), questions, texts), held


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_a_divided_model_answers_and_chooses_as_the_whole_one(kind, dataset, tmp_path):
    make_hf_folder(tmp_path / "model", kind, dataset.parent / "tokenizer", 300)
    location = find_model(str(tmp_path / "model"))
    choices = ("a value", "None", "some other thing")
    questions = [
        Question((), "", text, choices[i % 3], choices)
        for i, text in enumerate(("import os", "def f(x):", "if a", "for"))
    ]
    texts = ["def f(x):\n    return x\n" * 9, "class A: pass"]
    whole = said_of(load_model(location), load_tokenizer(location), questions, texts)
    (one, held), (other, _) = ranks(2).run(said_divided, tmp_path / "model", questions, texts)
    assert one == other and held < 0.55
    assert one[0] == whole[0] and one[2] == whole[2] and any(whole[0])
    assert (*one[1], one[3], one[4]) == pytest.approx((*whole[1], whole[3], whole[4]), rel=1e-4)


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
    text = tmp_path / "a text.txt"
    text.write_text("def f(x):\n    return x\n" * 9)
    (tmp_path / "tasks").mkdir()
    rows = write(tmp_path / "rows.jsonl", [{"q": word, "c": [" x", " os"], "a": 1} for word in ("import", "def")])
    choice = TASK.format(kind="multiple_choice", path=rows) + 'doc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\n'
    (tmp_path / "tasks/choice.yaml").write_text(choice)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for asked in (
        ("--text", text, "--text", text),
        ("--harness", "ours_multiple_choice", "--harness-folder", tmp_path / "tasks"),
    ):
        words = [sys.executable, "-m", "dsgpt", "evaluate", tmp_path / "model", *asked, "--json"]
        one, two = (
            subprocess.run([*map(str, words), *more], capture_output=True, text=True, timeout=300, env=environment)
            for more in ((), ("--num-processes", "2"))
        )
        assert two.returncode == 0, two.stderr
        whole, divided = json.loads(one.stdout), json.loads(two.stdout)
        assert divided.pop("ranks") == 2
        if "loss" in whole:
            assert divided.pop("loss") == pytest.approx(whole.pop("loss"), rel=1e-5)
            whole, divided = whole["tokens"], divided["tokens"]
        assert divided == whole
    wrong = run("--num-processes", 2, "--split", "none")
    assert wrong.returncode == 65 and wrong.stderr.count("dsgpt evaluate:") == 1
