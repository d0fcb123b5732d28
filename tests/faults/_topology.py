"""What one rank does in `topology`: train and save a cell, load a checkpoint into another cell, compare. No entry.

The oracle is written by the saving ranks from DeepSpeed's own gathering calls (safe_get_full_*, GatheredParameters) into a
file of its own, and never passes through dsgpt's saver or reader. The model has everything that is easily forgotten: tied
embeddings, running statistics, frozen matrices and vectors, two parameter groups, and no size that any number of ranks
divides. Every micro-step has the same rows on any number of ranks, because batch norm measures over a micro-step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

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
from dsgpt.partitioned import Fragment

ROWS, MICRO_STEPS, STEPS, LEARNING_RATE = 4, 2, 3, 1e-2
SMALL = ModelConfig(
    hidden_size=33, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=11, intermediate_size=49,
    vocab_size=101, max_position_embeddings=13, position_embedding="learned", norm="batchnorm", bias=True, qk_norm=True,
    tie_word_embeddings=True, dropout=Dropout(),
)  # fmt: skip
# For bytes and memory: of a small model, headers and checksums would be most of what is read.
LARGE = ModelConfig(
    hidden_size=255, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=5, head_dim=51, intermediate_size=1023,
    vocab_size=4093, max_position_embeddings=13, position_embedding="learned", norm="batchnorm", tie_word_embeddings=True,
    dropout=Dropout(),
)  # fmt: skip
FROZEN = "blocks.0."


class Cell(NamedTuple):
    """A topology and a precision."""

    world: int
    stage: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}, {self.world} x stage {self.stage}"

    @property
    def seed(self) -> int:
        return 100 * self.world + 10 * self.stage + (self.dtype == "bf16")

    def folder(self, root: Path) -> Path:
        return root / f"{self.dtype}-{self.world}-{self.stage}"


class Found(NamedTuple):
    """Of one cell: names of tensors that differ, relative errors of the first losses, bytes, peak of host memory."""

    differences: list[str]
    loss_error: float
    bytes_read: int
    bytes_needed: int
    peak_bytes: int
    peak_allowed: int


def build(cell: Cell, world: World, seed: int, model: ModelConfig = SMALL) -> Engine:
    """An engine as a run builds it, with the first block frozen; rehearsed, so that its optimizer's state exists."""
    overrides = [f"training.dtype={cell.dtype}", f"training.global_batch_size={ROWS * MICRO_STEPS}"]
    overrides += [f"training.micro_batch_size_per_gpu={ROWS // world.size}", f"deepspeed=zero{cell.stage}"]
    config = fill_deepspeed(load_config(["quickstart"], overrides).config, world.size)
    if cell.stage:
        config["zero_optimization"]["reduce_bucket_size"] = 5000 if model is SMALL else 500_000
    if cell.stage == 3:  # some gathered for each layer, some kept whole; several sub-groups
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 200, "sub_group_size": 5000}
    torch.manual_seed(seed)
    module = construct(lambda: GPT(model), config)
    frozen = [p for name, p in module.named_parameters() if name.startswith(FROZEN)]
    with deepspeed.zero.GatheredParameters(frozen, modifier_rank=0):
        for parameter in frozen:  # initial vectors are the same for any seed: a lost one would not show
            parameter.requires_grad_(False)
            if parameter.dim() == 1:
                nn.init.normal_(parameter.data)
    engine = Engine(
        module, build_optimizer(module, OptimizerSection(learning_rate=LEARNING_RATE, weight_decay=0.1)), config, world
    )
    engine.rehearse(batches(world, 99, model)[0])
    return engine


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


def evaluate(engine: Engine, world: World) -> float:
    return world.sum(sum(float(engine.evaluate(batch)) for batch in batches(world, STEPS)))[0]


# ---- the oracle ------------------------------------------------------------------------------------------------------


def gather(engine: Engine) -> dict[str, Tensor]:
    """All of the state, whole, on every rank, by DeepSpeed's own calls. A collective."""
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
    """fp32 master and moments: without partitions what lies there, else what DeepSpeed puts together of them."""
    moments = ("exp_avg", "exp_avg_sq")
    if not hasattr(parameter, "_hp_mapping") and not hasattr(parameter, "ds_id"):
        assert parameter.dtype == torch.float32, "in lower precision the masters lie elsewhere"
        state = engine._torch_optimizer.state[parameter]
        return {"master": parameter.detach().clone()} | {kind: state[kind].clone() for kind in moments}
    found = {"master": deepspeed.utils.safe_get_full_fp32_param(parameter)}
    found |= {kind: deepspeed.utils.safe_get_full_optimizer_state(parameter, kind) for kind in moments}
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return {kind: value.clone().view(shape) for kind, value in found.items()}


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


def save_cell(world: World, root: Path, cell: Cell, model: ModelConfig = SMALL) -> list[str]:
    """Train, write the oracle, save. Returns what the save itself changed: nothing."""
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
    if model is SMALL:
        oracle["loss:evaluated"] = torch.tensor(evaluate(engine, world), dtype=torch.float64)
        oracle["loss:trained"] = torch.tensor(train(engine, world, STEPS)[0], dtype=torch.float64)
    if world.is_main:
        save_file({name: value.contiguous() for name, value in oracle.items()}, folder / "oracle")
    world.barrier()
    return changed


def load_cell(world: World, root: Path, source: Cell, target: Cell, mutation: str = "") -> Found:
    """A fresh engine of another seed loads `source`'s checkpoint, with a mutation in force, and trains on."""
    engine = build(target, world, seed=7)
    checkpoint, oracle = _opened(root, source)
    with _count_bytes() as count, MUTATIONS[mutation][0](engine, world) if mutation else contextlib.nullcontext():
        load_state(engine, CheckpointReader(checkpoint))
    losses = {name: float(oracle.pop(name)) for name in ("loss:evaluated", "loss:trained")}
    differences = compare(gather(engine), oracle, target.dtype)
    if mutation:
        return Found(differences, 0.0, 0, 0, 0, 0)
    evaluated = evaluate(engine, world)
    trained, applied = train(engine, world, STEPS)
    if not (applied and train(engine, world, STEPS + 1)[1]):
        differences.append("a step after it is not applied")
    errors = [abs(evaluated / losses["loss:evaluated"] - 1), abs(trained / losses["loss:trained"] - 1)]
    return Found(differences, max(errors), count["bytes"], _needed(engine, target), 0, 0)


def load_large(world: World, root: Path, source: Cell, target: Cell) -> Found:
    """Bytes and host memory of loading alone."""
    engine = build(target, world, 7, LARGE)
    checkpoint, oracle = _opened(root, source)
    del oracle
    before = _reset_peak()
    with _count_bytes() as count:
        load_state(engine, CheckpointReader(checkpoint))
    own = sum(12 * fragment.numel for fragment in engine.fragments())
    largest = max(4 * LARGE.vocab_size * LARGE.hidden_size, 4 * LARGE.intermediate_size * LARGE.hidden_size)
    _, oracle = _opened(root, source)
    differences = compare(gather(engine), oracle, target.dtype)
    return Found(differences, 0.0, count["bytes"], _needed(engine, target), count["peak"] - before, own + largest)


def _opened(root: Path, source: Cell) -> tuple[Path, dict[str, Tensor]]:
    folder = source.folder(root)
    return folder / f"step-{STEPS:08d}", load_file(folder / "oracle")


def _needed(engine: Engine, target: Cell) -> int:
    """Bytes that this rank has to read at least: what it will hold of the state, whoever else holds it too."""
    whole = target.stage == 0 and target.dtype == "fp32"
    trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.parameters())
    if not whole:
        trained = sum(fragment.numel for fragment in engine.fragments())
    frozen = [p for p in engine.module.parameters() if not p.requires_grad]
    kept = [min(p.ds_tensor.numel(), p.ds_numel) if target.stage == 3 else p.numel() for p in frozen]
    size = 2 if target.dtype == "bf16" else 4
    return 12 * trained + size * sum(kept)


@contextlib.contextmanager
def _count_bytes() -> Iterator[dict[str, int]]:
    """Bytes that this process reads meanwhile by positioned reads (the reader has no other), and its peak of memory."""
    count, pread = {"bytes": 0, "peak": 0}, os.pread

    def counting(*arguments: Any) -> bytes:
        data = pread(*arguments)
        count["bytes"] += len(data)
        return data

    with mock.patch.object(os, "pread", counting):
        yield count
    count["peak"] = _status("VmHWM")


def _reset_peak() -> int:
    """Forget the largest resident size so far; the present one, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# ---- controls: a load that forgets one thing -------------------------------------------------------------------------

TIED, FROZEN_MATRIX, FROZEN_VECTOR = (
    "embed_tokens.weight",
    f"{FROZEN}mlp.up_proj.weight",
    f"{FROZEN}attention.o_proj.bias",
)
MATRIX, VECTOR, STATISTICS = "blocks.1.mlp.down_proj.weight", "blocks.1.mlp.up_proj.bias", "norm.running_var"
Source = Callable[[Fragment, str], Tensor]


def _source(engine: Engine, change: Callable[[Source, Fragment, str], Tensor]) -> Any:
    """A patch of what a load asks the checkpoint for."""
    load = engine.load

    def changed(source: Source, kinds: tuple[str, ...], optimizer_steps: int) -> None:
        load(lambda fragment, kind: change(source, fragment, kind), kinds, optimizer_steps)

    return mock.patch.object(engine, "load", changed)


def _drop(kind: str, name: str) -> Callable[[Engine, World], Any]:
    """One tensor keeps what the new engine has there."""

    def mutation(engine: Engine, world: World) -> Any:
        def change(source: Source, fragment: Fragment, asked: str) -> Tensor:
            if (asked, fragment.name) != (kind, name):
                return source(fragment, asked)
            return (
                engine.read_frozen(fragment) if name in engine.frozen_shapes() else engine.read(fragment, kind)
            ).clone()

        return _source(engine, change)

    return mutation


def _shifted(engine: Engine, world: World) -> Any:
    """The last rank reads from one element too early."""

    def change(source: Source, fragment: Fragment, kind: str) -> Tensor:
        early = Fragment(fragment.name, max(0, fragment.start - 1), fragment.numel)
        values = source(early, kind)
        return values.roll(1) if early == fragment else values

    return _source(engine, change) if world.rank == world.size - 1 else contextlib.nullcontext()


def _rounded(engine: Engine, world: World) -> Any:
    """As where only the low-precision copies are kept."""

    def change(source: Source, fragment: Fragment, kind: str) -> Tensor:
        values = source(fragment, kind)
        return values.bfloat16().float() if kind == "master" and fragment.name in engine.parameter_shapes() else values

    return _source(engine, change)


def _statistics(engine: Engine, world: World) -> Any:
    load = engine.load_buffers
    return mock.patch.object(
        engine, "load_buffers", lambda values: load({**values, STATISTICS: engine.buffers()[STATISTICS].clone()})
    )


def _steps(engine: Engine, world: World) -> Any:
    load = engine.load
    return mock.patch.object(engine, "load", lambda source, kinds, optimizer_steps: load(source, kinds, 0))


def _stale(engine: Engine, world: World) -> Any:
    return mock.patch.object(engine, "_refresh_working_copies", lambda: None)


# what is forgotten -> (the patch, the tensor that must be found to differ)
MUTATIONS: dict[str, tuple[Callable[[Engine, World], Any], str]] = {
    "tied matrix": (_drop("master", TIED), f"master:{TIED}"),
    "first moment": (_drop("exp_avg", MATRIX), f"exp_avg:{MATRIX}"),
    "second moment of a vector": (_drop("exp_avg_sq", VECTOR), f"exp_avg_sq:{VECTOR}"),
    "frozen matrix": (_drop("master", FROZEN_MATRIX), f"frozen:{FROZEN_MATRIX}"),
    "frozen vector": (_drop("master", FROZEN_VECTOR), f"frozen:{FROZEN_VECTOR}"),
    "batch-norm statistics": (_statistics, f"buffer:{STATISTICS}"),
    "step count": (_steps, "step"),
    "masters, to bf16": (_rounded, f"master:{MATRIX}"),
    "a range, by one": (_shifted, f"exp_avg:{VECTOR}"),
    "working copies": (_stale, f"working:{MATRIX}"),
}


def controls(world: World, root: Path, source: Cell, target: Cell) -> dict[str, bool]:
    """Each mutation that exists at this target, and whether the comparison finds on this rank what was forgotten."""
    without_copies = target.stage == 0 and target.dtype == "fp32"
    chosen = [name for name in MUTATIONS if not (without_copies and name == "working copies")]
    return {name: MUTATIONS[name][1] in load_cell(world, root, source, target, name).differences for name in chosen}
