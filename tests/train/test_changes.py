"""What a changed config key does to a run that continues: every key has its class, and each class is tried for real."""

from __future__ import annotations

import json

import pytest

from dsgpt.config import flatten, load_config
from dsgpt.errors import CheckpointError, ConfigError
from dsgpt.optimizer import learning_rate
from dsgpt.train.changes import POLICIES, policy_of
from tests.integration.test_resume import train_here
from tests.integration.test_rewind import events
from tests.pool import ranks


def test_every_key_of_a_config_has_a_class_and_no_row_of_the_table_is_dead(write_run):
    config = load_config([write_run()]).config
    keys = flatten(config.model_dump(mode="json"))
    used = {policy_of(key).pattern for key in keys}
    assert used == {policy.pattern for policy in POLICIES} - {"parallel.*"}, "parallel has no keys yet"


def started(write_run, **settings):
    base = {"training.max_steps": 6, "checkpoint.save_interval": 2, "optimizer.warmup_steps": 2}
    yaml = write_run("changed", **{**base, **settings})
    assert "stopped at step 3" in ranks(2).run(train_here, yaml, [], 3, "a")[0]
    return yaml


REFUSED = [
    "run.seed=6",
    "optimizer.name=sgd",
    "training.seq_length=16",
    "training.global_batch_size=8",
    "data.document_mask=false",
    "model.hidden_size=64",
]


def test_refused_changes_are_told_all_at_once_and_change_nothing(write_run, tmp_path):
    """T408, T409 (another seed)."""
    yaml = started(write_run)
    before = (tmp_path / "changed/config.yaml").read_bytes()
    result = ranks(2).run(train_here, yaml, REFUSED, 0, "b")
    assert result[0].startswith("ConfigError")
    for word in REFUSED:
        assert f"{word.partition('=')[0]} differs" in result[0]
    assert (tmp_path / "changed/config.yaml").read_bytes() == before


def test_applied_changes_count_from_the_next_step_on_and_are_listed(write_run, tmp_path):
    """T403, T408: betas, decay, clipping, rate, length, micro batch; the rate jumps and the start says so."""
    yaml = started(write_run)
    overrides = [
        "optimizer.learning_rate=1e-3",
        "optimizer.betas=[0.8,0.9]",
        "optimizer.weight_decay=0.2",
        "training.max_grad_norm=0.5",
        "training.max_steps=9",
        "training.micro_batch_size_per_gpu=8",
        "deepspeed=zero2",
    ]
    assert ranks(2).run(train_here, yaml, overrides, 0, "b") == [9, 9]
    folder = tmp_path / "changed"
    listed = " ".join(event["text"] for event in events(folder, "config_changed"))
    assert "optimizer.betas: [0.9, 0.95] -> [0.8, 0.9]" in listed and "deepspeed: 'zero1' -> 'zero2'" in listed
    (jump,) = events(folder, "learning_rate_changed")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "step" in line}
    config = load_config([yaml], overrides).config.optimizer
    for step in range(4, 10):
        assert rates[step] == learning_rate(config, step - 1, 9)
    assert (jump["old"], jump["new"]) == (rates[3], rates[4])


def test_ignored_changes_are_warned_of(write_run, tmp_path):
    yaml = started(write_run)
    other = tmp_path / "nowhere"
    assert ranks(2).run(train_here, yaml, [f"model.init_from=hf:{other}/model"], 0, "b") == [6, 6]
    (event,) = events(tmp_path / "changed", "config_changed")
    assert (
        "model.init_from: 'scratch' -> " in event["text"]
        and "(ignored: the checkpoint has the weights)" in event["text"]
    )


def test_other_data_is_refused_by_its_fingerprint_wherever_it_lies(write_run, tmp_path, dataset):
    """T407: the same path with other contents; the fork that is allowed lists the difference."""
    from dsgpt.data.prepare import prepare

    yaml = started(write_run)
    text = tmp_path / "other.jsonl"
    text.write_text("".join(json.dumps({"text": f"sentence {n} of another text\n" * 20}) + "\n" for n in range(60)))
    prepare([text], dataset / "tokenizer", tmp_path / "data2", workers=1)
    result = ranks(2).run(train_here, yaml, [f"data.train.0.path={tmp_path / 'data2'}"], 0, "b")
    assert result[0].startswith(CheckpointError.__name__) and "fingerprint: checkpoint" in result[0]
    assert "model.init_from=fork:" in result[0]
    fork = [
        f"model.init_from=fork:{tmp_path / 'changed'}@3",
        f"run.output_dir={tmp_path / 'forked'}",
        f"data.train.0.path={tmp_path / 'data2'}",
    ]
    assert ranks(2).run(train_here, yaml, fork, 0, "c") == [6, 6]
    (event,) = events(tmp_path / "forked", "forked")
    assert any(line.startswith("fingerprint: checkpoint") for line in event["differences"])


def with_other_torch(world, yaml, overrides):
    from dsgpt.train import folder, resume

    original = resume.versions
    resume.versions = lambda: {**folder.versions(), "torch": "9.9"}
    try:
        return train_here(world, yaml, overrides, 0, "b")
    finally:
        resume.versions = original


@pytest.mark.parametrize("strict", ["false", "true"])
def test_other_versions_are_told_or_refused(write_run, tmp_path, strict):
    """T409."""
    yaml = started(write_run)
    result = ranks(2).run(with_other_torch, yaml, [f"run.strict_versions={strict}"])
    if strict == "true":
        assert all(
            text.startswith(f"{ConfigError.__name__}: the checkpoint was made with other versions") for text in result
        )
    else:
        assert result == [6, 6]
        assert "-> 9.9" in events(tmp_path / "changed", "versions_changed")[0]["text"]
