"""Torch's own optimizers, and the learning rate as a pure function of the step.

Nothing about the schedule is carried in a checkpoint: step 1,000 has the same learning rate in an uninterrupted run and
in one resumed ten times. Torch's fused AdamW is used rather than DeepSpeed's, so that nothing is compiled at first use.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping

import torch
from torch import nn

from dsgpt.config.fine_tuning import Trained
from dsgpt.config.schema import OptimizerSection


def learning_rate(config: OptimizerSection, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of `max_steps`.

    Linear warm-up over `warmup_steps`, reaching the peak at step == warmup_steps, then towards `min_learning_rate`:
    cosine (Loshchilov and Hutter 2017, eq. 5), linear, polynomial of `power`, inverse square root (Vaswani et al. 2017,
    section 5.3, scaled to the peak), constant, or warmup-stable-decay (Hu et al. 2024: constant, then linear over the
    last `decay_steps`). The last step, max_steps - 1, is the first to have the minimum.
    """
    peak, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return peak
    if config.lr_schedule == "inverse_sqrt":
        return max(low, peak * math.sqrt(max(config.warmup_steps, 1) / max(step, 1)))
    start = config.warmup_steps
    if config.lr_schedule == "warmup_stable_decay":
        decay = config.decay_steps if config.decay_steps is not None else max(1, max_steps // 10)
        start = max(start, max_steps - 1 - decay)
    progress = min(1.0, max(0.0, (step - start) / max(1, max_steps - 1 - start)))
    if config.lr_schedule == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    power = config.power if config.lr_schedule == "polynomial" else 1.0
    return low + (peak - low) * (1 - progress) ** power


def build_optimizer(
    model: nn.Module, config: OptimizerSection, plan: Mapping[str, Trained | None] | None = None
) -> torch.optim.Optimizer:
    """AdamW or SGD over groups of trained parameters: matrices and embeddings decay, biases and norm weights do not.

    The split is by name and shape under ZeRO-3 too, where a partitioned parameter keeps its shape in `ds_shape`. `plan`
    further divides by the factor on the learning rate (the group's learning_rate_scale), and by when training of a
    parameter began, because the optimizer counts the steps of a group.
    """
    groups: dict[tuple[int, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained = (plan or {}).get(name) or Trained(0, 1.0)
            is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            groups.setdefault((trained.stage, -trained.scale, is_vector), []).append(parameter)
    described = [
        {"params": params, "weight_decay": 0.0 if is_vector else config.weight_decay, "learning_rate_scale": -scale}
        for (_, scale, is_vector), params in sorted(groups.items(), key=lambda entry: entry[0])
    ]
    _keep_compiler_out()
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        optimizer = torch.optim.SGD(described, lr=config.learning_rate, momentum=config.momentum)
    else:
        betas = tuple(config.betas)
        optimizer = torch.optim.AdamW(described, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)
    plain_step = inspect.unwrap(type(optimizer).step)
    optimizer.step = torch.no_grad()(functools.partial(plain_step, optimizer))
    return optimizer


def _keep_compiler_out() -> None:
    """Torch's optimizers ask its compiler to leave some methods alone, and import it for that: 85 MB on every rank.

    Nothing is compiled here, so what the decorator would look up is put there: the method itself. `step` is decorated in
    another way; `build_optimizer` takes it without. A torch that does this differently imports its compiler again.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None:
            method.__dynamo_disable = method
