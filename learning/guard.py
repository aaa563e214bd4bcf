"""Steps whose loss is no number: found and taken back on the device, where the host hears of them when it asks."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from learning import parallel
from learning.methods.base import Method, StepOutput
from memory.stores import Bank, Queue

PATIENCE = 10  # steps in a row that may be left out, however often the host asks


class NotFinite(FloatingPointError):
    """After `step` optimizer steps comes one that does not count, nor does any after it.

    `values` tells of its loss, of all processes, and `index` which images it was about, on the CPU.
    """

    def __init__(self, step: int, values: dict[str, float], index: Tensor):
        loss = values["loss"]
        what = "weights became infinite or nan" if math.isfinite(loss) else f"loss became {loss}"
        super().__init__(
            f"The {what} after step {step} ({', '.join(f'{name} {value:.4g}' for name, value in values.items())}); "
            "take a smaller --learning_rate, longer --warmup_epochs or no --amp"
        )
        self.step, self.values, self.index = step, values, index


class Guard:
    """A step counts if its loss, on every process, and the weights it leads to are finite; another one changes nothing.

    With `stop` no step counts after one that does not. What a step may change is copied when it begins: weights,
    momenta, running statistics, but no memories; those are told by `StepOutput.ok` whether to write.
    """

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *, stop: bool):
        memories = (part for part in method.modules() if isinstance(part, (Queue, Bank)))
        spared = {id(x) for memory in memories for x in memory.buffers()}
        tensors = [x.detach() for x in (*method.parameters(), *method.buffers()) if id(x) not in spared]
        self.tensors = [x if x.is_floating_point() else x.view(torch.float64) for x in tensors]  # counters: bit by bit
        self.weights = [p.detach() for p in method.parameters() if p.requires_grad]
        self.optimizer, self.scaler, self.stop = optimizer, scaler, stop
        self.copies: dict[torch.dtype, list[Tensor]] = {}
        self.ok = torch.ones((), dtype=torch.bool, device=self.weights[0].device)
        self.first: list[Tensor] = []  # of the steps that do not count: number, values, images

    def _pairs(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Of each type, what a step may change and its copies; of a momentum that is new 0, which is the same."""
        momenta = (x for state in self.optimizer.state.values() for x in state.values() if x is not None)
        groups: dict[torch.dtype, list[Tensor]] = {}
        for x in (*self.tensors, *momenta):
            groups.setdefault(x.dtype, []).append(x)
        for dtype, now in groups.items():
            copies = self.copies.setdefault(dtype, [])
            copies += [torch.zeros_like(x) for x in now[len(copies) :]]
        return [(now, self.copies[dtype]) for dtype, now in groups.items()]

    def begin(self) -> None:
        """To be called before a step's first forward pass."""
        for now, before in self._pairs():
            torch._foreach_copy_(before, now)

    @torch.no_grad()
    def step(self, out: StepOutput, step: int, index: Tensor) -> StepOutput:
        """Let the optimizer make its step; returns `out` with the verdict on it. `index` (n,): the images."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        values = {"loss": out.loss} | {f"task {name}": share for name, share in out.losses.items()}
        values |= {name: value for name, value in out.stats.items() if name.endswith("_mean")}
        self.names = list(values)
        seen = [torch.full_like(index[0], step), torch.stack([x.float() for x in values.values()]), index]
        self.first = [torch.where(self.ok, new, old) for new, old in zip(seen, self.first or seen)]
        sizes = torch.stack(torch._foreach_norm(self.weights))
        finite = parallel.everywhere(out.loss.isfinite() & sizes.isfinite().all())
        self.ok = self.ok & finite if self.stop else finite
        return replace(out, ok=self.ok)

    def undo(self) -> None:
        """Take the step back unless it counts; to be called when it is over."""
        for now, before in self._pairs():
            _copy_unless(self.ok, before, now)

    def check(self, counted: bool = True, steps: int = PATIENCE) -> None:
        """NotFinite if nothing counts any more: with `stop`, or when none of the last `steps`, PATIENCE or more, has.

        To be called by all processes; the host waits for the device. Afterwards everything is sound, error or not.
        """
        bad = not self.ok and (self.stop or not counted and steps >= PATIENCE)
        if bad or counted:
            self.ok = torch.ones_like(self.ok)
        if bad:
            step, values, index = self.first
            values = dict(zip(self.names, parallel.gather(values[None]).mean(0).tolist()))
            raise NotFinite(int(step), values, parallel.gather(index).cpu())


def _copy_unless(ok: Tensor, sources: list[Tensor], targets: list[Tensor]) -> None:
    """target <- source, unless `ok`, a scalar on the device: then nothing is read or written, and the host never waits.

    Only fused optimizers can be switched off by the device, with `found_inf`, and the first step of SGD copies the
    gradient to the momentum. `torch.where` on every tensor would take 1 % of a step, and on a GPU a kernel for each.
    """
    torch._fused_sgd_(
        sources,  # weights of which nothing is subtracted
        sources,
        targets,
        weight_decay=0.0,
        momentum=1.0,
        lr=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
        found_inf=ok.to(torch.float32),
    )
