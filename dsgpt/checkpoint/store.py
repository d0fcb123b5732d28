"""Bringing a checkpoint back into an engine, and choosing one that is intact.

Any world size and ZeRO stage reads what any other wrote: a rank asks for the ranges that it owns itself (reader.py). What is
read is verified while it is read; a checkpoint that turns out damaged raises DamagedError on all ranks, and an older one can
be loaded over it. Host memory beside the rank's own state: one parameter's fragment.

Growth: every rank stats its share of the files (1/ranks) and opens those that hold its ranges. Only stage 0 and frozen
parameters are read whole by every rank, because every rank holds them whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.reader import MASTER, CheckpointReader
from dsgpt.distributed import World
from dsgpt.engine import Engine
from dsgpt.errors import CheckpointError, DamagedError
from dsgpt.partitioned import Fragment

VISIBLE_SECONDS = 30.0


def load_state(engine: Engine, reader: CheckpointReader, late: Mapping[str, int] | None = None) -> None:
    """Restore masters, moments and the optimizer's step count from a checkpoint, in place.

    Moments of what is trained now and was frozen there begin at zero; what is frozen now and was trained there keeps its
    value. `late` as in `Engine.load`. Raises CheckpointError when its parameters are not the
    model's, before anything is changed.
    """
    ours: dict[str, tuple[int, ...]] = dict(engine.parameter_shapes())
    ours |= {name: shape for name, (shape, _) in engine.frozen_shapes().items()}
    theirs = reader.parameters | reader.frozen
    if ours != theirs:
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        seen = "; ".join(f"{n}: checkpoint {theirs.get(n, 'none')}, model {ours.get(n, 'none')}" for n in names[:5])
        raise CheckpointError(
            f"the checkpoint is of another model ({len(names)} parameters differ)",
            seen=seen,
            do="use the model section the run was started with (its config.yaml), or another output_dir",
        )
    kinds = reader.manifest["state_kinds"]
    if kinds != list(engine.state_kinds):
        raise CheckpointError(
            "the checkpoint is of another optimizer",
            seen=f"checkpoint: {', '.join(kinds)}; this run: {', '.join(engine.state_kinds)}",
            do="use the optimizer.name and optimizer.momentum the run was started with",
        )
    buffers = reader.manifest.get("buffers", {})
    if buffers.keys() != engine.buffers().keys():
        seen = f"checkpoint: {', '.join(buffers) or 'none'}; model: {', '.join(engine.buffers()) or 'none'}"
        raise CheckpointError("the checkpoint's running statistics are not the model's", seen=seen)
    values = _read_buffers(reader, engine.world)
    thawed = {name for name in engine.parameter_shapes() if name in reader.frozen}

    def read(fragment: Fragment, kind: str) -> Tensor:
        if kind != MASTER and fragment.name in thawed:
            return torch.zeros(fragment.numel)
        return reader.read(fragment.name, kind, fragment.start, fragment.numel)

    engine.load(read, engine.state_kinds, reader.manifest["counters"]["optimizer_steps"], late)
    engine.load_buffers(values)


def _read_buffers(reader: CheckpointReader, world: World) -> dict[str, Tensor]:
    """Running statistics, read by rank 0 alone: they are small, and equal on all ranks."""
    values, problems = {}, None
    if world.is_main:
        try:
            values = reader.buffers()
        except DamagedError as error:
            problems = error.problems
    values, problems = world.broadcast_object((values, problems))
    if problems:
        raise DamagedError(problems=problems)
    return values


def find_checkpoint(committed: Sequence[tuple[int, Path]], world: World, mode: str) -> tuple[Path | None, list[str]]:
    """The newest of these checkpoints whose files are all there, agreed by all ranks, and what was passed over.

    Each rank looks at its share of the files; a checkpoint that fails is reported, never deleted. What the files hold is
    compared while it is read, or here where an older dsgpt wrote them without checksums. Raises CheckpointError when there
    are some and none is good. `committed` is rank 0's list on all ranks, oldest first.
    """
    rejected: list[str] = []
    for _, path in reversed(committed):
        problems = verify_share(path, world, mode)
        if not problems:
            return path, rejected
        rejected.append(f"{path.name}: {' '.join(problems.split())}")
    if committed:
        raise CheckpointError(
            "no committed checkpoint is intact" if len(committed) > 1 else "the checkpoint is damaged",
            seen="; ".join(rejected),
            do="restore the files, or another step (dsgpt checkpoint verify RUN_DIR), or begin again in a new run.output_dir",
        )
    return None, rejected


def _wait_for(path: Path) -> None:
    """Network file systems may show a new folder to one host seconds after another; rank 0 has seen this one."""
    until = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.2)


def verify_share(path: Path, world: World, mode: str, now: bool = False) -> str:
    """Verify a checkpoint with the files spread over all ranks; the problems of all ranks as one text.

    `now` compares the content here also where it would be compared while it is read.
    """
    digest = ""
    try:
        _wait_for(path / commit.MANIFEST)
        manifest = commit.read_manifest(path)
        names, digest = sorted(manifest["files"]), manifest["sha256"]
        if not now and all("crc32" in entry for entry in manifest["files"].values() if isinstance(entry, dict)):
            mode = "size"  # the content is compared while it is read
        problems = [str(p) for p in commit.verify(path, mode, only=names[world.rank :: world.size])]
    except CheckpointError as error:
        problems = [str(error)]
    gathered = world.gather_objects((digest, problems))
    text = ""
    if gathered is not None:
        text = "; ".join(dict.fromkeys(one for _, part in gathered for one in part))
        if not text and len({digest for digest, _ in gathered}) > 1:
            text = f"{path}: the ranks see different manifests"
    return world.broadcast_object(text)
