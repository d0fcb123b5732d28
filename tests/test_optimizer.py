"""Learning rates against values worked out by hand, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch

from dsgpt.config.schema import OptimizerSection
from dsgpt.model.gpt import GPT
from dsgpt.optimizer import build_optimizer, learning_rate
from tests.model.test_gpt import GPT2


def rates(max_steps=101, **settings):
    config = OptimizerSection(learning_rate=1.0, min_learning_rate=0.1, **settings)
    return [learning_rate(config, step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize(
    "schedule", ["constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay", "polynomial"]
)
def test_warmup_rises_linearly_and_reaches_the_peak_once(schedule):
    values = rates(lr_schedule=schedule, warmup_steps=4)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(values) == 1.0 and all(0 < value <= 1 for value in values)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"lr_schedule": "constant"}, {0: 1, 50: 1, 100: 1}),
        ({"lr_schedule": "linear"}, {0: 1, 50: 0.55, 100: 0.1}),
        ({"lr_schedule": "linear", "warmup_steps": 20}, {20: 1, 60: 0.55, 100: 0.1}),
        ({"lr_schedule": "cosine"}, {0: 1, 25: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 50: 0.55, 100: 0.1}),
        ({"lr_schedule": "polynomial", "power": 2}, {0: 1, 50: 0.1 + 0.9 * 0.25, 100: 0.1}),
        ({"lr_schedule": "inverse_sqrt", "warmup_steps": 4}, {4: 1, 16: 0.5, 64: 0.25, 100: 0.2}),
        ({"lr_schedule": "warmup_stable_decay"}, {0: 1, 90: 1, 95: 0.55, 100: 0.1}),
        ({"lr_schedule": "warmup_stable_decay", "decay_steps": 50}, {50: 1, 75: 0.55, 100: 0.1}),
    ],
)
def test_schedules_have_the_values_of_their_formulas(settings, expected):
    values = rates(**settings)
    assert {step: values[step] for step in expected} == pytest.approx(expected)


def test_cosine_agrees_with_pytorchs_scheduler():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1)
    theirs = []
    for _ in range(101):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(lr_schedule="cosine") == pytest.approx(theirs)


def test_matrices_decay_and_vectors_do_not():
    model = GPT(GPT2)
    decayed, plain = build_optimizer(model, OptimizerSection(learning_rate=1e-3, weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in plain["params"]} == {1}
    counted = sum(p.numel() for group in (decayed, plain) for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters()), "tied weights once"
