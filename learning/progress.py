"""What a run shows while it trains, and the statistics it collects on the way."""

import math
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from learning import checkpoint, parallel
from learning.bad_images import BadImages
from learning.guard import Guard
from learning.meters import Meters
from learning.methods.base import Method, StepOutput
from learning.run import Run, SilentRun
from memory import look, scores


class ScoreRecorder:
    """Collects score rows on the device until the epoch is over."""

    def __init__(self):
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.steps: list[int] = []
        self.ok: list[Tensor] = []
        self.past: dict[str, Tensor] | None = None  # all ranks' rows from before a resume

    def add(self, step: int, rows: Tensor, index: Sequence[Tensor], ok: Tensor) -> None:
        """rows (n, C) of a step, of each of its parts the images' numbers, together (n,), and whether it counts."""
        self.parts.append((rows.unflatten(0, (len(index), -1)), torch.stack([*index])))
        self.steps.append(step + 1)
        self.ok.append(ok)

    def state_dict(self) -> dict[str, Tensor] | None:
        """The open epoch over all ranks, on the CPU: rows (S, B, C), index (S, B), step (S,); None before any step."""
        counted = torch.stack(self.ok).tolist() if self.ok else []
        if not any(counted):
            return self.past
        rows, index = (_join_ranks(torch.stack(parts)) for parts in zip(*compress(self.parts, counted)))
        new = {"rows": rows, "index": index, "step": torch.tensor([*compress(self.steps, counted)])}
        if self.past is None:
            return new
        columns = min(rows.shape[-1], self.past["rows"].shape[-1])  # FT may have been switched on or off in between
        both = ({**part, "rows": part["rows"][..., :columns]} for part in (self.past, new))
        return {name: torch.cat(parts) for name, parts in zip(new, zip(*(part.values() for part in both)))}

    def write(self, path: Path, **scalars: float) -> None:
        """Save the epoch's file, if anything was recorded, and start anew."""
        state = self.state_dict()
        if parallel.is_main() and state is not None:
            arrays = {name: value.numpy() for name, value in state.items()}
            path.parent.mkdir(exist_ok=True)
            checkpoint.write(path, partial(scores.write_file, rows=arrays.pop("rows"), **arrays, **scalars))
        self.parts, self.steps, self.ok, self.past = [], [], [], None


def _join_ranks(stacked: Tensor) -> Tensor:
    """(S, parts, n, ...) per rank -> (S, parts * world * n, ...): ranks hold consecutive rows of each part."""
    whole = parallel.gather(stacked.flatten(0, 1).transpose(0, 1).contiguous()).transpose(0, 1)
    return whole.reshape(len(stacked), -1, *whole.shape[2:]).cpu().contiguous()


class GradientNorms:
    """The norm of each layer's gradient at every `every`-th step (0: never), on the device until a log line is due."""

    def __init__(self, every: int):
        self.every = every
        self.seen: list[tuple[int, list[str], Tensor]] = []  # step, names of the parameters, norm of each

    def observe(self, step: int, method: Method, guard: Guard) -> None:
        """To be called when gradients are complete, before the optimizer's step."""
        if self.every and (step + 1) % self.every == 0:
            guard.scaler.unscale_(guard.optimizer)
            gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
            self.seen.append((step + 1, [*gradients], torch.stack(torch._foreach_norm([*gradients.values()]))))

    def take(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Steps and the norms of their layers, modules that have parameters of their own; then start anew.

        One copy to the host for each step. Steps whose gradient is not finite are left out.
        """
        seen, self.seen = self.seen, []
        for step, names, norms in seen:
            layers: dict[str, float] = {}
            for name, norm in zip(names, norms.tolist()):
                layer = name.rpartition(".")[0]
                layers[layer] = math.hypot(layers.get(layer, 0.0), norm)
            if all(map(math.isfinite, layers.values())):
                yield step, layers


def _accuracy(values: dict[str, float]) -> str:
    """Contrast accuracy, of methods that have negatives."""
    if "contrast_acc" not in values:
        return ""
    before = f" (before FT {values['before_contrast_acc']:.1%})" if "before_contrast_acc" in values else ""
    return f"contrast acc {values['contrast_acc']:.1%}{before}  "


def _skipped(values: dict[str, float]) -> str:
    return f"skipped {values['skipped']}  " if "skipped" in values else ""


class Progress:
    """Observes every step: averages, a log line every `print_freq` steps, a progress bar on a terminal, scores.

    Steps that do not count are left out, and `guard` is asked about them. Nothing is read from the device between two
    log lines. `run` is set before the first step.
    """

    run: Run | SilentRun

    def __init__(
        self,
        *,
        epochs: int,
        steps_per_epoch: int,
        batch_size: int,
        print_freq: int,
        save_score: bool,
        grad_norms: int,
        bad_images: BadImages,
        guard: Guard,
    ):
        self.print_freq, self.batch_size, self.guard = print_freq, batch_size, guard
        self.steps_per_epoch, self.total = steps_per_epoch, epochs * steps_per_epoch
        self.window, self.epoch = Meters(), Meters()
        self.scores = ScoreRecorder() if save_score else None
        self.gradients = GradientNorms(grad_norms)
        self.bad_images = bad_images
        silent = None if parallel.is_main() else True  # None: where there is no terminal
        self.bar = tqdm(total=self.total, disable=silent, unit=" images", unit_scale=batch_size, dynamic_ncols=True)

    def start_epoch(self, step: int) -> None:
        if self.bar.n != step:  # a resumed run
            self.bar.initial = self.bar.n = step
        self.clock, self.clock_step, self.waited = time.perf_counter(), step, 0.0
        self.idle_since = self.epoch_clock = self.clock

    def data_ready(self) -> None:
        """The next batch has arrived: what has passed since the last step was waiting for data."""
        self.waited += time.perf_counter() - self.idle_since

    def step_done(self, step: int, out: StepOutput, index: Sequence[Tensor], lr: float) -> None:
        """`index`: the numbers of the images, for each part of the batch."""
        counted = torch.where(out.ok, torch.stack([value.float() for value in out.stats.values()]), 0.0)
        for meters in (self.window, self.epoch):
            meters.add(dict(zip(out.stats, counted.unbind())), out.ok)
        if self.scores is not None:
            self.scores.add(step, out.scores, index, out.ok)
        self.done = step + 1
        self.bar.update()
        if (step + 1) % self.print_freq == 0:
            self._log_line(step + 1, lr, out)
        self.idle_since = time.perf_counter()

    def finish_epoch(self, step: int, epoch: int) -> None:
        """Record and show the epoch's averages."""
        self.guard.check(counted=bool(self.epoch.count))
        values = scores.derived(self.epoch.read()) | self.bad_images.count(self.run)
        self.run.record("epoch", epoch=epoch, step=step, **values)
        self._record_gradients()
        minutes = (time.perf_counter() - self.epoch_clock) / 60
        self.run.log(
            f"epoch {epoch}/{self.total // self.steps_per_epoch} done  loss {values['loss']:.4f}  "
            f"{_accuracy(values)}{_skipped(values)}{minutes:.1f} min"
        )

    def rewind(self, step: int) -> None:
        """Forget about everything after `step`: none of it counted."""
        for meters in (self.window, self.epoch):
            meters.steps -= self.done - step
        self.gradients.seen = [entry for entry in self.gradients.seen if entry[0] <= step]

    def _log_line(self, step: int, lr: float, out: StepOutput) -> None:
        counted = bool(self.window.count)
        self.guard.check(counted, self.window.steps)
        if not counted:
            return  # nothing to show yet
        values = scores.derived(self.window.read()) | self.bad_images.count(self.run)
        seconds, steps = time.perf_counter() - self.clock, step - self.clock_step
        speed = {"images_per_second": steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
        self.run.record("step", epoch=self._epoch(step), step=step, **values, learning_rate=lr, **speed)
        if out.looked and out.ok:
            self._record_looked(step, out.looked)
        self._record_gradients()
        self.run.log(self._line(step, values, lr, speed, (self.total - step) * seconds / steps))
        self.clock, self.clock_step, self.waited = time.perf_counter(), step, 0.0

    def _record_looked(self, step: int, looked: dict[str, Tensor]) -> None:
        every = math.ceil(parallel.world_size() * len(looked["queries"]) / look.QUERIES)
        everywhere = {name: parallel.gather(x[::every]) for name, x in looked.items()}
        if parallel.is_main():  # it takes a while, and nobody else writes it down
            self.run.record("scores", epoch=self._epoch(step), step=step, **look.measured(everywhere))

    def _record_gradients(self) -> None:
        for step, norms in self.gradients.take():
            self.run.record("gradients", epoch=self._epoch(step), step=step, norms=norms)

    def _epoch(self, step: int) -> int:
        return (step - 1) // self.steps_per_epoch + 1

    def _line(self, step: int, values: dict[str, float], lr: float, speed: dict[str, float], eta: float) -> str:
        negative = f"negative {values['negative_mean']:+.3f}  " if "negative_mean" in values else ""
        return (
            f"epoch {self._epoch(step)}  step {step}/{self.total}  loss {values['loss']:.4f}  "
            f"{_accuracy(values)}positive {values['positive_mean']:.3f}  {negative}{_skipped(values)}"
            f"lr {lr:.2g}  {speed['images_per_second']:.0f} images/s  "
            f"waiting {speed['data_wait']:.0%}  ETA {timedelta(seconds=round(eta))}"
        )

    def state_dict(self) -> dict[str, Any]:
        recorded = self.scores.state_dict() if self.scores is not None else None
        averages = {"window": self.window.state_dict(), "epoch": self.epoch.state_dict()}
        bad_images = self.bad_images.state_dict(self.run)
        return averages | {"scores": recorded, "gradients": self.gradients.seen, "bad_images": bad_images}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.window.load_state_dict(state["window"], device)
        self.epoch.load_state_dict(state["epoch"], device)
        if self.scores is not None:
            self.scores.past = state["scores"]
        self.gradients.seen = state.get("gradients", [])
        self.bad_images.load_state_dict(state.get("bad_images", {}))
