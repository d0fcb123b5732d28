"""A run that no Hugging Face architecture can hold: batch norm. Resumed, exported in dsgpt's format, and used from there."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from dsgpt.checkpoint.weights import find_model, load_model
from dsgpt.cli import cli
from dsgpt.errors import ConfigError
from tests.integration.test_resume import hashes, metrics, train_here
from tests.pool import ranks
from tests.run_fixtures import write_config

STEPS = 14
MODEL = {"model.norm": "batchnorm", "training.max_steps": STEPS, "training.activation_checkpointing": "selective"}


def run(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.exception or result.output
    return json.loads(result.stdout)


def event(folder, name):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [found for line in lines if (found := json.loads(line))["event"] == name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset):
    """A run stopped and resumed once, beside the same one without a stop."""
    folder, pool = tmp_path_factory.mktemp("own-format"), ranks(2)
    straight = write_config(dataset, folder, "straight", **MODEL)
    stopped = write_config(dataset, folder, "stopped", **MODEL)
    assert pool.run(train_here, straight, [], 0, "a") == [STEPS, STEPS]
    assert "stopped at step 5" in pool.run(train_here, stopped, [], 5, "b")[0]
    assert pool.run(train_here, stopped, [], 0, "c") == [STEPS, STEPS]
    return folder


@pytest.fixture(scope="module")
def exported(trained):
    output = trained / "exported"
    return output, run("checkpoint", "export", trained / "stopped", "--output", output, "--json")


def test_running_statistics_resume_bit_for_bit(trained):
    assert metrics(trained / "stopped") == metrics(trained / "straight")
    last = f"checkpoints/step-{STEPS:08d}"
    assert hashes(trained / "stopped" / last) == hashes(trained / "straight" / last)
    statistics = load_model(find_model(str(trained / "stopped"))).blocks[1].mlp_norm
    assert statistics.running_mean.abs().max() > 1e-3 and (statistics.running_var - 1).abs().max() > 1e-3


def test_the_format_is_said_before_step_1(trained):
    (start,) = event(trained / "straight", "start")
    assert "exports to dsgpt's own format" in start["text"]


def test_evaluate_and_generate_read_the_export_as_they_read_the_run(trained, exported, dataset):
    folder, report = exported
    assert report["architecture"] == report["checked_with"] == "dsgpt" and report["logit_difference"] == 0
    assert report["logit_std"] > 0.02
    during = event(trained / "stopped", "evaluation")[-1]
    after = run("evaluate", folder, "--data", dataset, "--samples", 8, "--json")
    assert after["loss"] == pytest.approx(during["loss"], rel=1e-5)
    asked = ("--prompt", "def ", "--max-new-tokens", 8, "--temperature", 0, "--json")
    assert run("generate", folder, *asked)["text"] == run("generate", trained / "stopped", *asked)["text"]


def test_a_new_run_starts_from_the_export_with_its_statistics(trained, exported, dataset):
    start = {"model.init_from": f"hf:{exported[0]}", "training.max_steps": 1, "optimizer.learning_rate": 1e-9}
    yaml = write_config(dataset, trained, "again", **start, **{"optimizer.warmup_steps": 0, "checkpoint.keep_last": 1})
    yaml.write_text("\n".join(line for line in yaml.read_text().splitlines() if "norm: batchnorm" not in line))
    assert ranks(2).run(train_here, yaml, [], 0, "d") == [1, 1]
    (read,) = event(trained / "again", "weights_read")
    folder = sum(file.stat().st_size for file in exported[0].glob("*.safetensors"))
    assert folder <= read["bytes"] <= 1.1 * folder, "of two ranks together"
    before, after = (event(trained / name, "evaluation")[-1]["loss"] for name in ("stopped", "again"))
    assert after == pytest.approx(before, rel=0.02), "one step of running statistics is all that moved"


def test_a_damaged_export_is_refused_by_name(exported, tmp_path):
    folder, _ = exported
    config = json.loads((folder / "config.json").read_text())
    config["model"]["intermediate_size"] += 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"blocks\.0\.mlp\.down_proj\.weight"):
        load_model(find_model(str(tmp_path)))
    config["format_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="another version"):
        load_model(find_model(str(tmp_path)))
