"""Filling DeepSpeed configs, with the installed DeepSpeed's own parser as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsgpt.config import RunConfig, check_deepspeed, fill_deepspeed, load_config, shipped_folder, zero_kind
from dsgpt.config import deepspeed_keys as keys
from dsgpt.errors import ConfigError

SHIPPED = sorted(path.stem for path in shipped_folder("ds_configs").glob("*.json"))


def resolved(deepspeed: str | Path, dtype: str = "bf16", micro: int = 2) -> RunConfig:
    overrides = [f"deepspeed={deepspeed}", f"training.dtype={dtype}", f"training.micro_batch_size_per_gpu={micro}"]
    overrides += ["training.global_batch_size=32"]
    return load_config(["quickstart"], overrides).config


def own(tmp_path: Path, text: str | dict) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def problems_of(path: Path, world_size: int = 8, **keys: object) -> str:
    with pytest.raises(ConfigError) as caught:
        fill_deepspeed(resolved(path, **keys), world_size)
    return "\n".join(map(str, caught.value.problems))


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value]


def test_the_shipped_deepspeed_configs_are_these() -> None:
    assert SHIPPED == [
        "zero0",
        "zero1",
        "zero2",
        "zero2_offload_optimizer",
        "zero3",
        "zero3_hpz",
        "zero3_nvme",
        "zero3_offload",
    ]


CASES = [(name, dtype) for name in SHIPPED for dtype in ("bf16", "fp16", "fp32") if name != "zero0" or dtype == "fp32"]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_deepspeed_itself_reads_what_we_fill_in(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime import config as theirs

    filled = fill_deepspeed(resolved(name, dtype), world_size=8)
    assert "auto" not in leaves(filled)
    monkeypatch.setattr(theirs.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(theirs.dist, "get_world_size", lambda: 8)
    parsed = theirs.DeepSpeedConfig(filled)
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (32, 2)
    assert parsed.gradient_accumulation_steps == 2
    assert parsed.gradient_clipping == 1.0
    assert parsed.bfloat16_config.enabled == (dtype == "bf16")
    assert parsed.float16_config.enabled == (dtype == "fp16")
    assert parsed.grad_accum_dtype == (None if dtype == "fp32" else "fp32")
    assert parsed.communication_data_type == (None if dtype == "fp32" else torch.float32)
    assert parsed.zero_force_ds_cpu_optimizer is False
    assert parsed.optimizer_name is None and parsed.scheduler_name is None
    stage, offload_optimizer, offload_param, _ = zero_kind(name)
    assert parsed.zero_optimization_stage == stage == int(name[4])
    assert offload_optimizer == ("offload" in name or "nvme" in name)
    assert offload_param == (name in ("zero3_offload", "zero3_nvme"))
    if stage == 3:
        assert parsed.zero_config.memory_efficient_linear is False


@pytest.mark.parametrize(
    ("parameters", "bucket"), [(None, 50e6), (9_000_000, 1e6), (124_000_000, 7_750_000), (8_000_000_000, 50e6)]
)
def test_gradient_buckets_grow_with_the_model(parameters: int | None, bucket: float) -> None:
    filled = fill_deepspeed(resolved("zero2"), world_size=8, num_parameters=parameters)
    assert filled["zero_optimization"]["reduce_bucket_size"] == bucket


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_stage_0_which_would_sum_gradients_in_16_bits_is_refused(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"stage 0 would sum gradients in {dtype}"):
        fill_deepspeed(resolved("zero0", dtype), world_size=8)


def test_stage_0_in_bf16_runs_where_the_file_accepts_its_sums(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"data_types": {"grad_accum_dtype": "bf16"}}))
    filled = fill_deepspeed(resolved(str(tmp_path / "own.json"), "bf16"), world_size=8)
    assert filled["data_types"] == {"grad_accum_dtype": "bf16"} and filled["communication_data_type"] == "fp32"
    with pytest.raises(ConfigError, match="stage 0 would sum gradients in fp16"):
        fill_deepspeed(resolved(str(tmp_path / "own.json"), "fp16"), world_size=8)


@pytest.mark.parametrize("name", SHIPPED)
def test_batch_optimizer_and_precision_stay_auto_in_the_files(name: str) -> None:
    raw = json.loads((shipped_folder("ds_configs") / f"{name}.json").read_text())
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert raw[key] == "auto"
    assert raw["bf16"] == raw["fp16"] == {"enabled": "auto"}
    assert "optimizer" not in raw and "scheduler" not in raw
    assert f"`{name}`" in (shipped_folder("ds_configs") / "README.md").read_text()


def test_our_table_of_keys_is_known_to_the_installed_deepspeed() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    for table, theirs in (
        (keys.ZERO, DeepSpeedZeroConfig),
        (keys.ZERO["offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig),
        (keys.ZERO["offload_param"], DeepSpeedZeroOffloadParamConfig),
        (keys.BF16, DeepSpeedBF16Config),
        (keys.FP16, DeepSpeedFP16Config),
    ):
        fields = {field.alias or name: field for name, field in theirs.model_fields.items()}
        assert set(table) <= set(fields)
        for name, kind in table.items():
            annotation = str(fields[name].annotation)
            if kind in ("bool", "int"):
                assert kind in annotation or "Stage" in annotation, name


def test_the_top_level_keys_are_known_to_the_installed_deepspeed() -> None:
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    known |= {"zero_optimization", "bf16", "fp16", "aio", "timers", "comms_logger"}
    assert set(keys.TOP_LEVEL) <= known


def test_every_disagreement_with_the_run_is_listed_at_once(tmp_path: Path) -> None:
    text = problems_of(
        own(
            tmp_path,
            {
                "train_batch_size": 64,
                "gradient_clipping": 0.5,
                "bf16": {"enabled": False},
                "zero_optimization": {"stage": 2},
            },
        )
    )
    assert "train_batch_size disagrees with the run" in text and "64, the run says 32" in text
    assert "gradient_clipping disagrees" in text
    assert "bf16.enabled disagrees" in text
    assert text.count("disagrees") == 3


def test_typos_and_wrong_types_are_listed_at_once(tmp_path: Path) -> None:
    path = own(
        tmp_path,
        {
            "zero_optimisation": {"stage": 2},
            "zero_optimization": {
                "stage": 4,
                "overlap_com": True,
                "reduce_bucket_size": "big",
                "contiguous_gradients": 1,
            },
            "optimizer": {"type": "AdamW"},
            "fp16": True,
            "sparse_attention": {},
        },
    )
    text = problems_of(path)
    for expected in (
        "did you mean zero_optimization?",
        "did you mean zero_optimization.overlap_comm?",
        "zero_optimization.stage has no such choice",
        "reduce_bucket_size must be a whole number",
        "contiguous_gradients must be true or false",
        "optimizer: not for this file",
        "fp16 must be a section",
        "sparse_attention: unknown key",
    ):
        assert expected in text, expected
    assert text.count("mine.json") == 8
    found = "\n".join(map(str, check_deepspeed(resolved(path))))
    assert found.count("mine.json") == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a DeepSpeed config"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "twice"),
        ('{"zero_optimization": {"stage": "auto"}}', "stage cannot be auto"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "needs ZeRO stage 3"),
        ('{"bf16": {"check_grad_overflow": false}}', "always left out"),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}',
            "whole optimizer",
        ),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "nvme_path is required"),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}', "must divide the number of GPUs"),
        ('{"data_types": {"grad_accum_dtype": "fp32"}}', "needs ZeRO stage 1"),
        ('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}', "would make checkpoints wrong"),
    ],
)
def test_what_deepspeed_would_meet_later_is_refused_now(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problems_of(own(tmp_path, text))


def test_a_short_config_of_ones_own_is_completed(tmp_path: Path) -> None:
    path = own(tmp_path, {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}})
    filled = fill_deepspeed(resolved(path), world_size=4)
    assert filled["train_batch_size"] == 32 and filled["gradient_accumulation_steps"] == 4
    assert filled["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False}
    assert filled["zero_allow_untested_optimizer"] is True


def test_an_unresolved_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="deepspeed is still auto"):
        fill_deepspeed(load_config(["quickstart"]).config, 1)
