"""Does the engine compute what a plain PyTorch loop computes? One case at a time, over every axis that could differ.

    python -m tests.benchmarks parity            prints the whole table

The plain loop is one process, one batch a step, no DeepSpeed, no recomputation. Compared over 20 steps in fp32 without
dropout: each step's loss, each step's gradient norm before clipping, every gradient of the first step, and the final
parameters, within 1e-5 relative (tensors by the norm of the difference). Labels are masked unevenly, so an average of
averages would show. SGD is there because Adam hides a wrong constant factor in the gradients.
"""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass
from typing import Any

import torch

from dsgpt.config import Dropout, ModelConfig
from dsgpt.config.schema import OptimizerSection
from dsgpt.engine import Engine, construct
from dsgpt.model.gpt import GPT
from dsgpt.model.recompute import apply_activation_checkpointing
from dsgpt.optimizer import build_optimizer, learning_rate

STEPS, GLOBAL_BATCH, LENGTH = 20, 8, 12
TOLERANCE = 1e-5
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 101, "max_position_embeddings": 16, "dropout": Dropout(),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One cell of the table. `clip` is the norm gradients are cut to, 0 for none; `factor` falsifies the averaging."""

    stage: int
    ranks: int
    accumulation: int
    recompute: str
    bias: bool
    optimizer: str
    clip: float
    factor: float = 1.0

    def __str__(self) -> str:
        clip = f"clip {self.clip}" if self.clip else "no clip"
        return (
            f"ZeRO {self.stage}, {self.ranks} ranks, accumulation {self.accumulation}, recompute {self.recompute}, "
            f"{'bias' if self.bias else 'no bias'}, {self.optimizer}, {clip}"
        )


AXES: tuple[tuple[Any, ...], ...] = (
    (0, 1, 2, 3), (1, 2), (1, 2), ("none", "selective", "full"), (False, True), ("adamw", "sgd"), (0.0, 0.3),
)  # fmt: skip


def all_cases() -> list[Case]:
    return [Case(*values) for values in itertools.product(*AXES)]


def covering_cases() -> list[Case]:
    """A subset in which every pair of values of two axes occurs, chosen greedily in a fixed order."""
    pairs = {(i, a, j, b) for i, j in itertools.combinations(range(len(AXES)), 2) for a in AXES[i] for b in AXES[j]}
    chosen = []
    cases = all_cases()
    while pairs:
        best = max(cases, key=lambda case: len(pairs & _pairs_of(case)))
        chosen.append(best)
        pairs -= _pairs_of(best)
    return chosen


def _pairs_of(case: Case) -> set[tuple[int, Any, int, Any]]:
    values = astuple(case)[: len(AXES)]
    return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(AXES)), 2)}


def model_config(case: Case) -> ModelConfig:
    if case.bias:
        return ModelConfig(**SIZES, bias=True, norm="layernorm", position_embedding="learned", activation="gelu")
    return ModelConfig(**SIZES, qk_norm=True, tie_word_embeddings=False)


def optimizer_config(case: Case) -> OptimizerSection:
    rate = {"adamw": 1e-2, "sgd": 0.2}[case.optimizer]
    return OptimizerSection(name=case.optimizer, learning_rate=rate, warmup_steps=2, weight_decay=0.05)


def initial_model(case: Case) -> GPT:
    torch.manual_seed(11)
    return GPT(model_config(case))


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """(GLOBAL_BATCH, LENGTH) ids from a small language: 17 tokens, each three times its predecessor plus a little noise."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(17, (GLOBAL_BATCH, 1), generator=generator)
    for _ in range(LENGTH):
        noise = torch.randint(2, (GLOBAL_BATCH, 1), generator=generator)
        ids = torch.cat((ids, (ids[:, -1:] * 3 + noise) % 17), dim=1)
    labels = ids[:, 1:].clone()
    for row in range(GLOBAL_BATCH):
        labels[row, : (row * 5) % LENGTH] = -100
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels}


def plain_loop(case: Case) -> dict[str, Any]:
    model = initial_model(case)
    config = optimizer_config(case)
    optimizer = build_optimizer(model, config)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = global_batch(step)
        loss = model(**batch) / (batch["labels"] != -100).sum()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip or float("inf"))))
        if step == 0:
            scale = min(1.0, case.clip / norms[0]) if case.clip else 1.0
            gradients = {name: p.grad / scale for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, STEPS)
        optimizer.step()
        losses.append(loss.item())
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
    }


def deepspeed_config(case: Case) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // case.ranks // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        # Thresholds of 0: a model this small would otherwise stay whole on every rank at stage 3.
        "zero_optimization": {
            "stage": case.stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
    }


def engine_loop(world: Any, case: Case) -> dict[str, Any]:
    """The same training on this rank's share; runs on every rank of a pool."""
    from deepspeed.utils import safe_get_full_grad

    config = deepspeed_config(case)
    model = construct(lambda: initial_model(case), config)
    apply_activation_checkpointing(model.blocks, case.recompute)
    settings = optimizer_config(case)
    engine = Engine(model, build_optimizer(model, settings), config, world)
    parameters = dict(engine.parameters())
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = global_batch(step)
        targets = float((batch["labels"] != -100).sum()) / case.factor
        total = 0.0
        pieces = {name: value.view(case.accumulation, world.size, -1, LENGTH) for name, value in batch.items()}
        for micro_step in range(case.accumulation):
            micro = {name: value[micro_step, world.rank].contiguous() for name, value in pieces.items()}
            total += float(engine.forward_backward(micro, targets, micro_step == case.accumulation - 1))
        if step == 0:
            gradients = {name: safe_get_full_grad(p).detach().clone().view(-1) for name, p in parameters.items()}
        losses.append(world.sum(total)[0] / (targets * case.factor))
        norms.append(engine.step(learning_rate(settings, step, STEPS)).gradient_norm)
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "parameters": {name: engine.full_parameter(name) for name in parameters},
    }


def differences(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference of each compared quantity."""
    result = {}
    for key in ("losses", "norms"):
        result[key] = max(abs(a - b) / abs(b) for a, b in zip(ours[key], theirs[key], strict=True))
    for key in ("gradients", "parameters"):
        total = torch.cat([value.flatten() for value in theirs[key].values()]).norm()
        worst = 0.0
        for name, value in theirs[key].items():
            if name not in ours[key] or (key == "parameters" and name.endswith("k_proj.bias")):
                # A tied parameter's second name; or a bias that shifts all scores of a query alike: its true gradient is
                # 0, and Adam makes a whole step of whatever rounding left.
                continue
            # A gradient of (almost) 0 is compared on the scale of the whole.
            scale = max(float(value.norm()), 1e-3 * float(total))
            worst = max(worst, float((ours[key][name].view(-1) - value.flatten()).norm()) / scale)
        result[key] = worst
    return result
