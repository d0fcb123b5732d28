"""fp16's loss scale: DeepSpeed's own rule, applied once a step is over and only where the scale is to blame.

The loss is multiplied by a scale so that small gradients survive in fp16; before the optimizer sees the gradients they are
divided by it again. DeepSpeed's DynamicLossScaler halves the scale when gradients overflow and doubles it after
`fp16.loss_scale_window` steps without. Left to itself (0.19.8) it does so before the gradients are divided, so a step in
which the scale grows is applied with half its gradients; it ends the run with an exception of its own at the smallest
scale; and it blames itself for a loss that is not finite. So it is kept still during a step and told afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """Holds DeepSpeed's scaler, dynamic or (with `fp16.loss_scale` set) constant."""

    def __init__(self, scaler: Any):
        self._scaler, self._update = scaler, scaler.update_scale
        scaler.update_scale = lambda overflow: None
        scaler.raise_error_at_min_scale = False

    @property
    def value(self) -> float:
        return float(self._scaler.cur_scale)

    @property
    def can_be_lowered(self) -> bool:
        return bool(self._scaler.dynamic and self._scaler.cur_scale > self._scaler.min_scale)

    def after_step(self, overflow: bool) -> None:
        """Tell the scaler whether the step's gradients overflowed; the same on all ranks."""
        self._update(overflow)

    @property
    def numbers(self) -> dict[str, float]:
        """Everything that the next scales depend on, beside the config."""
        return {name: getattr(self._scaler, name) for name in _NUMBERS if hasattr(self._scaler, name)}

    def restore(self, numbers: Mapping[str, float]) -> None:
        """Set what `numbers` returned earlier; a constant scale is the config's and stays."""
        if self._scaler.dynamic:
            for name in _NUMBERS:
                setattr(self._scaler, name, numbers[name])

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Scale 1 meanwhile, and afterwards the numbers from before."""
        before = self.numbers
        self._scaler.cur_scale = 1.0
        try:
            yield
        finally:
            for name, number in before.items():
                setattr(self._scaler, name, number)
