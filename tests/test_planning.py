"""Parameter counts, FLOPs and `auto`, against published numbers, transformers' models and torch's FLOP counter."""

from __future__ import annotations

from typing import Any

import pytest

from dsgpt.config import ModelConfig, ModelSection, RunConfig, fill_deepspeed, load_config, shipped_configs
from dsgpt.config.fine_tuning import FineTuningSection
from dsgpt.errors import ConfigError
from dsgpt.planning import (
    activation_bytes,
    flops_per_token,
    parameter_count,
    resolve_auto,
    state_bytes,
    trained_part,
)

GIB = 1 << 30

# Published (GPT-2, Llama 3), or by hand from the shapes of GPT-3's table 2.1 with V = 50257 and P = 2048:
# V h + P h + L (12 h^2 + 13 h) + 2 h. Quickstart: V h + L (4 h^2 + 3 h i + 2 h) + h with V = 4096 here, i = 384.
COUNTS = {
    "gpt2-124m": 124_439_808,
    "llama-8b": 8_030_261_248,
    "gpt-350m": (50257 + 2048) * 1024 + 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024,
    "gpt-1.3b": (50257 + 2048) * 2048 + 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048,
    "gpt-6.7b": (50257 + 2048) * 4096 + 32 * (12 * 4096**2 + 13 * 4096) + 2 * 4096,
    "quickstart": 4096 * 128 + 4 * (4 * 128**2 + 3 * 128 * 384 + 2 * 128) + 128,
}


def shape(config: RunConfig) -> ModelConfig:
    return config.model.resolved(vocab_size=4096, seq_length=config.training.seq_length)


def tiny(**keys: object) -> ModelConfig:
    section = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, **keys}
    return ModelSection.model_validate(section).resolved(vocab_size=101, seq_length=32)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_shipped_model_has_the_published_number_of_parameters(name: str) -> None:
    config = load_config([name]).config
    assert parameter_count(shape(config)) == COUNTS[name]
    stated = shipped_configs()[name].read_text().split("\n\n")[0]
    assert f"{COUNTS[name]:,} parameters" in stated or name == "quickstart"


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-biased-untied", "qwen3"])
def test_tiny_models_have_as_many_parameters_as_transformers_builds(family: str) -> None:
    import transformers

    llama = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 100,
        "vocab_size": 101,
        "max_position_embeddings": 32,
    }
    ours = {"num_key_value_heads": 2, "intermediate_size": 100}
    if family == "gpt2":
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=101, n_positions=32)
        )
        model = tiny(position_embedding="learned", norm="layernorm", activation="gelu", bias=True)
    elif family == "llama":
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, tie_word_embeddings=True))
        model = tiny(**ours)
    elif family == "llama-biased-untied":
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**llama, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
        )
        model = tiny(**ours, tie_word_embeddings=False, bias=True)
    else:
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**llama, head_dim=20, tie_word_embeddings=True))
        model = tiny(**ours, head_dim=20, qk_norm=True)
    assert parameter_count(model) == sum(parameter.numel() for parameter in theirs.parameters())


def test_flops_agree_with_torchs_counter_on_a_real_forward_and_backward() -> None:
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.arange(64)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    ours = ModelSection(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128
    ).resolved(256, 64)
    assert counter.get_total_flops() / 64 == pytest.approx(flops_per_token(ours, 64), rel=0.01)


def test_flops_of_llama_8b_are_the_published_ones() -> None:
    model = shape(load_config(["llama-8b"]).config)
    assert flops_per_token(model, 8192) == pytest.approx(57.91e9, rel=1e-3)
    assert flops_per_token(model, 8192, "causal") == pytest.approx(51.47e9, rel=1e-3)


def test_auto_on_a_cpu() -> None:
    config, notes = resolve_auto(load_config(["quickstart"]).config, world_size=2, device="cpu")
    assert (config.training.dtype, config.training.micro_batch_size_per_gpu, config.deepspeed) == ("fp32", 8, "zero1")
    assert config.training.gradient_accumulation_steps(2) == 1
    assert [note.split(" =")[0] for note in notes] == [
        "training.dtype",
        "deepspeed",
        "training.micro_batch_size_per_gpu",
    ]


@pytest.mark.parametrize("world_size", [1, 2, 8, 16])
@pytest.mark.parametrize("memory", [16, 24, 80, 141, None])
@pytest.mark.parametrize("name", ["gpt2-124m", "gpt-1.3b", "llama-8b"])
def test_auto_leaves_nothing_open_and_never_changes_the_global_batch(
    name: str, memory: int | None, world_size: int
) -> None:
    before = load_config([name]).config
    size = None if memory is None else memory * GIB
    after, notes = resolve_auto(before, world_size=world_size, device="cuda", gpu_memory_bytes=size)
    assert "auto" not in (after.deepspeed, *after.training.model_dump().values())
    assert after.training.global_batch_size == before.training.global_batch_size
    filled = fill_deepspeed(after, world_size)
    assert filled["train_batch_size"] == before.training.global_batch_size
    changed = {key for key in before.model_dump() if getattr(before, key) != getattr(after, key)}
    assert changed <= {"training", "deepspeed"}
    if size is not None and not any("nothing fits" in note or "not even" in note for note in notes):
        micro = after.training.micro_batch_size_per_gpu
        state = state_bytes(shape(after), after.deepspeed, world_size)
        policy, length = after.training.activation_checkpointing, after.training.seq_length
        assert state + activation_bytes(shape(after), length, micro, policy, "bf16") < size


def test_auto_keeps_what_is_set() -> None:
    overrides = [
        "training.dtype=fp32",
        "training.micro_batch_size_per_gpu=4",
        "deepspeed=zero3",
        "training.activation_checkpointing=full",
    ]
    before = load_config(["gpt2-124m"], overrides).config
    after, notes = resolve_auto(before, world_size=2, device="cuda", gpu_memory_bytes=80 * GIB)
    assert after == before and notes == []


def test_old_gpus_get_fp16_and_small_ones_get_more_partitioning() -> None:
    config = load_config(["gpt-6.7b"]).config
    assert resolve_auto(config, world_size=8, device="cuda", bf16=False)[0].training.dtype == "fp16"
    chosen = [
        resolve_auto(config, world_size=8, device="cuda", gpu_memory_bytes=size * GIB)[0].deepspeed
        for size in (141, 80, 40, 16)
    ]
    order = ["zero1", "zero2", "zero3", "zero3_offload"]
    assert [order.index(name) for name in chosen] == sorted(order.index(name) for name in chosen)
    assert chosen[0] != chosen[-1]


def test_a_world_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        resolve_auto(load_config(["quickstart"]).config, world_size=3, device="cpu")


def test_pretrained_weights_of_unknown_shape_get_the_safe_choice() -> None:
    config = load_config(["llama-8b"], ["model.init_from=hf:somewhere"]).config
    config = config.model_copy(update={"model": ModelSection(init_from="hf:somewhere")})
    after, _ = resolve_auto(config, world_size=4, device="cuda", gpu_memory_bytes=80 * GIB)
    assert (after.deepspeed, after.training.micro_batch_size_per_gpu) == ("zero3", 1)


@pytest.mark.parametrize(
    ("deepspeed", "per_parameter"), [("zero0", 16), ("zero1", 20), ("zero2", 20), ("zero3", 18), ("zero3_offload", 0)]
)
def test_state_on_one_gpu_costs_what_deepspeeds_estimators_say(deepspeed: str, per_parameter: int) -> None:
    model = shape(load_config(["gpt-6.7b"]).config)
    buffers = 0 if deepspeed == "zero0" else 4 * 50_000_000 * 4
    largest = 4 * max(50257 * 4096, 12 * 4096**2 + 13 * 4096) if "3" in deepspeed else 0
    assert state_bytes(model, deepspeed, 1) == per_parameter * COUNTS["gpt-6.7b"] + buffers + largest


def test_recomputing_more_keeps_less() -> None:
    model = shape(load_config(["llama-8b"]).config)
    kept = [activation_bytes(model, 8192, 1, policy, "bf16") for policy in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2]
    assert kept[0] < activation_bytes(model, 8192, 2, "none", "bf16") <= 2 * kept[0]
    # Full recomputation keeps one input of width h in bf16 per layer and token.
    assert kept[2] > 8192 * 32 * 4096 * 2


PARTS = {
    "all": {},
    "last": {"train": "last_blocks", "num_last_blocks": 2},
    "last and embeddings": {"train": "last_blocks", "num_last_blocks": 2, "train_embeddings": True},
    "later more": {"train": "last_blocks", "num_last_blocks": 1, "unfreeze_at": {3: 2}},
    "lora": {"train": "lora", "lora": {"rank": 3}},
    "lora of some": {
        "train": "lora",
        "lora": {"rank": 3, "target_modules": ["q_proj", "v_proj", "*.attention.o_proj"]},
    },
    "dora": {"train": "lora", "lora": {"rank": 3, "use_dora": True}},
}


def real_model(model: ModelConfig, settings: FineTuningSection):
    """(the model frozen as a run freezes it after the last unfreezing, the lowest block that gradients pass through)."""
    from dsgpt.model.gpt import GPT
    from dsgpt.model.lora import add_adapters
    from dsgpt.model.trainable import Parts, first_trained_block, freeze, plan_training

    module = GPT(model)
    if settings.train == "lora":
        add_adapters(module, settings.lora, "blocks.")
    parts = Parts.of(module, model.num_hidden_layers)
    blocks = settings.num_last_blocks
    plan = plan_training([name for name, _ in module.named_parameters()], settings, parts, blocks, step=100)
    freeze(module, plan)
    return module, first_trained_block(plan, parts)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_the_part_that_is_planned_is_the_part_that_is_trained(name: str, tied: bool) -> None:
    settings = FineTuningSection.model_validate(PARTS[name])
    model = tiny(num_key_value_heads=2, intermediate_size=100, tie_word_embeddings=tied, norm="layernorm", bias=True)
    part = trained_part(model, settings)
    module, lowest = real_model(model, settings)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert part.parameters == trained
    assert part.added == sum(p.numel() for p in module.parameters()) - parameter_count(model)
    assert part.blocks == model.num_hidden_layers - lowest


def test_what_only_names_or_a_measurement_tell_is_planned_as_everything() -> None:
    model = tiny()
    everything = trained_part(model, FineTuningSection())
    for changes in (
        {"train": "patterns", "patterns": ["*.mlp.*"]},
        {"train": "last_blocks", "num_last_blocks": "auto"},
        {"train": "last_blocks", "unfreeze_at": {5: "all"}},
    ):
        assert trained_part(model, FineTuningSection.model_validate(changes)) == everything
    of_another_architecture = {"train": "lora", "lora": {"target_modules": ["c_attn"]}}
    all_layers = trained_part(model, FineTuningSection(train="lora"))
    assert trained_part(model, FineTuningSection.model_validate(of_another_architecture)) == all_layers


def test_auto_gives_a_run_that_trains_less_a_larger_micro_batch_or_less_partitioning() -> None:
    def chosen(train: Any) -> tuple[int, int]:
        config = load_config(["llama-8b"], ["training.activation_checkpointing=full"]).config
        config = config.model_copy(update={"fine_tuning": FineTuningSection(train=train)})
        found, _ = resolve_auto(config, world_size=2, device="cuda", gpu_memory_bytes=80 * GIB)
        stages = ["zero1", "zero2", "zero3", "zero3_offload"]
        return stages.index(found.deepspeed), -int(found.training.micro_batch_size_per_gpu)

    assert chosen("lora") < chosen("all")
    assert chosen("last_blocks") < chosen("all")


@pytest.mark.parametrize("name", ["last", "lora"])
def test_blocks_below_the_first_trained_one_keep_as_little_as_is_planned(name: str) -> None:
    import torch

    model = tiny(num_hidden_layers=6, hidden_size=64, tie_word_embeddings=False)
    ids = torch.arange(4 * 32).view(4, 32) % 101

    def kept(settings: FineTuningSection) -> int:
        module, _ = real_model(model, settings)
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        found: dict[int, int] = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            if value.untyped_storage().data_ptr() not in weights:
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = module(ids, labels=ids)
        assert loss.requires_grad
        return sum(found.values())

    settings = FineTuningSection.model_validate(PARTS[name])
    planned = [
        activation_bytes(model, 32, 4, "none", "fp32", trained_part(model, one))
        for one in (settings, FineTuningSection())
    ]
    real = [kept(one) for one in (settings, FineTuningSection())]
    assert planned[0] / planned[1] == pytest.approx(real[0] / real[1], abs=0.15)
    assert planned[0] >= real[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_state_that_freezing_saves_in_real_engines_is_planned_for(stage: int, write_run) -> None:
    """Gradients in flight are planned for too, so the plan is the larger one."""
    from tests.benchmarks import freeze
    from tests.pool import ranks

    sizes = {"hidden_size": 32, "num_attention_heads": 2}
    batch = {"seq_length": freeze.LENGTH, "global_batch_size": freeze.GLOBAL, "micro_batch_size_per_gpu": freeze.MICRO}
    yaml = write_run(model={**freeze.MODEL, **sizes}, training={**batch, "max_steps": 10}, deepspeed=f"zero{stage}")
    model = load_config([yaml]).config.model.resolved(0, freeze.LENGTH)
    for _, (everything, part) in ranks(2).run(freeze.measure, yaml, 0, 1):
        real = sum(everything) - sum(part)
        settings = FineTuningSection(train="last_blocks", num_last_blocks=2)
        planned = [
            state_bytes(model, f"zero{stage}", 2, "fp32", trained_part(model, one))
            for one in (FineTuningSection(), settings)
        ]
        assert 1 <= (planned[0] - planned[1]) / real <= 1.8
