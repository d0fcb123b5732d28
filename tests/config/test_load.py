"""Reading, merging, overriding and explaining run configs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsgpt.config import load_config, split_arguments, to_yaml
from dsgpt.errors import ConfigError, ExitCode

MINIMAL = """\
run: {output_dir: out}
model: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}
data:
  train:
    - path: data/a
optimizer:
  learning_rate: 3e-4
training: {seq_length: 32, global_batch_size: 8, max_steps: 10}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def problems_of(*arguments: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    assert caught.value.exit_code == ExitCode.CONFIG
    return [str(problem) for problem in caught.value.problems]


def test_numbers_are_read_as_people_write_them(minimal: Path) -> None:
    config = load_config([minimal], ["training.max_steps=null", "training.max_tokens=1e9", "run.seed=1_000"]).config
    assert config.optimizer.learning_rate == 0.0003
    assert config.training.max_tokens == 1_000_000_000 and isinstance(config.training.max_tokens, int)
    assert config.run.seed == 1000
    assert config.optimizer.min_learning_rate == 3e-5


def test_later_files_win_key_by_key_and_lists_are_replaced(minimal: Path, tmp_path: Path) -> None:
    cluster = write(
        tmp_path / "site", "training: {max_steps: 99}\ndata: {train: [{path: b}]}\ncheckpoint:\n", "cluster.yaml"
    )
    loaded = load_config([minimal, cluster], ["model.dropout.residual=0.1"])
    assert loaded.config.training.max_steps == 99
    assert loaded.config.training.seq_length == 32
    assert [entry.path for entry in loaded.config.data.train] == [tmp_path / "site" / "b"]
    assert loaded.config.model.dropout.residual == 0.1
    assert loaded.origins["training.max_steps"] == "cluster.yaml:1"
    assert loaded.origins["optimizer.learning_rate"] == "run.yaml:7"
    assert loaded.origins["model.dropout.residual"] == "command line"
    assert loaded.origins["model.dropout.attention"] == "default"


def test_relative_paths_count_from_their_file_or_from_the_working_folder(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(
        [minimal], ["tokenizer.path=tok", "deepspeed=auto", "model.init_from=checkpoint:runs/x"]
    ).config
    assert config.run.output_dir == tmp_path / "out"
    assert config.data.train[0].path == tmp_path / "data" / "a"
    assert config.tokenizer.path == elsewhere / "tok"
    assert config.model.init_from == f"checkpoint:{elsewhere}/runs/x"
    assert load_config(["quickstart"]).config.run.output_dir == elsewhere / "runs" / "quickstart"


def test_data_root_is_a_prefix_for_relative_dataset_paths_only(minimal: Path, tmp_path: Path) -> None:
    cluster = write(tmp_path / "site", "data: {root: scratch, validation: [{path: /abs/v}]}\n", "cluster.yaml")
    config = load_config([minimal, cluster]).config
    assert config.data.train[0].path == tmp_path / "site" / "scratch" / "data" / "a"
    assert config.data.validation[0].path == Path("/abs/v")
    assert config.run.output_dir == tmp_path / "out"


def test_one_entry_of_a_list_can_be_overridden(minimal: Path, tmp_path: Path) -> None:
    loaded = load_config([minimal], [f"data.train.0.path={tmp_path}/b"])
    assert loaded.config.data.train[0].path == tmp_path / "b"
    assert loaded.origins["data.train.0.path"] == "command line"


def test_a_hub_name_stays_a_name_and_a_folder_becomes_absolute(minimal: Path, tmp_path: Path) -> None:
    write(tmp_path, MINIMAL.replace("model: {", "model: {init_from: 'hf:org/model', "))
    assert load_config([minimal]).config.model.init_from == "hf:org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert load_config([minimal]).config.model.init_from == f"hf:{tmp_path}/org/model"


def test_the_resolved_config_round_trips_from_any_folder(minimal: Path, tmp_path: Path) -> None:
    hostile = ["run.name='3e-4'", "training.dtype=bf16", "resume=120", "optimizer.eps=1e-12", "training.max_steps=1e6"]
    first = load_config([minimal], hostile)
    assert first.config.run.name == "3e-4"
    again = load_config([write(tmp_path / "deep" / "er", to_yaml(first.config))])
    assert again.config == first.config
    assert again.warnings == []


@pytest.mark.parametrize("name", ["on", "010", "null", "1_0", "1e3", ".5", "~", "true", "a: b", "'", "é"])
def test_texts_that_look_like_something_else_round_trip(minimal: Path, tmp_path: Path, name: str) -> None:
    config = load_config([minimal]).config
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    assert load_config([write(tmp_path / "again", to_yaml(config))]).config.run.name == name


def test_our_yaml_means_the_same_to_a_plain_yaml_reader(minimal: Path) -> None:
    config = load_config([minimal]).config
    assert yaml.safe_load(to_yaml(config)) == config.model_dump(mode="json")


def test_every_problem_of_every_source_is_reported_at_once(tmp_path: Path) -> None:
    text = MINIMAL.replace("max_steps: 10", "max_step: 10, dtype: bf61").replace(
        "num_attention_heads: 4", "num_attention_heads: 7"
    )
    words = ["optimizer.betas=[0.9, 1.5]", "nonsense", "deepspeed=zero9"]
    found = problems_of([write(tmp_path, text), "quickstrat"], words)
    text = "\n".join(found)
    for expected in (
        "training.max_step: unknown key",
        "did you mean training.max_steps?",
        "did you mean bf16",
        "must divide model.hidden_size",
        "did you mean quickstart?",
        "optimizer.betas must lie in [0, 1)",
        "not a setting",
        "zero9",
    ):
        assert expected in text, expected
    assert "exactly one of training.max_steps" not in text, "a mistyped key must not be reported twice"
    assert len(found) == 7


def test_an_unknown_key_names_its_nearest_neighbour_line_and_value(tmp_path: Path) -> None:
    [problem] = problems_of(
        [write(tmp_path, MINIMAL.replace("learning_rate: 3e-4", "learning_rate: 1\n  warmup_step: 5"))]
    )
    assert "optimizer.warmup_step: unknown key" in problem
    assert "5 (run.yaml:8)" in problem
    assert "did you mean optimizer.warmup_steps?" in problem


def test_a_key_in_the_wrong_section_is_told_its_place(minimal: Path) -> None:
    [problem] = problems_of([minimal], ["training.weight_decay=0.1"])
    assert "did you mean optimizer.weight_decay?" in problem


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.seq_length='32'", "without quotes"),
        ("training.seq_length=true", "not true or false"),
        ("training.seq_length=1.5", "fractional part"),
        ("training.seq_length=0", "greater than or equal to 1"),
        ("model.hidden_size=999999999999999999999999", "less than or equal to 1000000000000000"),
        ("training.seq_length=010", "must be a number"),
        ("training.max_grad_norm=.nan", "finite"),
        ("training.micro_batch_size_per_gpu=many", "'auto'"),
        ("training.micro_batch_size_per_gpu=3", "has no solution"),
        ("model.bias=yes", "readers disagree"),
        ("run.name=off", "readers disagree"),
        ("model.bias='true'", "boolean"),
        ("run.name=3", "text"),
        ("model.dropout.residual=1.0", "less than 1"),
        ("model=7", "section"),
        ("data.train=[]", "names no source"),
        ("data.train=[{path: a}, {path: a, weight: 2}]", "names a source twice"),
        ("data.train=[{path: a, epochs: 2}, {path: b}]", "contradict each other"),
        ("data.train=[{path: a, epochs: 2, weight: 2}]", "contradict each other"),
        ("data.train=[{path: a, epochs: 2}]", "whose length is training.num_epochs"),
        ("data.train=[{path: a, weight: 0}]", "greater than 0"),
        ("data.validation=[{path: x/v}, {path: y/v}]", "have the same name"),
        ("data.validation=[{path: x/v}, {path: y/w, name: v}]", "have the same name"),
        ("data.validation=[{path: x, name: a/b}]", "data.validation.0.name"),
        ("data.train.3.path=a", "must be a list"),
        ("model.num_key_value_heads=3", "must divide model.num_attention_heads"),
        ("model.head_dim=3", "even"),
        ("model.max_position_embeddings=16", "longer than the model's positions"),
        ("model.init_from=branch:x@3", "not understood"),
        ("model.hidden_size=null", "required for a model from scratch"),
        ("fine_tuning.train=last_blocks", "cannot be frozen in part"),
        ("fine_tuning.unfreeze_at={5: 2}", "has nothing to unfreeze"),
        ("optimizer.min_learning_rate=1", "above optimizer.learning_rate"),
        ("optimizer.warmup_steps=10", "as long as the run"),
        ("training.max_tokens=1e6", "exactly one of"),
        ("training.max_steps=null", "exactly one of"),
        ("deepspeed=/nowhere/x.json", "no such file"),
        ("parallel.tensor_parallel_size=2", "no keys yet"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("run.seed=!!python/object:os.system {}", "tag"),
        ("run={name: a, name: b}", "twice"),
        ("run.seed=[1", "not valid YAML"),
        ("=3", "not a setting"),
        ("run..seed=3", "not a setting"),
    ],
)
def test_a_wrong_value_is_refused_with_its_reason(minimal: Path, override: str, expected: str) -> None:
    problems = problems_of([minimal], [override])
    assert expected in "\n".join(problems)
    assert len(problems) == 1


def test_epochs_of_a_mixture_are_those_of_its_sources(minimal: Path) -> None:
    in_epochs = ["training.max_steps=null", "training.num_epochs=1"]
    refused = problems_of([minimal], [*in_epochs, "data.train=[{path: a}, {path: b}]"])
    assert len(refused) == 1 and "says nothing about each of them" in refused[0]
    passes = "data.train=[{path: a, epochs: 2}, {path: b, epochs: 0.5}]"
    refused = problems_of([minimal], [*in_epochs, passes, "data.append_sources=true"])
    assert len(refused) == 1 and "cannot be appended" in refused[0]
    loaded = load_config([minimal], [*in_epochs, passes])
    assert [entry.epochs for entry in loaded.config.data.train] == [2, 0.5] and not loaded.warnings
    mixed = load_config([minimal], ["data.train=[{path: a, weight: 3}, {path: b}]", "data.append_sources=true"])
    assert [entry.weight for entry in mixed.config.data.train] == [3, 1] and not mixed.warnings


def test_fp16_on_a_cpu_is_refused(minimal: Path) -> None:
    assert "needs a GPU" in problems_of([minimal], ["device=cpu", "training.dtype=fp16"])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("- 1\n", "no keys"),
        ("run: {output_dir: x\n", "not valid YAML at line"),
        ("1: 2\n", "not a word"),
        ("[" * 3000, "nested too deeply"),
        ("\x00", "not valid YAML"),
    ],
)
def test_broken_yaml_is_an_error_of_ours(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in "\n".join(problems_of([write(tmp_path, text)]))


def test_a_duplicate_key_is_refused_with_its_line(tmp_path: Path) -> None:
    [problem] = problems_of(
        [write(tmp_path, MINIMAL.replace("learning_rate: 3e-4", "learning_rate: 1\n  learning_rate: 2"))]
    )
    assert "optimizer.learning_rate: the key stands here twice" in problem and "run.yaml:8" in problem


def test_missing_required_keys_are_named_with_their_meaning(tmp_path: Path) -> None:
    found = "\n".join(problems_of([write(tmp_path, "training: {max_steps: 3}\n")]))
    for key in ("run", "data", "optimizer", "training.seq_length", "training.global_batch_size"):
        assert f"{key}: this key is required" in found
    assert "required for a model from scratch" in found


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optimizer.momentum=0.9"], "optimizer.momentum"),
        (["optimizer.name=sgd", "optimizer.betas=[0.8, 0.9]"], "optimizer.betas"),
        (["optimizer.power=2.0"], "optimizer.power"),
        (["optimizer.decay_steps=3"], "optimizer.decay_steps"),
        (["optimizer.lr_schedule=constant", "optimizer.min_learning_rate=1e-5"], "optimizer.min_learning_rate"),
        (["model.position_embedding=learned", "model.rope_theta=5e5"], "model.rope_theta"),
        (["data.train.0.weight=2"], "data.train.0.weight"),
    ],
)
def test_a_setting_without_effect_warns(minimal: Path, overrides: list[str], key: str) -> None:
    [warning] = load_config([minimal], overrides).warnings
    assert warning.startswith(f"{key} has no effect")


def test_shape_keys_beside_pretrained_weights_warn(minimal: Path) -> None:
    warnings = load_config([minimal], ["model.init_from=hf:gpt2", "model.dropout.residual=0.1"]).warnings
    assert sorted(line.split()[0] for line in warnings) == [
        "model.hidden_size",
        "model.num_attention_heads",
        "model.num_hidden_layers",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train=patterns"], "there are none"),
        (["train=lora", "unfreeze_at={5: 2}"], "matrices that have adapters"),
        (["train=last_blocks", "num_last_blocks=2", "unfreeze_at={5: 2}"], "more blocks than before"),
        (["train=last_blocks", "num_last_blocks=1", "unfreeze_at={5: 3, 4: 4}"], "more blocks than before"),
        (["train=last_blocks", "num_last_blocks=auto", "unfreeze_at={4: all, 5: 3}"], "more blocks than before"),
        (["train=last_blocks", "unfreeze_at={4: all, 5: all}"], "more blocks than before"),
        (["train=patterns", "patterns=['*mlp*']", "unfreeze_at={4: 2, 5: 1}"], "more blocks than before"),
        (["train=last_blocks", "unfreeze_at={0: 3}"], "unfreeze_at"),
    ],
)
def test_contradictions_of_fine_tuning_are_refused(minimal: Path, overrides: list[str], expected: str) -> None:
    words = ["model.init_from=hf:x", *(f"fine_tuning.{word}" for word in overrides)]
    [problem] = problems_of([minimal], words)
    assert expected in problem


def test_contradictions_of_fine_tuning_are_reported_together_with_others(minimal: Path) -> None:
    words = ["fine_tuning.train=patterns", "fine_tuning.unfreeze_at={5: 2, 6: 1}", "optimizer.warmup_steps=10"]
    told = "\n".join(problems_of([minimal], words))
    for expected in ("frozen in part", "there are none", "more blocks than before", "as long as the run"):
        assert expected in told, expected


def test_what_fine_tuning_allows_is_allowed_without_a_word(minimal: Path) -> None:
    shape = ["model.hidden_size=null", "model.num_hidden_layers=null", "model.num_attention_heads=null"]
    for words in (
        ["train=last_blocks", "num_last_blocks=1", "train_embeddings=true", "unfreeze_at={9: all, 4: 2}"],
        ["train=last_blocks", "num_last_blocks=auto", "unfreeze_at={4: 1}"],
        ["train=patterns", "patterns=['*mlp*']", "unfreeze_at={4: 1, 5: all}", "train_embeddings=true"],
        ["train=lora", "lora={rank: 4, use_dora: true}", "learning_rate_decay_per_block=0.9"],
        ["learning_rate_decay_per_block=0.9", "neftune_alpha=5"],
    ):
        overrides = [*shape, "model.init_from=hf:x", "model.implementation=transformers"]
        loaded = load_config([minimal], [*overrides, *(f"fine_tuning.{word}" for word in words)])
        assert loaded.warnings == [], words
    assert load_config([minimal], ["fine_tuning.neftune_alpha=5"]).warnings == []


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["fine_tuning.lora.rank=4", "fine_tuning.lora.use_dora=true"], ["lora.rank", "lora.use_dora"]),
        (["fine_tuning.train_embeddings=true"], ["train_embeddings"]),
        (["fine_tuning.num_last_blocks=1"], ["num_last_blocks"]),
        (["fine_tuning.patterns=[a, b]"], ["patterns"]),
        (["fine_tuning.train=last_blocks", "fine_tuning.unfreeze_at={9: 3, 10: all}"], ["unfreeze_at.10"]),
    ],
)
def test_settings_of_fine_tuning_without_effect_warn(minimal: Path, overrides: list[str], keys: list[str]) -> None:
    shape = [f"model.{name}=null" for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
    warnings = load_config([minimal], [*shape, "model.init_from=hf:x", *overrides]).warnings
    assert [line.split()[0] for line in warnings] == [f"fine_tuning.{key}" for key in keys]
    assert all("has no effect" in line for line in warnings)


def test_a_way_to_attend_is_chosen_for_models_of_transformers_alone(minimal: Path) -> None:
    [warning] = load_config([minimal], ["model.attention=eager"]).warnings
    assert warning.startswith("model.attention has no effect")


def test_an_implementation_is_chosen_for_hugging_face_folders_alone(minimal: Path) -> None:
    [warning] = load_config([minimal], ["model.implementation=native"]).warnings
    assert warning.startswith("model.implementation has no effect")


def test_arguments_split_into_files_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.yaml").write_text("")
    words = ["quickstart", "a=b.yaml", "training.max_steps=3", "dir/x=y.yaml"]
    assert split_arguments(words) == (["quickstart", "a=b.yaml", "dir/x=y.yaml"], ["training.max_steps=3"])


def test_config_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, dsgpt.planning, dsgpt.config as c; c.load_config(['quickstart']);"
        "print([m for m in ('torch', 'numpy', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
