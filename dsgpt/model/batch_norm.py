"""Batch normalisation for language models: over the valid tokens of a micro-step, on all ranks.

    BatchNorm(size, eps)(x, MicroStep(valid))

Statistics are measured over micro_batch_size_per_gpu x ranks x T tokens. They are averages over positions, so a token is
normalised with what later tokens contributed to: the training loss is flattered, evaluation and generation use running
statistics and are not. Trade-off: two small reductions over the ranks in each forward pass and one in each backward pass,
where torch's SyncBatchNorm has one each, because it cannot leave tokens out and stores nothing for recomputation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Statistics(NamedTuple):
    """Of one batch norm in one micro-step: mean and 1 / sqrt(variance + eps), (C,) in fp32; the number of valid tokens."""

    mean: Tensor
    inverse_std: Tensor
    count: Tensor


@dataclass
class MicroStep:
    """What batch norms share in one forward pass: which tokens (B, T) are valid (None: all), and what they measured.

    A block that is recomputed in the backward pass finds its statistics here, so it measures nothing a second time.
    """

    valid: Tensor | None
    statistics: dict[nn.Module, Statistics] = field(default_factory=dict)


class _BatchNormalise(torch.autograd.Function):
    """(x - mean) * inverse_std, differentiated through mean and variance too (Ioffe and Szegedy 2015, section 3)."""

    @staticmethod
    def forward(ctx, x: Tensor, statistics: Statistics, valid: Tensor | None, sum_over_ranks: Callable) -> Tensor:
        ctx.save_for_backward(x, *statistics, valid)
        ctx.sum_over_ranks = sum_over_ranks
        return ((x.float() - statistics.mean) * statistics.inverse_std).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, mean, inverse_std, count, valid = ctx.saved_tensors
        normed, grad = (x.float() - mean) * inverse_std, grad.float()
        sums = torch.stack((grad.sum((0, 1)), (grad * normed).sum((0, 1))))
        ctx.sum_over_ranks(sums)
        through_statistics = (sums[0] + normed * sums[1]) / count
        if valid is not None:
            through_statistics = through_statistics * valid[..., None]
        return ((grad - through_statistics) * inverse_std).to(x.dtype), None, None, None


class BatchNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy 2015, algorithm 1) over the valid tokens of a micro-step. (B, T, C) -> (B, T, C).

    In training every token is normalised with statistics that later tokens and other sequences contributed to, so the
    training loss flatters; evaluation and generation use the running statistics (momentum 0.1, unbiased variance, as
    torch.nn.BatchNorm1d has them). `sum_over_ranks` adds a tensor up over all ranks in place; set where there are several.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps, self.momentum = eps, 0.1
        self.weight = nn.Parameter(torch.ones(size))
        # Always there: without it every channel has mean 0, and no logit could say how frequent its token is.
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))
        self.sum_over_ranks: Callable[[Tensor], None] = lambda tensor: None

    def forward(self, x: Tensor, micro_step: MicroStep) -> Tensor:
        if self.training:
            if self not in micro_step.statistics:
                micro_step.statistics[self] = self._measure(x, micro_step.valid)
            normed = _BatchNormalise.apply(x, micro_step.statistics[self], micro_step.valid, self.sum_over_ranks)
        else:
            inverse_std = torch.rsqrt(self.running_var + self.eps)
            normed = ((x.float() - self.running_mean) * inverse_std).to(x.dtype)
        return self.weight * normed + self.bias

    @torch.no_grad()
    def _measure(self, x: Tensor, valid: Tensor | None) -> Statistics:
        """Statistics over all ranks, in two passes because the one-pass formula cancels; updates the running ones."""
        weights = torch.ones(x.shape[:2], device=x.device) if valid is None else valid.float()
        total = torch.cat(((x.float() * weights[..., None]).sum((0, 1)), weights.sum()[None]))
        self.sum_over_ranks(total)
        count = total[-1].clamp(min=1)
        mean = total[:-1] / count
        squares = ((x.float() - mean).square() * weights[..., None]).sum((0, 1))
        self.sum_over_ranks(squares)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(squares / (count - 1).clamp(min=1), self.momentum)
        return Statistics(mean, torch.rsqrt(squares / count + self.eps), count)
