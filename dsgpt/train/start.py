"""Starting a run from a config: find the hardware, resolve everything, hand over to the launcher.

    end = start_run(["run.yaml", "training.max_steps=100"])

Torch-free: what is wrong is said here, before 10 seconds of imports on every rank.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import starts
from dsgpt.checkpoint.commit import attempt_of, list_committed
from dsgpt.config import LoadedConfig, load_config, split_arguments, to_yaml
from dsgpt.errors import ConfigError, ExitCode
from dsgpt.launch.follow import Follower
from dsgpt.launch.hardware import Hardware, detect
from dsgpt.launch.launcher import Job, JobEnd, launch_commands, run_job
from dsgpt.launch.remote import Remote
from dsgpt.train.changes import check_same_run
from dsgpt.train.resolve import ResolvedRun, nothing_left, resolve_run
from dsgpt.verdict import MAX_STARTS_WITHOUT_PROGRESS

CPU_RANKS = 2


@dataclass(frozen=True)
class Plan:
    """What `dsgpt train` would start."""

    run: ResolvedRun
    job: Job
    hardware: Hardware
    loaded: LoadedConfig
    changes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "config": self.run.config.model_dump(mode="json"),
            "deepspeed": self.run.deepspeed,
            "max_steps": self.run.max_steps,
            "world_size": self.run.world_size,
            "gradient_accumulation_steps": self.run.gradient_accumulation_steps,
            "command": next(iter(self.commands.values())),
            "commands": self.commands,
            "warnings": self.loaded.warnings,
        }

    def text(self) -> str:
        """Everything resolved, for people: the arithmetic, config.yaml, ds_config.json and the launcher's command."""
        parts = [f"hardware   {self.hardware}", self.run.describe()]
        parts += [f"warning: {text}" for text in self.loaded.warnings]
        parts += [f"changed since the last start: {text}" for text in self.changes]
        parts += ["", "# config.yaml", to_yaml(self.run.config).rstrip()]
        parts += ["", "# ds_config.json", json.dumps(self.run.deepspeed, indent=2)]
        parts += ["", "# command", *(shlex.join(command) for command in self.commands.values())]
        return "\n".join(parts)

    @cached_property
    def commands(self) -> dict[str, list[str]]:
        """Name of a host or program -> what would be started for it here."""
        return launch_commands(self.job, "ATTEMPT", self.run.output_dir / "logs/ATTEMPT")


def plan_run(
    arguments: Sequence[str],
    num_processes: int | None = None,
    debug: bool = False,
    may_hide_gpus: bool = False,
    remote: Remote | None = None,
) -> Plan:
    """Resolve a run for this machine, or for the hosts of `remote`. Raises ConfigError, DataError or CheckpointError.

    Nothing is started. Fewer ranks than GPUs are refused, unless whoever starts them hides the other GPUs.
    """
    paths, overrides = split_arguments(arguments)
    loaded = load_config(paths, overrides)
    hardware = detect()
    wanted = loaded.config.device
    if remote is None:
        device, processes = _ranks_here(hardware, wanted, num_processes, may_hide_gpus)
    else:
        # What the hosts have is looked at there, by their ranks; here only what the config can be checked with.
        processes = remote.num_ranks
        device = hardware.device if wanted == "auto" else wanted
        hardware = hardware if remote.includes_here else replace(hardware, gpu_memory_bytes=None)
    run = resolve_run(
        loaded.config,
        world_size=processes,
        device=device,
        gpu_memory_bytes=hardware.gpu_memory_bytes if device == "cuda" else None,
        bf16=hardware.bf16,
    )
    threads = max(1, hardware.cpu_count // processes)
    if remote is not None and wanted == "auto" and not remote.includes_here:
        device = wanted
    job = Job(tuple(arguments), run.output_dir, processes, device, threads, debug, remote)
    return Plan(run, job, hardware, loaded, check_same_run(run))


def _ranks_here(hardware: Hardware, wanted: str, num_processes: int | None, may_hide_gpus: bool) -> tuple[str, int]:
    """(device, number of ranks) on this machine. Raises ConfigError where GPUs are missing or would idle."""
    if hardware.problems and wanted != "cpu":
        raise ConfigError(problems=hardware.problems)
    device = hardware.device if wanted == "auto" else wanted
    if device == "cuda" and not hardware.num_gpus:
        raise ConfigError("device=cuda, but there is no GPU here", seen=str(hardware), do="device=auto or device=cpu")
    processes = num_processes or (hardware.num_gpus if device == "cuda" else CPU_RANKS)
    if device == "cuda" and processes < hardware.num_gpus and not may_hide_gpus:
        raise ConfigError(
            "fewer ranks than GPUs on this node",
            seen=f"--num-processes {processes}, {hardware.num_gpus} GPUs",
            do=f"--num-gpus {processes}, which hides the others, or hide them with CUDA_VISIBLE_DEVICES",
        )
    if device == "cuda" and processes > hardware.num_gpus and may_hide_gpus:
        seen = f"--num-gpus {processes}, {hardware.num_gpus} GPUs"
        raise ConfigError("more GPUs wanted than there are", seen, f"--num-gpus {hardware.num_gpus}")
    return device, processes


def start_run(
    arguments: Sequence[str],
    num_processes: int | None = None,
    quiet: bool = False,
    debug: bool = False,
    may_hide_gpus: bool = False,
    remote: Remote | None = None,
) -> JobEnd:
    """Start a run on this machine, or on the hosts of `remote`, and wait for its end."""
    plan = plan_run(arguments, num_processes, debug, may_hide_gpus, remote)
    message = nothing_left(plan.run)
    if message:
        return JobEnd(0, message, plan.run.output_dir / "logs")
    if not quiet:
        for warning in plan.loaded.warnings:
            print(f"warning: {warning}", flush=True)
    end = run_job(plan.job, lambda folder, attempt: Follower(folder, attempt, quiet))
    return _judge_progress(plan.run.output_dir, end)


def _judge_progress(output_dir: Path, end: JobEnd) -> JobEnd:
    """Three failed starts in a row without a new checkpoint end with 93 instead of 76: another one would not help."""
    if end.exit_code != ExitCode.INFRASTRUCTURE:
        return end
    commits = [(step, attempt_of(path)) for step, path in list_committed(output_dir / "checkpoints")]
    failed = starts.starts_without_progress(output_dir, starts.read_starts(output_dir), commits)
    if failed < MAX_STARTS_WITHOUT_PROGRESS:
        return end
    message = f"{end.message}\n{failed} starts in a row ended without a new checkpoint: not worth another one as it is"
    return JobEnd(ExitCode.NO_PROGRESS, message, end.log_file)
