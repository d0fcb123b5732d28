"""When to stop before a scheduler's time limit ends the job: late enough to train, early enough to commit.

The batch script says when the job ends (DSGPT_JOB_END_TIME); SIGUSR1, sent by SLURM ahead of the limit, is the other way to
learn it, and whichever comes first counts. What a commit needs is measured in this very run: the longest step and the
longest save so far, both twice, since a file system is slower when all jobs of a site save, and a margin for leaving.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from dsgpt.launch import slurm

MARGIN_SECONDS, MARGIN_SHARE = 90.0, 0.1


@dataclass
class TimeLimit:
    """`end` in seconds since 1970, None without a limit; `total` is what the job got, for the margin of short jobs."""

    end: float | None = None
    total: float = 0.0
    longest_step: float = 0.0
    longest_save: float = 0.0

    @classmethod
    def of_job(cls) -> TimeLimit:
        end, total = slurm.get("DSGPT_JOB_END_TIME"), slurm.get("DSGPT_JOB_SECONDS")
        return cls(float(end), float(total or 0)) if end.isdecimal() else cls()

    def stepped(self, seconds: float) -> None:
        self.longest_step = max(self.longest_step, seconds)

    def saved(self, seconds: float) -> None:
        self.longest_save = max(self.longest_save, seconds)

    @property
    def needed(self) -> float:
        """Seconds from being asked to stop until the job has left."""
        margin = min(MARGIN_SECONDS, MARGIN_SHARE * self.total) if self.total > 0 else MARGIN_SECONDS
        return 2 * (self.longest_step + self.longest_save) + margin

    def is_near(self, now: float | None = None) -> bool:
        return self.end is not None and (time.time() if now is None else now) + self.needed >= self.end
