"""Loads that forget one thing, and what a load costs, on one rank of `topology`. No entry.

Controls: a comparison that overlooks a forgotten tensor, a stale copy or a range that is off by one would prove nothing.
Costs are measured from outside of the reader: bytes where they enter the process, host memory by the kernel's own count.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.store import load_state
from dsgpt.distributed import World
from dsgpt.engine import Engine
from dsgpt.partitioned import Fragment
from tests.faults._topology import FROZEN, LARGE, Cell, build, compare, gather, is_divided, opened

TIED, FROZEN_MATRIX, FROZEN_VECTOR = "embed_tokens.weight", f"{FROZEN}mlp.up_proj.weight", f"{FROZEN}mlp.up_proj.bias"
MATRIX, VECTOR, STATISTICS = "blocks.1.mlp.down_proj.weight", "blocks.1.mlp.up_proj.bias", "norm.running_var"
Source = Callable[[Fragment, str], Tensor]


def _source(engine: Engine, change: Callable[[Source, Fragment, str], Tensor]) -> Any:
    """A patch of what a load asks the checkpoint for."""
    load = engine.load

    def changed(source: Source, *others: Any) -> None:
        load(lambda fragment, kind: change(source, fragment, kind), *others)

    return mock.patch.object(engine, "load", changed)


def _drop(kind: str, name: str) -> Callable[[Engine, World], Any]:
    """One tensor keeps what the new engine has there."""

    def mutation(engine: Engine, world: World) -> Any:
        def change(source: Source, fragment: Fragment, asked: str) -> Tensor:
            if (asked, fragment.name) != (kind, name):
                return source(fragment, asked)
            frozen = name in engine.frozen_shapes()
            return (engine.read_frozen(fragment) if frozen else engine.read(fragment, kind)).clone()

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
    return mock.patch.object(engine, "load", lambda source, kinds, optimizer_steps, late: load(source, kinds, 0, late))


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
# The same of a model with adapters and magnitudes.
LAYER = "blocks.1.mlp.down_proj"
ADAPTER, MAGNITUDE = f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_magnitude_vector.default.weight"
MATRIX_BESIDE = f"{LAYER}.base_layer.weight"
TUNED_MUTATIONS: dict[str, tuple[Callable[[Engine, World], Any], str]] = {
    "adapter": (_drop("master", ADAPTER), f"master:{ADAPTER}"),
    "second moment of an adapter": (_drop("exp_avg_sq", ADAPTER), f"exp_avg_sq:{ADAPTER}"),
    "magnitude": (_drop("master", MAGNITUDE), f"master:{MAGNITUDE}"),
    "matrix beside an adapter": (_drop("master", MATRIX_BESIDE), f"frozen:{MATRIX_BESIDE}"),
}


def mutations(trained: str) -> dict[str, tuple[Callable[[Engine, World], Any], str]]:
    return TUNED_MUTATIONS if trained else MUTATIONS


def controls(world: World, root: Path, source: Cell, target: Cell) -> dict[str, bool]:
    """Each mutation that exists at this target, and whether the comparison finds on this rank what was forgotten."""
    checkpoint, oracle = opened(root, source)
    del oracle["losses"]
    found = {}
    for name, (forgetting, tensor) in mutations(target.trained).items():
        if name == "working copies" and target.stage == 0 and target.dtype == "fp32":
            continue  # nothing is a copy there
        engine = build(target, world, seed=7)
        with forgetting(engine, world):
            load_state(engine, CheckpointReader(checkpoint))
        found[name] = tensor in compare(gather(engine), oracle, target.dtype)
    return found


# ---- costs -----------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of one load on one rank: bytes read from state files and needed; growth of host memory; the largest tensor."""

    differences: list[str]
    read: int
    needed: int
    memory: int
    tensor: int


def load_large(world: World, root: Path, source: Cell, target: Cell, at_once: bool = False) -> Cost:
    """What loading alone costs; `at_once`, as a control, when every rank reads all there is before it uses any."""
    engine = build(target, world, 7, LARGE)
    checkpoint, oracle = opened(root, source)
    reader, count, refresh = CheckpointReader(checkpoint), {"bytes": 0, "peak": 0}, engine._refresh_working_copies

    def refreshing() -> None:  # as after every step: what that needs is not loading's
        count["peak"] = _status("VmHWM")
        refresh()

    def trimming(source: Source, fragment: Fragment, kind: str) -> Tensor:
        _trim()  # or the allocator keeps what was freed, and takes other pages next
        return source(fragment, kind)

    before = _reset_peak()
    with (
        _counting(count),
        _source(engine, trimming),
        mock.patch.object(engine, "_refresh_working_copies", refreshing),
        _whole_first(engine, reader) if at_once else contextlib.nullcontext(),
    ):
        load_state(engine, reader)
    differences = compare(gather(engine), oracle, target.dtype)
    shapes = [*engine.parameter_shapes().values(), *(shape for shape, _ in engine.frozen_shapes().values())]
    tensor = max(4 * math.prod(shape) for shape in shapes)
    return Cost(differences, count["bytes"], _needed(engine, target), count["peak"] - before, tensor)


def _needed(engine: Engine, target: Cell) -> int:
    """Bytes that this rank has to read at least: what it holds of the state, whoever else holds it too."""
    trained = sum(fragment.numel for fragment in engine.fragments())
    if not any(is_divided(parameter) for _, parameter in engine.parameters()):
        trained = sum(parameter.numel() for _, parameter in engine.parameters())
    frozen = sum(math.prod(shape) for shape, _ in engine.frozen_shapes().values())
    if target.stage == 3:
        frozen = sum(fragment.numel for fragment in engine.frozen_fragments())
    return 12 * trained + (2 if target.dtype == "bf16" else 4) * frozen


@contextlib.contextmanager
def _counting(count: dict[str, int]) -> Iterator[None]:
    """Count what this process reads meanwhile by positioned reads; the reader has no other, but the manifest's."""
    pread = os.pread

    def counting(*arguments: Any) -> bytes:
        data = pread(*arguments)
        count["bytes"] += len(data)
        return data

    with mock.patch.object(os, "pread", counting):
        yield


def _whole_first(engine: Engine, reader: CheckpointReader) -> Any:
    held: dict[tuple[str, str], Tensor] = {}

    def change(source: Source, fragment: Fragment, kind: str) -> Tensor:
        for name, shape in reader.parameters.items() if not held else ():
            held.update({(name, one): reader.read(name, one, 0, math.prod(shape)) for one in engine.state_kinds})
        if fragment.name not in reader.parameters:
            return source(fragment, kind)
        return held[fragment.name, kind][fragment.start : fragment.start + fragment.numel]

    return _source(engine, change)


def _reset_peak() -> int:
    """Forget the largest resident size so far; the present one, without what was freed already, in bytes."""
    gc.collect()
    _trim()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
