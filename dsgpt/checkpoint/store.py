"""Saving and reading checkpoints: every rank its own partition, indexed by parameter name and range.

Layout of `checkpoints/step-00001000/`:

    manifest.json                 counters, model, fingerprints, versions, sizes and hashes, where each range lies
    rank-00000.safetensors        this rank's fragments: "<kind>:<parameter>", kind = master, exp_avg, exp_avg_sq;
                                  rank 0 also "buffer:<name>", running statistics, which are equal on all ranks

A checkpoint holds 12 bytes per parameter with AdamW; low-precision copies are recomputed from the masters. Nothing in it
can execute. `CheckpointReader` reads any range of any parameter, whatever topology wrote it.

Growth: each rank writes and hashes only its own file, in parallel. The index in the manifest has one entry per fragment
at ZeRO 1-2 (parameters + ranks) and one number per parameter at ZeRO 0 and 3, where all ranks hold equal pieces.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.reader import CheckpointReader, buffer_key, partition_file
from dsgpt.distributed import World
from dsgpt.engine import Engine, Fragment
from dsgpt.errors import CheckpointError, LockedError, SaveError
from dsgpt.process import give_default_mode

VISIBLE_SECONDS = 30.0


def save_checkpoint(
    engine: Engine,
    world: World,
    checkpoints_dir: Path,
    attempt: str,
    manifest: Mapping[str, Any],
    guard: Callable[[], None] = lambda: None,
) -> tuple[Path, int]:
    """Write and commit one checkpoint; all ranks call it. Returns its folder and how often a write was tried again.

    Raises SaveError on every rank when any rank failed; then nothing is committed and the temporary folder is removed.
    `manifest` is rank 0's; it holds at least "step". `guard` is called on rank 0 right before the commit; what it raises
    is raised there, and PeerError on the others.
    """
    step = manifest["step"]
    folder, begun_again = _begin(world, checkpoints_dir, step, attempt)
    fragments = engine.fragments()
    written, retries, error = {}, 0, ""
    try:
        written, retries = commit.retrying(lambda: _write_partition(engine, folder, world.rank, fragments))
    except Exception as problem:  # whatever it is, this rank must still meet the others below
        error = f"rank {world.rank}: {problem}"
    ranges = [(f.name, f.start, f.numel) for f in fragments] if engine.stage in (1, 2) else None
    gathered = world.gather_objects((written, ranges, error, retries))
    path, failure, forbidden = "", "", None
    if gathered is not None:
        failure = "; ".join(text for _, _, text, _ in gathered if text)
        again = [begun_again, *(number for *_, number in gathered)]
        try:
            if not failure:
                files = {name: entry for part, *_ in gathered for name, entry in part.items()}
                index = _index(engine, world, [ranges for _, ranges, *_ in gathered])
                buffers = {name: list(value.shape) for name, value in engine.buffers().items()}
                contents = {**manifest, "files": files, "parameters": index, "buffers": buffers}
                path = str(commit.commit(checkpoints_dir, folder, contents, guard, again.append))
        except OSError as problem:
            failure = str(problem)
        except LockedError as problem:
            forbidden = problem
        if failure or forbidden:
            shutil.rmtree(folder, ignore_errors=True)
        retries = sum(again)
    world.agree(forbidden, "committing the checkpoint")
    path, failure, retries = world.broadcast_object((path, failure, retries))
    if failure:
        raise SaveError(
            f"the checkpoint of step {step} was not written", seen=failure, do="free space, or mend the disk"
        )
    return Path(path), retries


def _begin(world: World, checkpoints_dir: Path, step: int, attempt: str) -> tuple[Path, int]:
    """Rank 0 makes the temporary folder; no rank writes before it is there. (folder, retries on rank 0)."""
    folder, failure, retries = "", "", 0
    if world.is_main:
        try:
            made, retries = commit.retrying(lambda: commit.begin(checkpoints_dir, step, attempt))
            folder = str(made)
        except OSError as problem:
            failure = str(problem)
    folder, failure = world.broadcast_object((folder, failure))
    if failure:
        raise SaveError(f"the checkpoint of step {step} cannot be begun", seen=failure)
    return Path(folder), retries


def _write_partition(engine: Engine, folder: Path, rank: int, fragments: Sequence[Fragment]) -> dict[str, Any]:
    tensors = {
        f"{kind}:{fragment.name}": engine.read(fragment, kind).detach().to("cpu", torch.float32).contiguous()
        for fragment in fragments
        for kind in engine.state_kinds
    }
    if rank == 0:
        tensors |= {buffer_key(name): value.detach().cpu().contiguous() for name, value in engine.buffers().items()}
    starts = {fragment.name: fragment.start for fragment in fragments}
    name = partition_file(rank)
    # One metadata entry only: with several, safetensors writes them in random order, and equal states differ in bytes.
    try:
        save_file(tensors, folder / name, metadata={"starts": json.dumps(starts)})
        give_default_mode(folder / name)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number.group(1)) if number else 0, str(error)) from error
    return commit.hash_files(folder, [name])


def _index(engine: Engine, world: World, ranges: Sequence[Any]) -> dict[str, Any]:
    """{name: {"shape", "fragments": [[rank, start, numel], …]}}, or "piece": elements per rank where all are equal."""
    index: dict[str, Any] = {name: {"shape": list(shape)} for name, shape in engine.parameter_shapes().items()}
    if engine.stage not in (1, 2):
        for entry in index.values():
            entry["piece"] = -(-math.prod(entry["shape"]) // world.size)
        return index
    for entry in index.values():
        entry["fragments"] = []
    for rank, owned in enumerate(ranges):
        for name, start, numel in owned:
            index[name]["fragments"].append([rank, start, numel])
    return index


def load_state(engine: Engine, reader: CheckpointReader) -> None:
    """Restore masters, moments and the optimizer's step count from a checkpoint, in place.

    Raises CheckpointError when its parameters are not the model's, before anything is changed.
    """
    ours, theirs = engine.parameter_shapes(), reader.parameters
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
    error = None
    try:
        buffers = reader.buffers()
        if buffers.keys() != engine.buffers().keys():
            seen = f"checkpoint: {', '.join(buffers) or 'none'}; model: {', '.join(engine.buffers()) or 'none'}"
            error = CheckpointError("the checkpoint's running statistics are not the model's", seen=seen)
    except CheckpointError as problem:
        error = problem
    engine.world.agree(error, "reading the checkpoint's running statistics")
    engine.load(
        lambda fragment, kind: reader.read(fragment.name, kind, fragment.start, fragment.numel),
        engine.state_kinds,
        reader.manifest["counters"]["optimizer_steps"],
    )
    engine.load_buffers(buffers)


def find_checkpoint(committed: Sequence[tuple[int, Path]], world: World, mode: str) -> tuple[Path | None, list[str]]:
    """The newest of these checkpoints that verifies, agreed by all ranks, and what was passed over.

    Each rank verifies its share of the files; a checkpoint that fails is reported, never deleted. Raises CheckpointError
    when there are some and none is good. `committed` is rank 0's list on all ranks, oldest first.
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


def verify_share(path: Path, world: World, mode: str) -> str:
    """Verify a checkpoint with the files spread over all ranks; the problems of all ranks as one text."""
    digest = ""
    try:
        _wait_for(path / commit.MANIFEST)
        manifest = commit.read_manifest(path)
        names, digest = sorted(manifest["files"]), manifest["sha256"]
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
