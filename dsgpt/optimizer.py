"""Torch's own optimizers, and the learning rate as a pure function of the step.

Nothing about the schedule is carried in a checkpoint: step 1,000 has the same learning rate in an uninterrupted run and
in one resumed ten times. Torch's fused AdamW is used rather than DeepSpeed's, so that nothing is compiled at first use.
"""

from __future__ import annotations

import functools
import inspect
import math

import torch
from torch import nn

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


def build_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups: matrices and embeddings decay, biases and norm weights do not.

    The split is by name and shape under ZeRO-3 too, where a partitioned parameter keeps its shape in `ds_shape`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
    plain = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if params
    ]
    _keep_compiler_out()
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    else:
        betas = tuple(config.betas)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)
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
