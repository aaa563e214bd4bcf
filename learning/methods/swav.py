"""SwAV (Caron et al., NeurIPS 2020): predict from one view the cluster that another view was assigned to."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from learning import parallel
from learning.draws import Draws
from learning.methods.base import Batch, Method, Rewriting, StepOutput
from memory import scores
from memory.stores import Queue
from memory.task import Task

LARGE = ("query", "key")  # the views that are assigned


class SwAV(Method):
    """Views "query" and "key", (N, 3, H, W), and `small` smaller ones, "small0" and so on.

    Every view predicts the clusters of both large ones but its own; the loss is the mean of all these cross entropies
    (equations 1 and 6). Clusters are balanced over the global batch and, from step `queue_full` on, over `queues` (one
    for each large view, none at all are fine) of past embeddings, written from step `queue_start` on. For `freeze`
    steps prototypes stay.

    A score row is about one prediction: positive is the prototype the target was mostly assigned to, negatives are the
    others. Feature transformation moves the predicting embedding away from the assigned one, and back to unit length.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        dim: int,
        prototypes: int,
        small: int,
        temperature: float,
        epsilon: float,
        iterations: int,
        freeze: int,
        queues: Sequence[Queue],
        queue_start: int,
        queue_full: int,
        rewriting: Rewriting,
        seed: int,
    ):
        super().__init__()
        self.encoder, self.queues = encoder, nn.ModuleList(queues)
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.small = [f"small{i}" for i in range(small)]
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.queue_start, self.queue_full = queue_start, queue_full
        self.freeze, self.rewriting, self.seed = freeze, rewriting, seed
        self._normalise()

    def forward(self, batch: Batch) -> StepOutput:
        draws = Draws(self.seed, batch["step"], batch["key_draw"])
        views = self._embed(batch, LARGE) | (self._embed(batch, self.small) if self.small else {})
        with torch.autocast(batch["query"].device.type, enabled=False):
            codes = {name: self._assign(views[name].detach(), i, draws.step) for i, name in enumerate(LARGE)}
            pairs = [(name, target) for target in reversed(LARGE) for name in views if name != target]
            tasks = [Task(f"{name}/{target}", views[name], views[target].detach()) for name, target in pairs]
            predicts = [partial(self._predict, codes[target]) for _, target in pairs]
            results = [self.rewriting.record(predict, task, draws) for predict, task in zip(predicts, tasks)]
            looked = self.rewriting.look(partial(self._scores, codes[pairs[0][1]]), tasks[0], draws)
        loss = sum(loss for loss, _ in results) / len(results)
        stats = {"loss": loss.detach(), **scores.summary(torch.cat([rows for _, rows in results]))}
        stats["clusters_used"] = _used(codes["query"])
        stats["feature_std"] = scores.spread(parallel.gather(views["query"].detach()))
        losses = {task.name: loss.detach() for task, (loss, _) in zip(tasks, results)}
        writes = [parallel.gather(views[name].detach()) for name in LARGE] if self.queues else []
        return StepOutput(loss, stats, results[0][1], writes, losses=losses, looked=looked)

    def _embed(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """Views of one size go through the encoder together, so that batch norm sees all of them."""
        (features,) = self.encoder(torch.cat([batch[name] for name in names]))
        return dict(zip(names, normalize(features, dim=1).chunk(len(names))))

    @torch.no_grad()
    def _assign(self, features: Tensor, number: int, step: int) -> Tensor:
        """(N, clusters) soft assignments of a large view's embeddings (N, D)."""
        n = len(features)
        for queue in self.queues[number : number + 1]:
            if step >= self.queue_full:
                features = torch.cat([features, parallel.own_share(queue.keys)])
        return sinkhorn(self.prototypes(features), self.epsilon, self.iterations)[:n]

    def _predict(self, codes: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        """The cross entropy of codes (N, clusters) and what the task's query says of them; score rows (N, 6)."""
        similarity = self.prototypes(task.query)
        lse = (similarity / self.temperature).logsumexp(1)
        loss = (lse - (codes * similarity).sum(1) / self.temperature).mean()
        positive, others = _apart(codes, similarity.detach())
        scored = scores.Scored.of(others, self.temperature, others.isfinite())
        return loss, scores.statistics(positive, scored, self.temperature)

    def _scores(self, codes: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        return _apart(codes, self.prototypes(task.query))

    def after_backward(self, step: int) -> None:
        if step < self.freeze:
            self.prototypes.weight.grad = None

    def after_step(self, out: StepOutput, step: int) -> None:
        self._normalise()
        if step >= self.queue_start:
            for queue, features in zip(self.queues, out.writes):
                queue.write(features, out.ok)

    @torch.no_grad()
    def _normalise(self) -> None:
        self.prototypes.weight.copy_(normalize(self.prototypes.weight, dim=1))


def sinkhorn(similarity: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign samples to clusters of equal size (Cuturi, NeurIPS 2013): (N, clusters) -> the same, rows sum to 1.

    Balanced over the samples of all processes. In logarithms, which no epsilon can overflow.
    """
    log = similarity / epsilon
    for _ in range(iterations):
        log = log - parallel.gather(log.logsumexp(0)[None]).logsumexp(0)
        log = log - log.logsumexp(1, keepdim=True)
    return log.exp()


def _apart(codes: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Of similarities (N, clusters) those to the assigned clusters (N,), and the others, -inf where the former were."""
    assigned = codes.argmax(1, keepdim=True)
    return similarity.gather(1, assigned).squeeze(1), similarity.scatter(1, assigned, -torch.inf)


def _used(codes: Tensor) -> Tensor:
    """How many clusters the global batch spreads over: the exponential of its mean assignment's entropy."""
    return torch.special.entr(parallel.gather(codes.mean(0)[None]).mean(0)).sum().exp()
