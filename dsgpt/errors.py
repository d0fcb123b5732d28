"""Every error a user can meet, with the exit code it ends in.

    DsgptError                 76  infrastructure, the default
    ├── SaveError              76  a checkpoint could not be written
    ├── ConfigError            78  config, command line or environment
    ├── DataError              65  data or tokenizer
    ├── CheckpointError        65  checkpoint
    ├── LockedError            73  output folder locked or not writable
    ├── OutOfMemoryError       77  device or host memory
    ├── NumericalError         79  non-finite loss or gradients
    ├── Preempted              75  stopped from outside, checkpoint committed
    ├── Stopped                 0  stopped by the operator (STOP), checkpoint committed
    ├── PeerError              76  another rank failed; that one knows why
    └── NoProgressError        93  three starts in a row without a new checkpoint

A message says what happened, what was seen, and what to do; `Problem` is one such triple. Errors that can come in
numbers (a config with five typos) carry a list of problems and print all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """The contract with shells, SLURM scripts and supervisors. Only 75 and 76 are worth a requeue."""

    DONE = 0
    USAGE = 2
    BAD_DATA = 65
    LOCKED = 73
    PREEMPTED = 75
    INFRASTRUCTURE = 76
    OUT_OF_MEMORY = 77
    CONFIG = 78
    NUMERICAL = 79
    NO_PROGRESS = 93


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where or what it is, the value seen, and the remedy."""

    what: str
    seen: str = ""
    do: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        if self.seen:
            lines.append(f"  seen: {self.seen}")
        if self.do:
            lines.append(f"  do:   {self.do}")
        return "\n".join(lines)


class DsgptError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the process ends with."""

    exit_code = ExitCode.INFRASTRUCTURE
    cause = ""  # the verdict's word where the exit code's name does not say enough

    def __init__(self, what: str = "", seen: str = "", do: str = "", problems: Sequence[Problem] = ()):
        self.problems = list(problems) or [Problem(what, seen, do)]
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ConfigError(DsgptError):
    exit_code = ExitCode.CONFIG


class DataError(DsgptError):
    exit_code = ExitCode.BAD_DATA


class CheckpointError(DsgptError):
    exit_code = ExitCode.BAD_DATA


class DamagedError(CheckpointError):
    """What was read of a checkpoint is not what was written: an older one may do."""


class SaveError(DsgptError):
    """A checkpoint could not be written; the ones before it are as they were."""

    cause = "save_failed"


class LockedError(DsgptError):
    exit_code = ExitCode.LOCKED


class OutOfMemoryError(DsgptError):
    exit_code = ExitCode.OUT_OF_MEMORY


class NumericalError(DsgptError):
    exit_code = ExitCode.NUMERICAL


class Preempted(DsgptError):
    exit_code = ExitCode.PREEMPTED


class Stopped(DsgptError):
    exit_code = ExitCode.DONE
    cause = "stopped"


class PeerError(DsgptError):
    """Raised on the ranks that only meet a failure of another one."""


class NoProgressError(DsgptError):
    exit_code = ExitCode.NO_PROGRESS
