"""One training process: what `deepspeed --module dsgpt.train RUN.yaml` starts on every rank.

Signal handlers come first, before torch is imported: until then SIGTERM means death. Every end has an exit code of the
contract in errors.py and leaves a file `logs/<attempt>/end-rank-<n>.json`; the first one to know how the job ends writes
the verdict, `end.json`, and all ranks leave with its code. A watchdog process beside each rank sees to those that cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from dsgpt.errors import ConfigError, DsgptError, ExitCode, LockedError, OutOfMemoryError, PeerError
from dsgpt.launch import slurm
from dsgpt.lease import LEASE_SECONDS
from dsgpt.process import (
    StopRequest,
    complain,
    host_name,
    log_dir_of_environment,
    rank_of_environment,
    tune_allocator,
)
from dsgpt.verdict import Verdict, read_verdict, record_verdict
from dsgpt.watchdog import Heartbeat, start_watchdog

BYSTANDER_SECONDS = 5.0
MEET_SECONDS = 30.0  # imports take different times on different nodes
NO_TIMEOUT_SECONDS = 86400.0
LEAVE_SECONDS = 600.0  # all have saved: only the last files of a metrics log or a writer can still be under way


def main(argv: list[str]) -> NoReturn:
    """Run one rank; ends the process with the job's exit code."""
    stop, in_step = StopRequest(), slurm.in_step()
    stop.install(scheduler=in_step)
    stop.watch_launcher()
    arguments = [text for text in argv if not text.startswith("--local_rank") and text != "--debug"]
    debug = "--debug" in argv
    end = _End(start_watchdog(rank_of_environment()))
    try:
        slurm.adopt_rank_environment()
        _train(slurm.fill_task(arguments), stop, end)
        code, message = ExitCode.DONE, ""
    except DsgptError as error:
        code, message = error.exit_code, str(error)
        end.bystander, end.cause = isinstance(error, PeerError), error.cause
        if debug:
            complain(traceback.format_exc())
    except BaseException as error:
        code, message = _foreign(error)
        end.bystander = code == ExitCode.INFRASTRUCTURE and _lost_a_peer(error)
        if code != ExitCode.OUT_OF_MEMORY:
            complain(traceback.format_exc())
    if code in (ExitCode.DONE, ExitCode.PREEMPTED):
        _leave_together(end.heartbeat)
    code = end.write(code, message)
    if message and (end.rank == 0 or code not in (ExitCode.PREEMPTED, ExitCode.DONE)):
        complain(message)
    # Leaving the normal way may wait for collectives that never end, and runs destructors of threads still at work.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe must not change the code
            stream.flush()
    os._exit(0 if in_step and code == ExitCode.PREEMPTED else int(code))


def _leave_together(heartbeat: Heartbeat) -> None:
    """Wait for the slowest rank: launchers kill it some time after the first has left. A lost one changes nothing any more."""
    from dsgpt import distributed

    heartbeat.phase("leave with the others", seconds=LEAVE_SECONDS)
    with contextlib.suppress(Exception):
        distributed.last_barrier()
        distributed.stop()


class _End:
    """Writes how this rank ended, once its run folder and rank are known, and learns how the job ends."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self.folder = log_dir_of_environment()  # whoever started the job may have made it already
        self.rank, self.host = rank_of_environment(), host_name()
        self.bystander, self.cause = False, ""

    def write(self, code: ExitCode, message: str) -> ExitCode:
        """Write this rank's end and, where it is the first to know, the job's verdict; returns the job's exit code.

        A rank that only lost its peer leaves the word to the peer's watchdog for some seconds: that one knows the cause.
        """
        if self.folder is None or not self.folder.is_dir():
            self.heartbeat.end()
            return code
        told, known = self.heartbeat.information, bool(code) and not self.bystander
        verdict = Verdict(
            int(code),
            self.cause or code.name.lower(),
            message,
            self.rank if known else -1,
            self.host if known else "",
            self.heartbeat.step,
            self.heartbeat.current_phase,
            told.get("last_committed", -1),
            told.get("committed_here", False),
        )
        text = json.dumps({"rank": self.rank, "exit_code": int(code), "cause": verdict.cause, "message": message})
        with contextlib.suppress(OSError):  # a full disk must not hide why the run ended: stderr has it too
            (self.folder / f"end-rank-{self.rank:05d}.json").write_text(text + "\n", encoding="utf-8")
        if self.bystander:
            until = time.monotonic() + BYSTANDER_SECONDS
            while read_verdict(self.folder) is None and time.monotonic() < until:
                time.sleep(0.1)
        if self.rank == 0 or code not in (ExitCode.DONE, ExitCode.PREEMPTED):
            # The folder is another job's where this one was refused; that job's events are not ours to write.
            tell = code != ExitCode.LOCKED
            verdict = record_verdict(self.folder, verdict.after(told.get("failed_starts", 0)), tell)
        self.heartbeat.end()
        return ExitCode(verdict.exit_code)

    def cut_off(self, message: str) -> None:
        """Another job trains in this folder: whatever this one still wrote could only do harm."""
        complain(message)
        self.write(ExitCode.LOCKED, message)
        os._exit(int(ExitCode.LOCKED))


def _train(arguments: list[str], stop: StopRequest, end: _End) -> None:
    from dsgpt.config import load_config, split_arguments
    from dsgpt.launch import openmpi

    openmpi.adopt()
    loaded = load_config(*split_arguments(arguments))

    from dsgpt import distributed, engine
    from dsgpt.device import choose_device
    from dsgpt.launch.local_ranks import expected_hosts
    from dsgpt.train.loop import train
    from dsgpt.train.resolve import resolve_run
    from dsgpt.train.startup import resolve_together

    timeout = loaded.config.run.hang_timeout_seconds
    meeting = max(timeout, MEET_SECONDS) if timeout else NO_TIMEOUT_SECONDS
    # torch tries twice for as long; its own message comes before the watchdog.
    end.heartbeat.phase("meet the other ranks", 0, 3 * meeting)
    engine.prepare_process()
    device = choose_device(loaded.config.device)
    if device.kind == "cpu":
        tune_allocator()
    # The others wait for rank 0 while it looks whether another job still holds the folder.
    patience = max(3 * timeout, LEASE_SECONDS + MEET_SECONDS) if timeout else NO_TIMEOUT_SECONDS
    world = distributed.start(device.kind, patience, meeting, expected_hosts())
    stop.patient = True
    end.rank = world.rank
    try:
        engine.init_distributed(world)
        device.check_ranks(world.local_size)
        plan = resolve_together(
            world,
            lambda: resolve_run(
                loaded.config,
                world_size=world.size,
                device=device.kind,
                gpu_memory_bytes=device.memory_bytes,
                bf16=device.bf16,
            ),
        )
        end.heartbeat.phase("take the run folder", 0, patience + MEET_SECONDS if timeout else 0.0)
        with distributed.folder_lease(plan.output_dir, world, end.cut_off) as lease:
            log_dir = plan.output_dir / "logs" / world.attempt
            _make_log_dir(log_dir, world)
            end.folder = log_dir
            end.heartbeat.attach(log_dir, world.rank)
            end.heartbeat.tell(plan=plan.memory_text(), remedies=_remedies(loaded.config))
            train(plan, world, stop, end.heartbeat, lease.check if lease else lambda: None)
    except Exception as error:
        explained = _explain_memory(error, loaded.config, end.heartbeat)
        if explained is error:
            raise
        raise explained from error


def _make_log_dir(folder: Path, world: Any) -> None:
    error = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            error = LockedError("the run folder cannot be written", str(problem), "choose another run.output_dir")
    world.require_folder(error)


def _remedies(config: Any) -> list[str]:
    """The two cheapest changes that need less memory, as key=value."""
    micro = config.training.micro_batch_size_per_gpu
    smaller = micro // 2 if isinstance(micro, int) and micro > 1 else 1
    changes = [f"training.micro_batch_size_per_gpu={smaller}"] if micro != 1 else []
    if config.training.activation_checkpointing != "full":
        changes.append("training.activation_checkpointing=full")
    return [*changes, "deepspeed=zero3"][:2]


def _explain_memory(error: Exception, config: Any, heartbeat: Heartbeat) -> Exception:
    """Turn running out of memory into an error that names the two cheapest changes; other errors pass through."""
    text = str(error)
    if not (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or isinstance(error, MemoryError)
    ):
        return error
    if isinstance(error, DsgptError):
        return error
    told = heartbeat.information
    seen = (text.splitlines() or [type(error).__name__])[0]
    where = f"in {heartbeat.current_phase!r} at step {heartbeat.step}"
    use = "; ".join(str(told[key]) for key in ("plan", "use") if key in told)
    return OutOfMemoryError(f"out of memory {where}", seen=f"{seen} ({use})", do=" or ".join(_remedies(config)))


def _foreign(error: BaseException) -> tuple[ExitCode, str]:
    """An error that is not ours: most often another rank that is gone, else a defect worth its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INFRASTRUCTURE, "interrupted"
    if isinstance(error, (ValueError, TypeError)) and isinstance(error.__cause__, ConfigError):
        return ExitCode.CONFIG, str(error)
    return ExitCode.INFRASTRUCTURE, f"{type(error).__name__}: {error}"


def _lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: torch says so in a message only."""
    text = f"{type(error).__name__}: {error}".lower()
    return any(part in text for part in ("closed by peer", "reset by peer", "distbackenderror", "broken pipe", "nccl"))
