"""One training process: what `deepspeed --module dsgpt.train RUN.yaml` starts on every rank.

Signal handlers come first, before torch is imported: until then SIGTERM means death. Every end has an exit code of the
contract in errors.py and leaves a file `logs/<attempt>/end-rank-<n>.json`, from which `dsgpt train` tells the cause even
when the launcher changed the code.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from dsgpt.errors import ConfigError, DsgptError, ExitCode, OutOfMemoryError
from dsgpt.process import StopRequest


def main(argv: list[str]) -> int:
    """Run one rank; returns the exit code."""
    stop = StopRequest()
    stop.install()
    stop.watch_launcher()
    arguments = [text for text in argv if not text.startswith("--local_rank") and text != "--debug"]
    debug = "--debug" in argv
    end = _End()
    try:
        _train(arguments, stop, end)
        code, message = ExitCode.DONE, ""
    except DsgptError as error:
        code, message = error.exit_code, str(error)
        if debug:
            traceback.print_exc()
    except BaseException as error:
        code, message = _foreign(error)
        if code != ExitCode.OUT_OF_MEMORY:
            traceback.print_exc()
    end.write(code, message)
    if message and (end.rank == 0 or code not in (ExitCode.PREEMPTED, ExitCode.DONE)):
        print(message, file=sys.stderr, flush=True)
    return int(code)


class _End:
    """Writes how this rank ended, once its run folder and rank are known."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.rank = 0

    def write(self, code: ExitCode, message: str) -> None:
        if self.folder is None or not self.folder.is_dir():
            return
        text = json.dumps({"rank": self.rank, "exit_code": int(code), "cause": code.name.lower(), "message": message})
        with contextlib.suppress(OSError):  # a full disk must not hide why the run ended: stderr has it too
            (self.folder / f"end-rank-{self.rank:05d}.json").write_text(text + "\n", encoding="utf-8")


def _train(arguments: list[str], stop: StopRequest, end: _End) -> None:
    from dsgpt.config import load_config, split_arguments

    loaded = load_config(*split_arguments(arguments))

    from dsgpt import distributed, engine
    from dsgpt.train.device import choose_device
    from dsgpt.train.loop import train
    from dsgpt.train.resolve import resolve_run

    engine.prepare_process()
    device = choose_device(loaded.config.device)
    world = distributed.start(device.kind)
    end.rank = world.rank
    try:
        engine.init_distributed(world)
        device.check_ranks(world.local_size)
        plan = resolve_run(
            loaded.config,
            world_size=world.size,
            device=device.kind,
            gpu_memory_bytes=device.memory_bytes,
            bf16=device.bf16,
        )
        with distributed.folder_lock(plan.output_dir, world):
            end.folder = plan.output_dir / "logs" / world.attempt
            train(plan, world, stop)
    except Exception as error:
        raise _explain_memory(error, loaded.config) from error
    finally:
        if sys.exc_info()[0] is None:
            distributed.stop()


def _explain_memory(error: Exception, config: Any) -> Exception:
    """Turn running out of memory into an error that names the two cheapest changes; other errors pass through."""
    text = str(error)
    if not (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or isinstance(error, MemoryError)
    ):
        return error
    if isinstance(error, DsgptError):
        return error
    micro = config.training.micro_batch_size_per_gpu
    smaller = micro // 2 if isinstance(micro, int) and micro > 1 else 1
    changes = [f"training.micro_batch_size_per_gpu={smaller}"] if micro != 1 else []
    if config.training.activation_checkpointing != "full":
        changes.append("training.activation_checkpointing=full")
    changes.append("deepspeed=zero3")
    return OutOfMemoryError(
        "out of memory", seen=(text.splitlines() or [type(error).__name__])[0], do=" or ".join(changes[:2])
    )


def _foreign(error: BaseException) -> tuple[ExitCode, str]:
    """An error that is not ours: most often another rank that is gone, else a defect worth its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INFRASTRUCTURE, "interrupted"
    if isinstance(error, (ValueError, TypeError)) and isinstance(error.__cause__, ConfigError):
        return ExitCode.CONFIG, str(error)
    return ExitCode.INFRASTRUCTURE, f"{type(error).__name__}: {error}"
