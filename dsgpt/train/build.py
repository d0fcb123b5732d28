"""From a resolved run to an engine: the model, which of its parameters are trained, the optimizer's groups, DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsgpt.config import HFModelConfig
from dsgpt.config.fine_tuning import Trained
from dsgpt.distributed import World
from dsgpt.engine import Engine, construct, gather_for, give_values, keep_partitions_out_of_recomputation
from dsgpt.model.build import blocks_of, blocks_prefix, build_model, import_what_builds
from dsgpt.model.lora import add_adapters, weights_used_outside
from dsgpt.model.recompute import apply_activation_checkpointing
from dsgpt.model.trainable import Parts, first_trained_block, freeze, plan_training, table
from dsgpt.optimizer import build_optimizer
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.state import RunLog
from dsgpt.train.step import largest_micro_batch
from dsgpt.units import format_bytes

if TYPE_CHECKING:
    from dsgpt.train.loop import Run


def build_engine(plan: ResolvedRun, world: World, log: RunLog, step: int, num_last_blocks: int) -> Engine:
    """The engine that trains from optimizer step `step` on. Raises ConfigError for names that fit nothing."""
    config = plan.config
    settings = config.fine_tuning
    import_what_builds(plan.model, adapters=settings.train == "lora")
    torch.manual_seed(config.run.seed)
    model = construct(lambda: _adapted(plan), plan.deepspeed, _constants(plan))
    if isinstance(plan.model, HFModelConfig):
        give_values(model)
    for layer, parameter in weights_used_outside(model):
        gather_for(layer, parameter)
    parts = Parts.of(model, plan.model.num_hidden_layers)
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    trained = plan_training(list(shapes), settings, parts, num_last_blocks, step)
    freeze(model, trained)
    if config.model.init_from != "scratch" or len({one.scale for one in trained.values() if one}) > 1:
        log.event("trained_parameters", table(trained, shapes, parts), **_counts(trained, shapes))
    if config.training.activation_checkpointing == "selective":
        keep_partitions_out_of_recomputation()
    blocks = blocks_of(model, parts.prefix)[first_trained_block(trained, parts) :]
    apply_activation_checkpointing(blocks, config.training.activation_checkpointing)
    if settings.neftune_alpha:
        _add_noise(model, settings.neftune_alpha)
    return Engine(model, build_optimizer(model, config.optimizer, trained), plan.deepspeed, world)


def rehearse(run: Run) -> None:
    """Run the largest step there can be once, before anything is read into the engine."""
    training = run.plan.config.training
    run.enter("rehearse", 3)
    run.log.event("rehearsing", "running the largest possible step once, to see that it fits")
    batch = largest_micro_batch(
        run.plan.model.vocab_size, training.seq_length, training.micro_batch_size_per_gpu, run.world.device
    )
    run.engine.rehearse(batch)
    peak = run.world.max(run.engine.peak_memory_bytes())[0]
    run.log.event("rehearsed", f"it fits: peak memory {format_bytes(peak)} per rank", peak_memory_bytes=peak)


def _adapted(plan: ResolvedRun) -> nn.Module:
    model, settings = build_model(plan.model), plan.config.fine_tuning
    if isinstance(plan.model, HFModelConfig) and plan.config.model.attention != "auto":
        from dsgpt.model.hf import choose_attention

        choose_attention(model, plan.config.model.attention)
    if settings.train == "lora":
        names = [name for name, _ in model.named_parameters()]
        add_adapters(model, settings.lora, blocks_prefix(names, plan.model.num_hidden_layers))
    return model


def _constants(plan: ResolvedRun) -> Callable[[], Mapping[str, Tensor]] | None:
    model = plan.model
    if not isinstance(model, HFModelConfig):
        return None
    from dsgpt.model.hf import constants

    return partial(constants, model)


def _counts(trained: Mapping[str, Trained | None], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    kept = sum(size for name, size in sizes.items() if trained[name])
    return {"trained": kept, "frozen": sum(sizes.values()) - kept}


def _add_noise(model: nn.Module, alpha: float) -> None:
    """NEFTune: uniform noise of strength alpha / sqrt(T C) on the embeddings (B, T, C), in training only (Jain et al. 2023,
    algorithm 1). Drawn from the micro-step's seed, as dropout is."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not module.training:
            return output
        strength = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + torch.empty_like(output).uniform_(-strength, strength)

    next(one for one in model.modules() if isinstance(one, nn.Embedding)).register_forward_hook(add)


def late_steps(run: Run) -> dict[str, int]:
    """How many steps the optimizer has taken of each parameter that was unfrozen."""
    if not run.unfrozen:
        return {}
    names = [*run.engine.parameter_shapes(), *run.engine.frozen_shapes()]
    parts = Parts.of(run.engine.module, run.plan.model.num_hidden_layers)
    plan = plan_training(names, run.plan.config.fine_tuning, parts, run.num_last_blocks or 1, run.state.step)
    steps = run.state.optimizer_steps
    return {name: steps - run.unfrozen[one.stage - 1] for name, one in plan.items() if one and one.stage}


def check_model(engine: Engine, plan: ResolvedRun) -> None:
    """Whenever weights of a model of transformers were read: that it computes what is expected of it (model/hf.py)."""
    if isinstance(plan.model, HFModelConfig):
        from dsgpt.model.hf import check_forward

        check_forward(engine.module, plan.model.vocab_size, engine.world.device, plan.config.data.document_mask)
