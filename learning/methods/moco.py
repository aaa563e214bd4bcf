"""MoCo v1/v2 (He et al., CVPR 2020; Chen et al., 2020): match a momentum encoding of another view against a queue.

With two modalities this is CMCv2, with a jigsaw branch InfoMin (Tian et al., NeurIPS 2020).
"""

from collections.abc import Sequence

from torch import nn

from learning import parallel
from learning.draws import Draws
from learning.methods.base import Batch, Contrast, Method, Schedule, StepOutput
from learning.methods.jigsaw import Jigsaw, image_tasks
from memory.stores import Queue
from models.momentum import MomentumEncoder


class MoCo(Method):
    """Views "query" and "key", (N, 3, H, W) each, and "jigsaw" where there is that branch; `queues`: one per modality.

    The batch's "key" views are dealt over the processes in its "order", so that batch norm cannot match them to the
    queries (section 3.3); with one process, chunks of split batch norm take the processes' place.

    The encoder's query meets the momentum encoder's key of the same image (in the other modality, where there are two)
    as its positive and that modality's queue as its negatives. Keys enter the queue after the step, untransformed and
    in the order of the global batch.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        key_momentum: Schedule,
        queues: Sequence[Queue],
        contrast: Contrast,
        seed: int,
        jigsaw: Sequence[Jigsaw] = (),
    ):
        super().__init__()
        self.encoder = encoder
        self.momentum_encoder = MomentumEncoder(encoder)
        self.queues, self.jigsaw = nn.ModuleList(queues), nn.ModuleList(jigsaw)
        self.contrast, self.key_momentum, self.seed = contrast, key_momentum, seed

    def forward(self, batch: Batch) -> StepOutput:
        draws = Draws(self.seed, batch["step"], batch["key_draw"])
        queries = self.encoder(batch["query"])
        keys = [parallel.dealt_back(key, batch["order"]) for key in self.momentum_encoder(batch["key"])]
        targets = [(parallel.own_rows(key), queue.read()) for key, queue in zip(keys, self.queues)]
        tasks = image_tasks(queries, targets, self.jigsaw)
        for branch in self.jigsaw:
            tasks += branch(self.encoder, batch["jigsaw"], targets, draws)
        return self.contrast(tasks, draws, writes=keys)

    def after_step(self, out: StepOutput, step: int) -> None:
        self.contrast.after_step(out)
        self.momentum_encoder.update(self.encoder, self.key_momentum(step))
        for queue, keys in zip(self.queues, out.writes):
            queue.write(keys, out.ok)
        out.stats["queue_fill"] = self.queues[0].fill()
        out.stats["queue_age"] = self.queues[0].age(len(out.writes[0]))
