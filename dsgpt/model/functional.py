"""The formulas of the GPT that have a gradient written by hand, because autograd would keep more than they need.

    rms_norm(x, weight, eps); rotate(x, cos, sin); swiglu(gate, up); chunked_cross_entropy(hidden, weight, labels)

What autograd keeps of these between forward and backward is a third of a block's activations and all of the logits. Trade-off:
a few elementwise operations are repeated in the backward pass, which costs less than fetching their results from memory.
tests/model/test_functional.py compares each with autograd on the plain formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
# Relative differences between two ways of the same mathematics: rounding, not another result.
MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
# Elements of one chunk of logits: 128 MiB in fp32 keeps a GPU's matrix units busy, 8 MiB stays near a CPU's cache.
_LOGIT_CHUNK_ELEMENTS = {"cuda": 1 << 25, "cpu": 1 << 21}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, eq. 4), statistics in fp32. (..., C) -> (..., C)."""
    if x.is_cuda or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)  # one fused kernel, which keeps as little as ours
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse_rms = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return weight * (x.float() * inverse_rms).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, inverse_rms = ctx.saved_tensors
        normed, grad = x.float() * inverse_rms, grad.float()
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / x.shape[-1]
        grad_x = grad.sub_(normed.mul_(along)).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34) applied to (B, H, T, D), with cosines and sines (B, 1, T, D).

    The two halves of D form the rotated pairs, as in Hugging Face's Llama; so do the two halves of `cos` and `sin`, which
    are equal.
    """
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin, 1)


class _Rotate(torch.autograd.Function):
    """A rotation by the opposite angle is its own gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    (first, second), half = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)[0]
    y = x * cos
    y_first, y_second = y.chunk(2, dim=-1)
    y_first.addcmul_(second, half, value=-sign)
    y_second.addcmul_(first, half, value=sign)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, eq. 6), elementwise."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs, not silu(gate)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def find_targets(labels: Tensor) -> Tensor | None:
    """Where `labels`, of any shape, are not -100, through all rows; None where they are everywhere.

    Nothing after the last attention has to be computed but for these: of chats, a third of the positions. On a GPU it is
    None: counting them would wait for it.
    """
    if labels.device.type != "cpu":
        return None
    targets = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    return None if len(targets) == labels.numel() else targets


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """Sum of the cross-entropy of `hidden @ weight.T`, a scalar in fp32, without ever holding (tokens, V) at once.

    `hidden` is (tokens, C), `weight` (V, C), `labels` (tokens,); labels of -100 count for nothing. Logits have `bias` (V,)
    added, are multiplied by `scale`, and with `softcap` c become c tanh(logits / c) (Gemma 2, section 2).
    """
    if (targets := find_targets(labels)) is not None:
        hidden, labels = hidden.index_select(0, targets), labels[targets]
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, bias, scale, softcap)


def _rows_per_chunk(hidden: Tensor, weight: Tensor) -> int:
    """How many tokens' logits exist at one time: what a chunk holds, and never more than a quarter of all."""
    elements = _LOGIT_CHUNK_ELEMENTS["cpu" if hidden.device.type == "cpu" else "cuda"]
    return max(1, min(elements // weight.shape[0], -(-hidden.shape[0] // 4)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are computed chunk by chunk together with the loss, so nothing is recomputed in the backward pass and the
    weight is not needed there (under ZeRO-3 it is gathered once less). Memory: one chunk of logits plus the gradients,
    which wait in fp32 under fp16, because the loss scale that keeps them in its range comes only in the backward pass.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, scale: float, softcap: float
    ) -> Tensor:
        rows = _rows_per_chunk(hidden, weight)
        for_hidden, for_weight, _, for_bias, *_ = ctx.needs_input_grad
        needs_grad = for_hidden or for_weight or for_bias
        ctx.dtype = hidden.dtype
        waiting = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = torch.empty_like(hidden, dtype=waiting) if for_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if for_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if for_bias else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], labels[start : start + rows]
            valid = target != IGNORE_INDEX
            index = target.clamp(min=0)[:, None]
            logits = F.linear(chunk, weight, bias).float()
            logits = logits if scale == 1 else logits.mul_(scale)
            capped = torch.tanh_(logits.div_(softcap)) if softcap else None
            log_probs = F.log_softmax(logits if capped is None else capped * softcap, dim=-1)
            picked = log_probs.gather(1, index)
            loss -= torch.where(valid, picked[:, 0], 0.0).sum()
            if not needs_grad:
                continue
            grad_logits = log_probs.exp_().scatter_add_(1, index, -torch.ones_like(picked)).mul_(valid[:, None])
            grad_logits = grad_logits if capped is None else grad_logits.mul_(1 - capped.square_())
            grad_logits = (grad_logits if scale == 1 else grad_logits.mul_(scale)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = grad_logits @ weight
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
            if grad_weight is not None and grad_logits.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), chunk)  # without a second (V, C)
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ chunk
        if needs_grad:
            found = (grad_hidden, grad_weight, grad_bias)
            ctx.save_for_backward(*(None if grad is None else grad.to(waiting) for grad in found))
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        # The buffers belong to this node alone and are used once: scale them in place.
        hidden, weight, bias = (
            None if grad is None else grad.mul_(grad_output).to(ctx.dtype) for grad in ctx.saved_tensors
        )
        return hidden, weight, None, bias, None, None
