"""Derived values of the config, and every shipped run config."""

from __future__ import annotations

import re

import pytest

from dsgpt.config import ModelSection, find_config, flatten, json_schema, load_config, shipped_configs, to_yaml
from dsgpt.config.schema import RunConfig, TrainingSection
from dsgpt.errors import ConfigError

SHIPPED = sorted(shipped_configs())


def training(**keys: object) -> TrainingSection:
    return TrainingSection.model_validate({"seq_length": 16, "global_batch_size": 48, **keys})


def test_the_shipped_configs_are_these() -> None:
    from_scratch = ["gpt-1.3b", "gpt-350m", "gpt-6.7b", "gpt2-124m", "llama-8b", "quickstart", "small-base"]
    assert sorted([*from_scratch, "legal", "news", "support"]) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_valid_and_says_what_it_needs(name: str) -> None:
    loaded = load_config([name])
    assert loaded.warnings == []
    assert loaded.config.run.name == name
    header = find_config(name).read_text().split("\n\n")[0]
    assert all(word in header for word in ("Needs:", "Launch:", "Use ")), header
    mentioned = set(re.findall(r"\b(?:gpt2?-[\w.]+|llama-8b|quickstart)\b", header.replace(".yaml", "")))
    assert mentioned - {name, "dsgpt-quickstart"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_tokens_per_step_in_the_comments_is_true(name: str) -> None:
    text = find_config(name).read_text()
    stated = re.search(r"# ([\d.]+) million tokens per step", text)
    if stated:
        assert load_config([name]).config.training.tokens_per_step / 1e6 == pytest.approx(float(stated[1]), rel=0.06)


def test_gradient_accumulation_follows_from_the_batch() -> None:
    assert training(micro_batch_size_per_gpu=4).gradient_accumulation_steps(3) == 4
    assert training(micro_batch_size_per_gpu=48).gradient_accumulation_steps(1) == 1


def test_a_batch_that_does_not_divide_prints_the_equation_and_the_nearest_values() -> None:
    with pytest.raises(ConfigError) as caught:
        training(micro_batch_size_per_gpu=5).gradient_accumulation_steps(4)
    [problem] = caught.value.problems
    assert "global_batch_size = micro_batch_size_per_gpu x GPUs x accumulation steps" in problem.what
    assert problem.seen == "48 = 5 x 4 x 2.4"
    assert "training.global_batch_size to 40 or 60" in problem.do
    assert "training.micro_batch_size_per_gpu to 4 or 6" in problem.do


def test_a_world_larger_than_the_batch_suggests_the_smallest_that_works() -> None:
    with pytest.raises(ConfigError) as caught:
        training(micro_batch_size_per_gpu=1).gradient_accumulation_steps(64)
    assert caught.value.problems[0].do == "set training.global_batch_size to 64"


def test_the_length_of_a_run_in_steps_is_derived() -> None:
    assert training(max_steps=7).num_steps() == 7
    assert training(max_tokens=16 * 48 * 10).num_steps() == 10
    assert training(max_tokens=16 * 48 * 10 + 1).num_steps() == 11
    assert training(num_epochs=2).num_steps(samples_per_epoch=49) == 3
    assert training(num_epochs=0.5).num_steps(samples_per_epoch=960) == 10
    with pytest.raises(ConfigError):
        training(num_epochs=2).num_steps()


def test_the_missing_sizes_of_a_model_are_the_usual_ones() -> None:
    section = ModelSection(hidden_size=160, num_hidden_layers=4, num_attention_heads=5)
    model = section.resolved(vocab_size=4096, seq_length=256)
    assert (model.head_dim, model.num_key_value_heads, model.vocab_size, model.max_position_embeddings) == (
        32,
        5,
        4096,
        256,
    )
    assert model.intermediate_size == 448  # 8/3 x 160 = 426.7, up to a multiple of 64
    assert section.model_copy(update={"activation": "gelu"}).resolved(1, 1).intermediate_size == 640
    assert section.model_copy(update={"hidden_size": 4096}).resolved(1, 1).intermediate_size == 10944
    kept = section.model_copy(update={"vocab_size": 5000, "max_position_embeddings": 512}).resolved(4096, 256)
    assert (kept.vocab_size, kept.max_position_embeddings) == (5000, 512)
    with pytest.raises(ConfigError):
        ModelSection(init_from="hf:gpt2").resolved(1, 1)


def test_the_json_schema_describes_every_key_in_words() -> None:
    def properties(schema: dict) -> list[tuple[str, dict]]:
        return [item for part in (schema, *schema["$defs"].values()) for item in part.get("properties", {}).items()]

    schema = json_schema()
    undescribed = [key for key, value in properties(schema) if "$ref" not in value and not value.get("description")]
    assert undescribed == []
    assert schema["additionalProperties"] is False


def test_every_key_of_the_config_is_written_out() -> None:
    written = to_yaml(load_config(["quickstart"]).config)
    for name in RunConfig.model_fields:
        assert re.search(rf"^{name}:", written, re.MULTILINE)


def test_flatten_keeps_lists_of_scalars_whole() -> None:
    assert flatten({"a": {"b": [1, 2]}, "c": [{"d": 3}], "e": {}, "f": []}) == {
        "a.b": [1, 2],
        "c.0.d": 3,
        "e": {},
        "f": [],
    }
