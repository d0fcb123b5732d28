"""The run's folder: made, checked and written before step 1.

Everything in it is relative or a copy, so that it works after a move to another path, user or cluster: `config.yaml` calls
its own folder ".", the tokenizer lies beside it, data is known by fingerprint.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dsgpt
from dsgpt.checkpoint import commit
from dsgpt.checkpoint.base_model import keep_base
from dsgpt.config import to_yaml
from dsgpt.distributed import World
from dsgpt.engine import Engine
from dsgpt.errors import ConfigError, DsgptError, LockedError
from dsgpt.nodes import NodesReport
from dsgpt.planning import trained_part
from dsgpt.train.changes import check_same_run
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.state import RunLog, write_atomically
from dsgpt.units import format_bytes

_HEADROOM = 1.02  # headers, manifest, logs


def prepare_folder(plan: ResolvedRun, world: World) -> list[str]:
    """See that the folder can be used and holds no other run; returns what the config changes. Rank 0 only."""
    error, changes = None, []
    if world.is_main:
        try:
            for name in ("checkpoints", f"logs/{world.attempt}"):
                (plan.output_dir / name).mkdir(parents=True, exist_ok=True)
            changes = check_same_run(plan)
            commit.remove_unfinished(plan.output_dir / "checkpoints")
        except OSError as problem:
            error = LockedError(
                "the run folder cannot be written", seen=str(problem), do="choose another run.output_dir"
            )
        except ConfigError as problem:
            error = problem
    world.agree(error, "preparing the run's folder")
    return changes


def write_resolved(
    plan: ResolvedRun, world: World, log: RunLog, changes: list[str], nodes: NodesReport | None = None
) -> None:
    """Write what is resolved, and keep with the run its tokenizer and what is said of its base model: after the resume
    worked, before step 1. Rank 0 only."""
    error, folder = None, plan.output_dir
    if world.is_main:
        try:
            for difference in changes:
                log.event("config_changed", f"config changed since the last start: {difference}")
            here = plan.config.run.model_copy(update={"output_dir": Path(".")})
            write_atomically(folder / "config.yaml", to_yaml(plan.config.model_copy(update={"run": here})))
            write_atomically(folder / "ds_config.json", json.dumps(plan.deepspeed, indent=2) + "\n")
            write_atomically(folder / "environment.json", json.dumps(_environment(world, nodes), indent=2) + "\n")
            if plan.data.tokenizer_folder and not (folder / "tokenizer").exists():
                tmp = folder / ".tmp-tokenizer"
                shutil.rmtree(tmp, ignore_errors=True)
                shutil.copytree(plan.data.tokenizer_folder, tmp)
                tmp.rename(folder / "tokenizer")
            keep_base(plan.config.model.init_from, folder)
        except OSError as problem:
            error = LockedError(
                "the run folder cannot be written", seen=str(problem), do="free space, or choose another"
            )
        except DsgptError as problem:
            error = problem
    world.agree(error, "writing the run's config")


def versions() -> dict[str, str]:
    """Of what can change the numbers of a run; saved with every checkpoint."""
    return {"dsgpt": dsgpt.__version__, "torch": torch.__version__, "deepspeed": version("deepspeed")}


def _environment(world: World, nodes: NodesReport | None) -> dict[str, Any]:
    packages = {name: version(name) for name in ("transformers", "safetensors", "numpy")}
    return {**versions(), "python": sys.version.split()[0], **packages} | {
        "platform": platform.platform(),
        "host": world.host,
        "world_size": world.size,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        **({"num_nodes": nodes.num_nodes, "nodes": nodes.groups} if nodes else {}),
    }


def forecast_space(plan: ResolvedRun, engine: Engine, frozen_bytes: int, world: World, log: RunLog) -> None:
    """Compare what the checkpoints of this run will take with what is free, before the first step.

    Space for one more checkpoint than stay is needed, because the new one is committed before the old one goes; what is
    frozen is written once (`frozen_bytes`). What is free is a hint, not a promise: quotas and other jobs are not seen.
    Raises LockedError with checkpoint.strict_space.
    """
    error, checkpoint = None, plan.config.checkpoint
    if world.is_main:
        elements = sum(math.prod(shape) for shape in engine.parameter_shapes().values())
        if plan.config.fine_tuning.unfreeze_at:
            elements = max(elements, trained_part(plan.model, plan.config.fine_tuning).parameters)
        buffers = sum(value.nbytes for value in engine.buffers().values())
        each = int(_HEADROOM * (4 * len(engine.state_kinds) * elements + buffers))
        saves = -(-plan.last_step // checkpoint.save_interval)
        stay = checkpoint.keep_last or saves
        if checkpoint.keep_last:
            stay += plan.last_step // checkpoint.keep_every if checkpoint.keep_every else 0
            stay += checkpoint.keep_best
        have = len(commit.list_committed(plan.output_dir / "checkpoints"))
        number = max(1, min(stay, saves) + 1 - have)
        stats = os.statvfs(plan.output_dir)
        free, needed = stats.f_bavail * stats.f_frsize, number * each + frozen_bytes
        once = f" and {format_bytes(frozen_bytes)} once of what is not trained" if frozen_bytes else ""
        log.event(
            "space",
            f"checkpoints: {format_bytes(each)} each, {number} more at a time{once} = {format_bytes(needed)}; "
            f"{format_bytes(free)} free",
            checkpoint_bytes=each,
            frozen_bytes=frozen_bytes,
            needed_bytes=needed,
            free_bytes=free,
        )
        if needed > free:
            problem = "the checkpoints of this run will not fit on the disk"
            seen = f"{format_bytes(needed)} needed, {format_bytes(free)} free at {plan.output_dir}"
            do = "free space, lower checkpoint.keep_last, or choose another run.output_dir"
            if checkpoint.strict_space:
                error = LockedError(problem, seen, do)
            else:
                log.event("space_short", f"warning: {problem}: {seen}; {do}")
    world.agree(error, "the forecast of disk space")
