"""Running averages that stay on the device until somebody asks to see them."""

from typing import Any

import torch
from torch import Tensor

from learning import parallel


class Meters:
    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.count: Tensor | int = 0  # those of the steps that count, on the device

    def add(self, stats: dict[str, Tensor], ok: Tensor | bool = True) -> None:
        """Take scalars on the device, 0 unless the step is `ok`; every call brings the same names."""
        for name, value in stats.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.float()
        self.steps += 1
        self.count = self.count + ok

    def read(self) -> dict[str, float]:
        """Averages since the last read, over all ranks, and how many steps were "skipped", if any; start anew.

        One reduction and two copies to the host.
        """
        means = dict(zip(self.sums, (self._each_rank().mean(0) / self.count).tolist())) if self.sums else {}
        skipped = self.steps - int(self.count)
        self.sums, self.steps, self.count = {}, 0, 0
        return means | ({"skipped": skipped} if skipped else {})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on in the middle of an average."""
        return {
            "sums": dict(zip(self.sums, self._each_rank().cpu().unbind(1))) if self.count else {},
            "count": int(self.count),
            "skipped": self.steps - int(self.count),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        rows = {name: value.reshape(-1) for name, value in state["sums"].items()}  # a number each in older checkpoints
        self.sums = {name: parallel.own_or_mean(value).to(device) for name, value in rows.items()}
        self.count, self.steps = state["count"], state["count"] + state.get("skipped", 0)

    def _each_rank(self) -> Tensor:
        return parallel.each_rank(torch.stack(list(self.sums.values())))
