"""Gradients written by hand against autograd on the plain formulas, and what they keep between forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsgpt.model.functional import IGNORE_INDEX, chunked_cross_entropy, rms_norm, rotate, swiglu


def plain_rms_norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


ANGLES = torch.rand(3, 1, 5, 8, generator=torch.Generator().manual_seed(2)).repeat(1, 1, 1, 2) * 6


def plain_rotate(x):
    first, second = x.chunk(2, dim=-1)
    return x * ANGLES.cos() + torch.cat((-second, first), dim=-1) * ANGLES.sin()


def plain_swiglu(gate, up):
    return F.silu(gate) * up


FORMULAS = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, 1e-5), plain_rms_norm, [(3, 5, 16), (16,)], 1.1),
    "rotate": (
        lambda x: rotate(x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)),
        plain_rotate,
        [(3, 2, 5, 16)],
        1.0,
    ),
    "swiglu": (swiglu, plain_swiglu, [(3, 5, 16), (3, 5, 16)], 2.0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_are_those_of_the_plain_formula_and_less_is_kept(name):
    ours, plain, shapes, kept = FORMULAS[name]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(shape, generator=generator) * 2 for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator)
    results, saved = [], []
    for formula in (ours, plain):
        leaves, numel = [value.clone().requires_grad_() for value in inputs], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=numel: n.append(t.numel()) or t, lambda t: t):
            y = formula(*leaves)
        (y * weights).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        saved.append(sum(numel))
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()
    assert saved[0] <= saved[1] and saved[0] <= kept * inputs[0].numel() + 16


@pytest.mark.parametrize("name", FORMULAS)
def test_half_precision_is_as_near_to_the_truth_as_the_plain_formula_in_fp32_rounded_once(name):
    ours, plain, shapes, _ = FORMULAS[name]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    low, high = (
        [value.detach().to(dtype, copy=True).requires_grad_() for value in inputs]
        for dtype in (torch.bfloat16, torch.float32)
    )
    ours(*low).sum().backward()
    plain(*high).sum().backward()
    for mine, theirs in zip(low, high, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad.float() - theirs.grad).norm() < 1e-2 * theirs.grad.norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation returned, in the forward and the backward pass."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if torch.is_tensor(value):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("tokens", [100, 2000])
def test_the_loss_and_its_gradients_are_those_of_the_plain_formula_and_no_logits_are_held(tokens):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(tokens, 64, generator=generator)
    weight = torch.randn(5000, 64, generator=generator) * 0.3
    labels = torch.randint(5000, (tokens,), generator=generator)
    labels[::7] = IGNORE_INDEX

    def run(loss_of):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with LargestTensor() as largest:
            loss = loss_of(h, w)
            (loss / tokens).backward()
        return loss.detach(), h.grad, w.grad, largest.numel

    *ours, held = run(lambda h, w: chunked_cross_entropy(h, w, labels))
    *plain, logits = run(lambda h, w: F.cross_entropy(h @ w.t(), labels, ignore_index=-100, reduction="sum"))
    assert logits == tokens * 5000 and held <= max(logits // 4, weight.numel())
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-6


def test_a_micro_batch_without_targets_has_no_loss_and_gradients_of_zero():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.full((6,), IGNORE_INDEX))
    loss.backward()
    assert float(loss) == 0 and not hidden.grad.any() and not weight.grad.any()


def test_gradients_of_the_loss_survive_fp16_until_the_loss_scale_comes():
    """4000 tokens that are all one word: its summed gradient is too large for fp16, and the divided one is not."""
    hidden, weight = torch.full((4000, 8), 40.0).half(), torch.zeros(50, 8).half()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, torch.full((4000,), 7))
    (loss * (16 / 4000)).backward()
    assert weight.grad[7].float() == pytest.approx(torch.full((8,), -40.0 * (1 - 1 / 50) * 16), rel=2e-3)
