"""What one rank does in `topology`: train and save a cell, load a checkpoint into another cell, compare. No entry.

The oracle is written by the saving ranks from DeepSpeed's own gathering calls (safe_get_full_*, GatheredParameters) into a
file of its own, and never passes through dsgpt's saver or reader. The model has everything that is easily forgotten: tied
embeddings, running statistics, frozen matrices and vectors, two parameter groups, and no size that any number of ranks
divides. Every micro-step has the same rows on any number of ranks, because batch norm measures over a micro-step.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.saver import save_checkpoint
from dsgpt.checkpoint.store import load_state
from dsgpt.config import Dropout, ModelConfig, fill_deepspeed, load_config
from dsgpt.config.schema import OptimizerSection
from dsgpt.distributed import World
from dsgpt.engine import Engine, construct
from dsgpt.model.gpt import GPT
from dsgpt.optimizer import build_optimizer
from tests.faults._topology_tuned import build_tuned, mistral

ROWS, MICRO_STEPS, STEPS, LEARNING_RATE = 4, 2, 3, 1e-2
SMALL = ModelConfig(
    hidden_size=33, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=11, intermediate_size=49,
    vocab_size=101, max_position_embeddings=13, position_embedding="learned", norm="batchnorm", bias=True, qk_norm=True,
    tie_word_embeddings=True, dropout=Dropout(),
)  # fmt: skip
# For bytes and memory: of a small model, headers and checksums would be most of what is read.
LARGE = ModelConfig(
    hidden_size=255, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=5, head_dim=51, intermediate_size=1023,
    vocab_size=16381, max_position_embeddings=13, position_embedding="learned", norm="batchnorm", tie_word_embeddings=True,
    dropout=Dropout(),
)  # fmt: skip
MISTRAL = mistral(SMALL.vocab_size, SMALL.max_position_embeddings)
FROZEN = "blocks.0."


class Cell(NamedTuple):
    """A topology, a precision, and what is trained: all but the first block, or a key of TUNED."""

    world: int
    stage: int
    dtype: str
    trained: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}, {self.world} x stage {self.stage}" + (f", {self.trained}" if self.trained else "")

    @property
    def model(self) -> ModelConfig:
        return MISTRAL if self.trained == "mistral" else SMALL

    @property
    def seed(self) -> int:
        return 100 * self.world + 10 * self.stage + (self.dtype == "bf16")

    def folder(self, root: Path) -> Path:
        return root / f"{self.dtype}-{self.world}-{self.stage}{self.trained}"


class Found(NamedTuple):
    """Of one cell on one rank: names of tensors that differ, the larger relative error of the first losses."""

    differences: list[str]
    loss_error: float = 0.0


def build(cell: Cell, world: World, seed: int, model: ModelConfig | None = None) -> Engine:
    """An engine as a run builds it, with a part frozen; rehearsed, so that its optimizer's state exists."""
    model = model or cell.model
    overrides = [f"training.dtype={cell.dtype}", f"training.global_batch_size={ROWS * MICRO_STEPS}", f"run.seed={seed}"]
    shipped = cell.stage or cell.dtype == "fp32"  # at stage 0 one has to accept sums in bf16 in a file of one's own
    file = f"zero{cell.stage}" if shipped else Path(__file__).with_name("zero0_bf16.json")
    overrides += [f"training.micro_batch_size_per_gpu={ROWS // world.size}", f"deepspeed={file}"]
    overrides += [f"optimizer.learning_rate={LEARNING_RATE}", "optimizer.weight_decay=0.1"]
    run = load_config(["quickstart"], overrides).config
    config = fill_deepspeed(run, world.size)
    if cell.stage:
        config["zero_optimization"]["reduce_bucket_size"] = 500_000 if model == LARGE else 5000
    if cell.stage == 3:  # some gathered for each layer, some kept whole; several sub-groups
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 200, "sub_group_size": 5000}
    with contextlib.redirect_stdout(io.StringIO()):  # one of DeepSpeed's optimizers prints how much memory there is
        builder = partial(build_tuned, run, cell.trained) if cell.trained else partial(_build, seed)
        engine = builder(model, config, world)
    engine.rehearse(batches(world, 99, model)[0])
    return engine


def _build(seed: int, model: ModelConfig, config: Mapping[str, Any], world: World) -> Engine:
    """With the first block frozen."""
    torch.manual_seed(seed)
    module = construct(lambda: GPT(model), config)
    frozen = [p for name, p in module.named_parameters() if name.startswith(FROZEN)]
    with deepspeed.zero.GatheredParameters(frozen, modifier_rank=0):
        for parameter in frozen:  # initial vectors are the same for any seed: a lost one would not show
            parameter.requires_grad_(False)
            if parameter.dim() == 1:
                nn.init.normal_(parameter.data)
    optimizer = build_optimizer(module, OptimizerSection(learning_rate=LEARNING_RATE, weight_decay=0.1))
    return Engine(module, optimizer, config, world)


def batches(world: World, step: int, model: ModelConfig = SMALL) -> list[dict[str, Tensor]]:
    """This rank's micro-batches of a step."""
    generator, length, found = torch.Generator().manual_seed(step), model.max_position_embeddings, []
    for _ in range(MICRO_STEPS):
        ids = torch.randint(model.vocab_size, (ROWS, length + 1), generator=generator)
        mine = ids.chunk(world.size)[world.rank]
        found.append({"input_ids": mine[:, :-1].contiguous(), "labels": mine[:, 1:].contiguous()})
    return found


def train(engine: Engine, world: World, step: int, model: ModelConfig = SMALL) -> tuple[float, bool]:
    """(mean loss of one step, whether it was applied)."""
    total, targets = 0.0, ROWS * MICRO_STEPS * model.max_position_embeddings
    for micro_step, batch in enumerate(batches(world, step, model)):
        total += float(engine.forward_backward(batch, targets, micro_step == MICRO_STEPS - 1))
    return world.sum(total)[0] / targets, engine.step(LEARNING_RATE).applied


def evaluate(engine: Engine, world: World, model: ModelConfig = SMALL) -> float:
    return world.sum(sum(float(engine.evaluate(batch)) for batch in batches(world, STEPS, model)))[0]


# ---- the oracle ------------------------------------------------------------------------------------------------------


def gather(engine: Engine) -> dict[str, Tensor]:
    """All of the state, whole, on every rank, by DeepSpeed's own calls, where they know of it. A collective."""
    found = {f"buffer:{name}": value.clone() for name, value in engine.module.named_buffers()}
    optimizer = engine._optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # With several parameter groups DeepSpeed links after the first one's step, when the others have no state yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        kind = "working" if parameter.requires_grad else "frozen"
        with deepspeed.zero.GatheredParameters([parameter]):
            found[f"{kind}:{name}"] = parameter.detach().clone()
        if hasattr(parameter, "ds_tensor"):  # what the next gathering will bring, where that one had it whole already
            found[f"{kind}, again:{name}"] = _join(parameter)
        if parameter.requires_grad:
            found |= {f"{kind}:{name}": value for kind, value in _masters(engine, parameter).items()}
    steps = {float(state["step"]) for state in engine._torch_optimizer.state.values()}
    assert len(steps) == 1, "parameters have different step counts"
    return found | {"step": torch.tensor(steps.pop())}


def _join(parameter: Any) -> Tensor:
    pieces = [torch.empty_like(parameter.ds_tensor.data) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(pieces, parameter.ds_tensor.data)
    return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)


def _masters(engine: Engine, parameter: nn.Parameter) -> dict[str, Tensor]:
    """fp32 master and moments: without partitions what lies on this rank, else what DeepSpeed puts together."""
    moments = ("exp_avg", "exp_avg_sq")
    if not is_divided(parameter):
        master = _whole_masters(engine._optimizer).get(parameter, parameter)
        assert master.dtype == torch.float32
        state = engine._torch_optimizer.state[master]
        found = {"master": master.detach()} | {kind: state[kind] for kind in moments}
    else:
        found = {"master": deepspeed.utils.safe_get_full_fp32_param(parameter)}
        found |= {kind: deepspeed.utils.safe_get_full_optimizer_state(parameter, kind) for kind in moments}
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return {kind: value.clone().view(shape) for kind, value in found.items()}


def _whole_masters(optimizer: Any) -> dict[Tensor, Tensor]:
    """Low-precision parameter -> its fp32 master, at stage 0 in bf16, where safe_get_full_* know neither."""
    working, masters = getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", [])
    return dict(zip(itertools.chain(*working), itertools.chain(*masters), strict=True))


def is_divided(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: str) -> list[str]:
    """Names of what is not equal to the last bit, the working copies compared with masters rounded to their precision.

    The sign of a zero does not count: where DeepSpeed adds pieces up over ranks, it is lost.
    """
    differing = []
    for name, value in expected.items():
        if name.startswith("working"):
            continue
        have = found.get(name.replace(", again", ""))
        if have is None or have.dtype != value.dtype or not torch.equal(have, value):
            differing.append(name)
    for name, value in found.items():
        kind, _, parameter = name.partition(":")
        if kind.startswith("working"):
            low = found[f"master:{parameter}"].to(torch.bfloat16 if dtype == "bf16" else torch.float32)
            same = value.dtype == low.dtype and torch.equal(value, low)
        elif kind == "frozen, again":
            same = torch.equal(value, found[f"frozen:{parameter}"])
        else:
            same = name in expected
        if not same:
            differing.append(name)
    return sorted(set(differing))


# ---- saving and loading ----------------------------------------------------------------------------------------------


def save_cell(world: World, root: Path, cell: Cell, model: ModelConfig | None = None) -> list[str]:
    """Train, write the oracle, save. Returns what the save itself changed: nothing."""
    model = model or cell.model
    engine = build(cell, world, cell.seed, model)
    for step in range(STEPS):
        assert train(engine, world, step, model)[1]
    oracle, folder = gather(engine), cell.folder(root)
    if world.is_main:
        folder.mkdir(parents=True)
    world.barrier()
    counters = {"step": STEPS, "consumed_samples": STEPS * ROWS * MICRO_STEPS, "optimizer_steps": STEPS}
    manifest = {"step": STEPS, "counters": counters, "state_kinds": list(engine.state_kinds)}
    save_checkpoint(engine, world, folder, "saver", manifest)
    changed = compare(gather(engine), oracle, cell.dtype)
    if model != LARGE:
        losses = evaluate(engine, world, model), train(engine, world, STEPS, model)[0]
        oracle["losses"] = torch.tensor(losses, dtype=torch.float64)
    if world.is_main:
        save_file({name: value.contiguous() for name, value in oracle.items()}, folder / "oracle")
    world.barrier()
    return changed


def load_cell(world: World, root: Path, source: Cell, target: Cell) -> Found:
    """A fresh engine of another seed loads `source`'s checkpoint, is compared with the oracle, and trains on."""
    engine = build(target, world, seed=7)
    checkpoint, oracle = opened(root, source)
    load_state(engine, CheckpointReader(checkpoint))
    losses = oracle.pop("losses").tolist()
    differences = compare(gather(engine), oracle, target.dtype)
    model = target.model
    evaluated, (trained, applied) = evaluate(engine, world, model), train(engine, world, STEPS, model)
    if not (applied and train(engine, world, STEPS + 1, model)[1]):
        differences.append("a step after it is not applied")
    return Found(differences, max(abs(evaluated / losses[0] - 1), abs(trained / losses[1] - 1)))


def opened(root: Path, source: Cell) -> tuple[Path, dict[str, Tensor]]:
    folder = source.folder(root)
    return folder / f"step-{STEPS:08d}", load_file(folder / "oracle")
