"""`dsgpt config`, one verb at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dsgpt.cli.config import config as group
from dsgpt.config import load_config
from dsgpt.errors import ConfigError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(argument) for argument in arguments])


def test_ls_names_every_shipped_config() -> None:
    assert "gpt2-124m" in run("ls").stdout
    assert set(json.loads(run("ls", "--json").stdout)) >= {"quickstart", "llama-8b"}


def test_cp_copies_once_and_never_overwrites(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    assert run("cp", "quickstart", target).exit_code == 0
    assert load_config([target]).config.run.output_dir == tmp_path / "runs" / "quickstart"
    again = run("cp", "gpt2-124m", target)
    assert isinstance(again.exception, ConfigError) and "exists" in str(again.exception)
    assert load_config([target]).config.run.name == "quickstart"


def test_show_prints_a_config_that_loads_to_the_same(tmp_path: Path) -> None:
    shown = run("show", "quickstart", "training.max_steps=70", "optimizer.momentum=0.5")
    assert shown.exit_code == 0
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    expected = load_config(["quickstart"], ["training.max_steps=70", "optimizer.momentum=0.5"]).config
    assert load_config([tmp_path / "shown.yaml"]).config == expected
    assert "optimizer.momentum has no effect" in shown.stderr


def test_explain_says_where_each_value_comes_from() -> None:
    lines = run("explain", "quickstart", "training.max_steps=70").stdout.splitlines()
    found = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    assert found["training.max_steps"] == ["70", "command line"]
    assert found["optimizer.eps"] == ["1e-08", "default"]
    assert found["training.seq_length"][1].startswith("quickstart.yaml:")
    as_json = json.loads(run("explain", "quickstart", "--json").stdout)
    assert as_json["optimizer.betas"]["value"] == [0.9, 0.95]


def test_schema_is_json() -> None:
    assert json.loads(run("schema").stdout)["title"] == "RunConfig"


def test_validate_accepts_what_is_right_and_lists_what_is_wrong(tmp_path: Path) -> None:
    assert run("validate", "gpt2-124m", "deepspeed=zero2").exit_code == 0
    bad = run("validate", "gpt2-124m", "training.max_step=1", "deepspeed=zero9")
    assert isinstance(bad.exception, ConfigError) and len(bad.exception.problems) == 2
    as_json = run("validate", "gpt2-124m", "training.max_step=1", "deepspeed=zero9", "--json")
    assert as_json.exit_code == 78
    assert len(json.loads(as_json.stdout)["problems"]) == 2


def test_validate_reads_the_deepspeed_json_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stagee": 2}}')
    bad = run("validate", "gpt2-124m", f"deepspeed={path}", "--json")
    assert bad.exit_code == 78
    assert "did you mean zero_optimization.stage?" in bad.stdout


@pytest.mark.parametrize("verb", ["show", "explain", "validate"])
def test_a_config_must_be_named(verb: str) -> None:
    assert run(verb).exit_code == 2
