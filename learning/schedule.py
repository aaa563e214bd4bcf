"""Learning rates as functions of the step: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass
from typing import Literal


def cosine(progress: float, peak: float, floor: float = 0.0) -> float:
    """Half a cosine from `peak` at progress 0 to `floor` at 1 (Loshchilov & Hutter, 2017)."""
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Schedule:
    """The learning rate at every step.

    Cosine falls to base * decay_rate^3; otherwise the rate is multiplied by `decay_rate` after each milestone epoch.
    `per="step"` moves with every step; `per="epoch"` holds the rate for an epoch and counts epochs from one, as
    PyContrast does, so that the last epoch runs at the floor. Warm-up is linear, from base / 10 to where the schedule
    stands at its end.
    """

    base: float
    epochs: int
    steps_per_epoch: int
    cosine: bool
    milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1
    warmup_epochs: int = 0
    per: Literal["step", "epoch"] = "step"

    def __call__(self, step: int) -> float:
        """Learning rate of the 0-based global `step`."""
        warmup = self.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            start = self.base / 10
            return start + (self._plain(warmup - 1) - start) * step / warmup
        return self._plain(step)

    def _plain(self, step: int) -> float:
        if not self.cosine:
            passed = sum(step // self.steps_per_epoch >= milestone for milestone in self.milestones)
            return self.base * self.decay_rate**passed
        epoch = step / self.steps_per_epoch if self.per == "step" else step // self.steps_per_epoch + 1
        return cosine(min(epoch / self.epochs, 1.0), self.base, self.base * self.decay_rate**3)
