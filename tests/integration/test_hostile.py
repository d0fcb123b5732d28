"""The corpus of hostile files (tests/faults/hostile.py), and what `--trust-checkpoint` allows: T913, T914, T916, T917."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.architecture import KEYWORD_EXCEPTIONS, call_findings, parse
from tests.faults import hostile

TRUST = "--trust-checkpoint"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return hostile.build(tmp_path_factory.mktemp("hostile") / "base")


@pytest.fixture()
def place(base, tmp_path):
    shutil.copytree(base.folder, tmp_path / "place")
    return hostile.Place(tmp_path / "place")


def test_the_payloads_are_live(base, tmp_path):
    assert all(hostile.live_payloads(base, tmp_path / "control").values())


def test_the_commands_succeed_where_nothing_was_planted(base, tmp_path):
    whole = hostile.Attack("none", lambda place: None, tuple(hostile.COMMANDS), "")
    assert hostile.violations(whole, base, tmp_path / "whole") == []


@pytest.mark.parametrize("attack", hostile.ATTACKS, ids=lambda attack: attack.name)
def test_nothing_planted_runs_and_the_refusal_says_what(attack, base, tmp_path):
    assert hostile.violations(attack, base, tmp_path / "place") == []


def evaluate(place, *flags):
    code, told = hostile.command("evaluate", f"hf:{place.folder}/hf", "--text", f"{place.folder}/text.txt", *flags)
    return code, [line for line in told.splitlines() if line.startswith("loss")], told


def only_bin(place, extra=None):
    file = place.folder / "hf/model.safetensors"
    torch.save({**load_file(file), **(extra or {})}, place.folder / "hf/pytorch_model.bin")
    file.unlink()


def test_trusted_weights_in_pytorch_model_bin_are_the_same_model_and_execute_nothing(place):
    _, expected, _ = evaluate(place)
    only_bin(place)
    assert evaluate(place)[0] == 78
    code, loss, told = evaluate(place, TRUST)
    assert (code, loss) == (0, expected) and loss and "warning" not in told


def test_an_object_that_torch_refuses_is_executed_only_with_the_flag_and_a_warning(place):
    only_bin(place, {"evil": hostile.Payload(place.canary)})
    code, _, told = evaluate(place)
    assert code == 78 and TRUST in told and not place.canary.exists()
    code, _, told = evaluate(place, TRUST)
    assert place.canary.exists() and "executing it" in told
    assert code == 78 and "something else than tensors" in told, "os.system gave a number, which is no tensor"


def test_a_damaged_pytorch_model_bin_is_refused_without_executing_it(place):
    only_bin(place)
    file = place.folder / "hf/pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-200])
    code, _, told = evaluate(place, TRUST)
    assert code == 78 and "pytorch_model.bin" in told and "executing" not in told


def test_training_starts_from_pytorch_model_bin_where_the_config_trusts_it(place):
    only_bin(place)
    assert hostile.COMMANDS["init_from"](place)[0] == 78
    words = (f"model.init_from=hf:{place.folder / 'hf'}", f"run.output_dir={place.folder / 'trusted'}")
    assert hostile.train(place, *words, "model.trust_checkpoint=true") == (0, "trained to step 4")


def test_the_train_flag_is_short_for_the_config_key(place):
    code, told = hostile.command("train", f"{place.folder}/run.yaml", "--dry-run", "--num-processes", "2", TRUST)
    assert code == 0 and "trust_checkpoint: true" in told


def test_one_listed_function_may_execute_a_file_and_no_other():
    ((name, (keyword, reason)),) = KEYWORD_EXCEPTIONS.items()
    module, _, function = name.partition(":")
    body = f"def {function}(file):\n    return torch.load(file, weights_only=False)\n"
    assert keyword == "weights_only" and reason
    assert list(call_findings(parse(module, body))) == []
    assert list(call_findings(parse(module, body.replace(function, "another"))))
    source = Path(hostile.__file__).parents[2] / f"{module.replace('.', '/')}.py"
    assert source.read_text("utf-8").count("weights_only=False") == 1
