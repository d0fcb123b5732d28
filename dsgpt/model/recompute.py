"""Activation checkpointing, applied to a model from outside.

Non-reentrant, so frozen first blocks still get gradients where they need them. Trade-off: selective recomputation keeps
the results of matrix products and attention and recomputes the cheap rest; full recomputation keeps block inputs only,
which costs a third more arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Kept by selective checkpointing: the results of matrix products and attention, which cost most to recompute.
_EXPENSIVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_expensive(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(blocks: Iterable[nn.Module], mode: str) -> None:
    """Recompute each block's activations in the backward pass: "full" all of them, "selective" all but products."""
    if mode == "none":
        return
    extra = {}
    if mode == "selective":
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive)
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, extra)


def _recomputed(forward: Callable[..., Tensor], extra: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, **extra)
