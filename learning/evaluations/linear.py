"""Linear probe (He et al., CVPR 2020, section 4.1): one linear layer on frozen features, trained with a large rate."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.keyed import generator
from learning import parallel
from learning.evaluations.features import Cached, Live
from learning.meters import Meters
from learning.schedule import Schedule

Report = Callable[[int, int, dict[str, float]], None]  # epoch from 1, steps done so far, averages since the last report


class Probe:
    """A linear classifier and its optimizer. The initial weights, N(0, 0.01^2), are a function of `seed`."""

    def __init__(
        self,
        dim: int,
        n_class: int,
        *,
        schedule: Schedule,
        momentum: float,
        weight_decay: float,
        seed: int,
        device: torch.device,
    ):
        classifier = nn.Linear(dim, n_class)
        nn.init.normal_(classifier.weight, std=0.01, generator=generator("cpu", seed, "classifier"))
        nn.init.zeros_(classifier.bias)
        self.classifier, self.schedule = classifier.to(device), schedule
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(), lr=schedule.base, momentum=momentum, weight_decay=weight_decay
        )
        self.history: list[dict[str, float]] = []  # one entry per epoch done

    def epochs(self, train: Cached | Live, test: Iterable, *, report: Report, every: int) -> Iterator[int]:
        """Train and test, and yield the number of each epoch (from 1) once its results are in `history`."""
        model = parallel.wrap(self.classifier)
        for epoch in range(len(self.history), self.schedule.epochs):
            train.set_epoch(epoch)
            results = self._train_epoch(model, train, epoch, report=report, every=every)
            self.history.append({"epoch": epoch + 1, **results, **self.test(test)})
            yield epoch + 1

    def _train_epoch(
        self, model: nn.Module, batches: Cached | Live, epoch: int, *, report: Report, every: int
    ) -> dict[str, float]:
        """One pass, with a report every `every` steps. Returns the averages of the epoch."""
        window, whole = Meters(), Meters()
        for step, (features, labels) in enumerate(batches, epoch * len(batches)):
            lr = self.optimizer.param_groups[0]["lr"] = self.schedule(step)
            logits = model(features)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            acc, acc5 = 100 * hits(logits, labels) / len(labels)
            for meters in (window, whole):
                meters.add({"train_loss": loss.detach(), "train_acc": acc, "train_acc5": acc5})
            if (step + 1) % every == 0:
                report(epoch + 1, step + 1, window.read() | {"learning_rate": lr})
        results = whole.read()
        if not math.isfinite(results["train_loss"]):
            raise FloatingPointError("The loss of the linear probe is not finite any more: lower --learning_rate.")
        return results | {"learning_rate": lr}

    @torch.no_grad()
    def test(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Loss and accuracies in percent over all ranks' `batches`, each image counted exactly once."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.classifier.weight.device)
        for features, labels in batches:
            logits = self.classifier(features)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, *hits(logits, labels), torch.ones_like(loss) * len(labels)])
        loss, acc, acc5, count = parallel.all_sum(sums).tolist()
        return {"test_loss": loss / count, "test_acc": 100 * acc / count, "test_acc5": 100 * acc5 / count}

    @property
    def best(self) -> dict[str, float]:
        """The first epoch of highest test accuracy: chosen on the test images, so an optimistic number."""
        return max(self.history, key=lambda results: results["test_acc"])

    def state_dict(self) -> dict[str, Any]:
        """With the names that every checkpoint of this program has; there is nothing to scale in single precision."""
        classifier, optimizer = self.classifier.state_dict(), self.optimizer.state_dict()
        return {"method": classifier, "optimizer": optimizer, "scaler": {}, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.classifier.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]


@torch.no_grad()
def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of the rows have their label first, and among the first five: (2,) float32."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([ranked[:, 0].sum(), ranked.sum()]).float()
