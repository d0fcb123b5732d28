"""Loss spikes: seen against the losses before them, told with their samples, and by config gone round.

A step's loss is a spike when it lies more than `threshold` standard deviations above the mean of the last `window` losses
(the rule of OLMo-core's SkipStepOptimizer, with the same default of 6). All ranks see the same sums, so all decide the same.

With `action: rollback` the run goes back to its last good checkpoint and leaves out the samples of the spike's step and of
the `skip_steps - 1` before it; everything else is repeated exactly: the learning rate follows the step, dropout the step,
and the samples the run's cursor, which jumps over what is left out (Chowdhery et al. 2022, PaLM, section 5.1, do the
same by hand). What is left out is written to `skipped_samples.json` before the run goes back, so that a crash in between
repeats the decision, not the spike.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from dsgpt.config.schema import LossSpikeSection
from dsgpt.train.state import write_atomically

MIN_LOSSES = 10
MAX_ROLLBACKS_IN_A_ROW = 3
FILE = "skipped_samples.json"


class LossSpikes:
    """The recent losses, and the samples that are left out: [first, number] in the order of the run."""

    def __init__(self, config: LossSpikeSection):
        self.config = config
        self._losses: deque[float] = deque(maxlen=max(1, config.window))
        self.skipped: list[list[int]] = []
        self.rollbacks = 0

    @property
    def recent(self) -> list[float]:
        """To be saved, so that a resumed run judges as an uninterrupted one."""
        return list(self._losses)

    def restore(self, losses: Iterable[float]) -> None:
        self._losses.clear()
        self._losses.extend(losses)

    def is_spike(self, loss: float) -> bool:
        """Judge one step's loss; one that is no spike joins the window."""
        if not self.config.window or not math.isfinite(loss):
            return False  # what is not finite is a bad step, left out by itself
        if len(self._losses) >= min(MIN_LOSSES, self.config.window):
            mean = statistics.fmean(self._losses)
            deviation = statistics.pstdev(self._losses, mean)
            if loss > mean + self.config.threshold * max(deviation, 1e-6 * abs(mean)):
                return True
        self._losses.append(loss)
        return False

    # ---- samples left out ------------------------------------------------------------------------------------------

    def next_start(self, sample: int) -> int:
        """Where a step begins whose samples would begin at `sample`: behind what is left out there."""
        for first, number in sorted(self.skipped):
            if first <= sample < first + number:
                sample = first + number
        return sample

    def skip(self, folder: Path, first: int, number: int, write: bool) -> None:
        """Leave samples out from now on; `write` on the rank that keeps the file."""
        self.skipped = sorted([*self.skipped, [first, number]])
        if write:
            write_atomically(folder / FILE, json.dumps(self.skipped) + "\n")

    @staticmethod
    def read(folder: Path) -> list[list[int]]:
        try:
            return [[int(first), int(number)] for first, number in json.loads((folder / FILE).read_text("utf-8"))]
        except FileNotFoundError:
            return []
