"""MoCo v1/v2 (He et al., CVPR 2020; Chen et al., 2020): match a momentum encoding of another view against a queue."""

from collections.abc import Sequence

from torch import nn

from learning import parallel
from learning.draws import Draws
from learning.methods.base import Batch, Contrast, Method, StepOutput
from memory.stores import Queue
from memory.task import Task
from models.momentum import MomentumEncoder


class MoCo(Method):
    """Views "query" and "key", (N, 3, H, W) each; `queues` holds one queue per modality the encoder embeds.

    The encoder's query meets the momentum encoder's key of the same image as its positive and the queue as its
    negatives. Keys enter the queue after the step, untransformed and in the order of the global batch.
    """

    def __init__(
        self, encoder: nn.Module, *, key_momentum: float, queues: Sequence[Queue], contrast: Contrast, seed: int
    ):
        super().__init__()
        self.encoder = encoder
        self.momentum_encoder = MomentumEncoder(encoder, key_momentum)
        self.queues = nn.ModuleList(queues)
        self.contrast, self.seed = contrast, seed

    def forward(self, batch: Batch) -> StepOutput:
        draws = Draws(self.seed, batch["step"], batch["key_draw"])
        queries = self.encoder(batch["query"])
        keys = parallel.shuffled(self.momentum_encoder, batch["key"], draws.shared("shuffle"))
        tasks = [
            Task(f"image{m}", query, keys[(m + 1) % len(keys)], (self.queues[(m + 1) % len(keys)].read(),))
            for m, query in enumerate(queries)
        ]
        return self.contrast(tasks, draws, writes=keys)

    def after_step(self, out: StepOutput) -> None:
        self.momentum_encoder.update(self.encoder)
        for queue, keys in zip(self.queues, out.writes):
            queue.write(parallel.gather(keys))
        out.stats["queue_fill"] = self.queues[0].fill()
