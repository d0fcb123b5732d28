"""Checkpoints that DeepSpeed itself writes, of transformers' models on real ranks, and what their tensors were.

`save_on_ranks` trains a tiny model with torch's AdamW in two groups and calls DeepSpeed's own save_checkpoint; it returns the
live fp32 tensors as DeepSpeed's own functions gather them, by the model's own names: the oracle of the import.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import torch

from dsgpt.config import Dropout, ModelConfig
from dsgpt.model.gpt import GPT
from dsgpt.model.hf_format import hf_config

BATCH_NORM = ModelConfig(
    hidden_size=30, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5, head_dim=6, intermediate_size=44,
    vocab_size=101, max_position_embeddings=32, norm="batchnorm", dropout=Dropout(),
)  # fmt: skip
WORLD, STEPS, VOCABULARY, LENGTH = 2, 3, 101, 16


def transformers_model(kind, vocabulary=VOCABULARY):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    if kind == "dsgpt":  # no Hugging Face architecture holds it, and it has buffers
        return GPT(BATCH_NORM)
    if kind == "gpt2":
        sizes = {"n_embd": 36, "n_layer": 2, "n_head": 3, "vocab_size": vocabulary, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    else:
        sizes = {"hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 5,
                 "num_key_value_heads": 5, "vocab_size": vocabulary, "max_position_embeddings": 32}  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)  # no two alike, norms and biases too
    return model


def batch(step, rank):
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(100 * step + rank))
    return {"input_ids": ids, "labels": ids}


def deepspeed_config(stage, dtype, **zero):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **zero},
    }
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 500
    if dtype == "fp16":  # a scale that grows within the first steps
        config["fp16"] = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2, "hysteresis": 1}
    elif dtype == "bf16_sums":  # what makes DeepSpeed take another optimizer class at stage 1
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif dtype == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}
    return config


def adamw(model, groups=2):
    parameters = [p for p in model.parameters() if p.requires_grad]
    dimensions = [len(getattr(p, "ds_shape", p.shape)) for p in parameters]
    decayed = [p for p, size in zip(parameters, dimensions, strict=True) if size >= 2]
    plain = [p for p, size in zip(parameters, dimensions, strict=True) if size < 2]
    divided = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(divided if groups == 2 else parameters, lr=1e-2)


def live_state(engine):
    """name -> (fp32 weight, exp_avg, exp_avg_sq), gathered by DeepSpeed; frozen ones as they are."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, found = engine.optimizer, {}
    inner = getattr(optimizer, "optimizer", optimizer)
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # Linked after the first group's step, when the second had no state yet, and never again.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            found[name] = (p.detach(),)
        elif engine.zero_optimization_stage():
            states = [safe_get_full_optimizer_state(p, kind) for kind in ("exp_avg", "exp_avg_sq")]
            found[name] = (safe_get_full_fp32_param(p), *states)
        else:
            master = p
            if hasattr(optimizer, "fp32_groups"):
                pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
                master = next(master for working, master in pairs if working is p)
            found[name] = (master.detach(), inner.state[master]["exp_avg"], inner.state[master]["exp_avg_sq"])
    return {name: tuple(t.clone().float() for t in values) for name, values in found.items()}


def save_on_ranks(
    world, folder, kind, stage, dtype, freeze="", zero=None, optimizer="adamw", steps=STEPS, vocabulary=VOCABULARY
):
    import deepspeed

    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # it computes in fp16, only without fast kernels
    model = transformers_model(kind, vocabulary)
    if freeze:
        model.get_parameter(freeze).requires_grad_(False)
    chosen = adamw(model) if optimizer == "adamw" else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=chosen, config=deepspeed_config(stage, dtype, **(zero or {})), dist_init_required=False
    )
    for step in range(steps):
        loss = engine(**batch(step, world.rank))
        engine.backward(loss / 100 if kind == "dsgpt" else loss.loss)  # ours is a sum
        engine.step()
    engine.save_checkpoint(str(folder))
    if world.is_main:
        if kind == "dsgpt":
            Path(folder, "config.json").write_text(json.dumps(hf_config(BATCH_NORM, None, None)))
            torch.save(dict(engine.module.named_buffers()), Path(folder, "buffers"))
        else:
            model.config.save_pretrained(folder)
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if not p.requires_grad]):
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        adam_steps = {int(one["step"]) for one in inner.state.values() if "step" in one}  # stage 0 in bf16 begins at 1
        return live_state(engine) if optimizer == "adamw" and steps else {}, adam_steps


def native_state(kind, saved):
    """The saved tensors as dsgpt names and lays them out, written out by hand."""
    if kind == "dsgpt":
        return saved
    names = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
    result = {}
    for name, values in saved.items():
        parts = name.split(".")
        if kind == "gpt2":
            if name == "transformer.wte.weight":
                result["embed_tokens.weight"] = values
            elif name == "transformer.wpe.weight":
                result["embed_positions.weight"] = values
            elif parts[1] == "ln_f":
                result[f"norm.{parts[-1]}"] = values
            else:
                block, leaf = f"blocks.{parts[2]}", parts[-1]
                turned = tuple(v.t() if v.dim() == 2 else v for v in values)
                if "c_attn" in parts:
                    for i, one in enumerate("qkv"):
                        result[f"{block}.attention.{one}_proj.{leaf}"] = tuple(v.chunk(3)[i] for v in turned)
                else:
                    to = {"ln_1": "attention_norm", "ln_2": "mlp_norm", "c_fc": "mlp.up_proj"}.get(parts[-2])
                    to = to or ("attention.o_proj" if parts[3] == "attn" else "mlp.down_proj")
                    result[f"{block}.{to}.{leaf}"] = turned
        elif parts[0] == "lm_head" or parts[1] in ("embed_tokens", "norm"):
            result[name.removeprefix("model.")] = values
        else:
            to = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}.get(parts[3])
            to = to or (f"mlp.{names[parts[4]]}" if parts[3] == "mlp" else f"attention.{parts[4]}")
            result[f"blocks.{parts[2]}.{to}.weight"] = values
    return result
