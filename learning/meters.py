"""Running averages that stay on the device until somebody asks to see them."""

from typing import Any

import torch
from torch import Tensor

from learning import parallel


class Meters:
    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, stats: dict[str, Tensor]) -> None:
        """Take scalars on the device; every call brings the same names."""
        for name, value in stats.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.float()
        self.count += 1

    def means(self) -> dict[str, float]:
        """Averages since the last read, over all ranks. One reduction and one copy to the host."""
        return dict(zip(self.sums, (self._each_rank().mean(0) / self.count).tolist())) if self.count else {}

    def read(self) -> dict[str, float]:
        """`means`, and start anew."""
        means = self.means()
        self.sums, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on in the middle of an average."""
        return {
            "sums": dict(zip(self.sums, self._each_rank().cpu().unbind(1))) if self.count else {},
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        rows = {name: value.reshape(-1) for name, value in state["sums"].items()}  # a number each in older checkpoints
        self.sums = {name: parallel.own_or_mean(value).to(device) for name, value in rows.items()}
        self.count = state["count"]

    def _each_rank(self) -> Tensor:
        return parallel.each_rank(torch.stack(list(self.sums.values())))
