"""Steps that are left out: which are bad, and when they end the run.

A step whose loss or gradients are not finite changes nothing on any rank: weights, moments and the optimizer's own step
count, which corrects AdamW's bias, stay. The run's step counter moves on and with it learning rate and data, so the same
samples are not tried again; a run with steps left out is not shifted against its schedule. Five bad steps in a row end it
with 79 and leave `logs/<attempt>/evidence.json`: samples, losses of every rank, seed and last checkpoint of these steps,
which is all that is needed to repeat them.

Under fp16 gradients may be finite and yet too large for fp16 once the loss is multiplied by the loss scale. Such a step is
left out too, but it is no bad one while a lower scale is left to try: the first steps of a run find the scale that fits,
and every `fp16.loss_scale_window` steps the next higher one is tried.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsgpt.distributed import World
from dsgpt.errors import NumericalError
from dsgpt.train.state import RunLog, write_atomically
from dsgpt.train.step import StepReport

MAX_CONSECUTIVE_BAD_STEPS = 5
EVIDENCE = "evidence.json"


class LeftOutSteps:
    """Reports steps that were left out and counts the bad ones in a row. `folder` is where the evidence goes."""

    def __init__(self, log: RunLog, world: World | None = None, folder: Path | None = None, seed: int = 0):
        self._log, self._world, self._folder, self._seed = log, world or World(), folder, seed
        self._bad: list[dict[str, Any]] = []

    def check(
        self,
        report: StepReport,
        step: int,
        last_committed: int,
        loss_scale: float | None,
        sample_ids: Sequence[int] = (),
    ) -> None:
        """Look at one step's report; `loss_scale` is the scale after it, None where not fp16.

        Raises NumericalError after five bad steps in a row. A lowered scale neither counts nor breaks the row.
        """
        if report.overflow:
            text = f"step {step} left out: gradients overflow fp16 at loss scale {report.loss_scale:g}, next {loss_scale:g}"
            self._log.event("loss_scale_lowered", text, step=step, old=report.loss_scale, new=loss_scale)
            return
        if report.applied and math.isfinite(report.loss) and math.isfinite(report.gradient_norm):
            self._bad.clear()
            return
        scale = "" if report.loss_scale is None else f", loss scale {report.loss_scale:g}"
        seen = f"step {step}: loss {report.loss}, gradient norm {report.gradient_norm}{scale}"
        fields = {"loss": str(report.loss), "gradient_norm": str(report.gradient_norm), "loss_scale": report.loss_scale}
        self._log.event("bad_step", f"warning: left out {seen}", step=step, **fields)
        # Who has the bad number is worth a small gather in this rare case.
        per_rank = self._world.gather_objects(str(report.local_loss))
        self._bad.append(
            {"step": step, **fields, "loss_sum_of_rank": per_rank, "sample_ids": [int(i) for i in sample_ids]}
        )
        if len(self._bad) < MAX_CONSECUTIVE_BAD_STEPS:
            return
        if self._folder is not None and self._world.is_main:
            bundle = {"seed": self._seed, "last_committed": last_committed, "steps": self._bad}
            write_atomically(self._folder / EVIDENCE, json.dumps(bundle, indent=1) + "\n")
        raise NumericalError(
            f"the loss or the gradients are not finite ({len(self._bad)} steps in a row)",
            seen=seen + (f"; evidence: {self._folder / EVIDENCE}" if self._folder else ""),
            do=f"lower optimizer.learning_rate and start again: it continues from step {max(last_committed, 0)}",
        )
