"""SimCLR (Chen et al., ICML 2020): the other images of the batch, over all processes, are the negatives."""

import torch
from torch import Tensor, nn

from learning import parallel
from learning.draws import Draws
from learning.methods.base import Batch, Contrast, Method, StepOutput
from memory.task import Negatives, Task


class SimCLR(Method):
    """Views "query" and "key", (N, 3, H, W) each; one encoder embeds both, and both receive gradients.

    Every embedding has the other view of its image as its positive and the 2B - 2 embeddings of all other images in
    the global batch of B as its negatives. The loss is the mean over all 2B (NT-Xent, equation 1).
    """

    def __init__(self, encoder: nn.Module, *, contrast: Contrast, seed: int):
        super().__init__()
        self.encoder = encoder
        self.contrast, self.seed = contrast, seed

    def forward(self, batch: Batch) -> StepOutput:
        draws = Draws(self.seed, batch["step"], batch["key_draw"])
        queries, keys = self.encoder(batch["query"]), self.encoder(batch["key"])
        tasks: list[Task] = []
        for m, query in enumerate(queries):
            tasks += both_ways(f"image{m}", query, keys[(m + 1) % len(keys)], batch["index"])
        return self.contrast(tasks, draws)


def both_ways(name: str, one: Tensor, other: Tensor, index: Tensor) -> list[Task]:
    """`one` and `other` (N, D) are embeddings of two views of the images `index` (N,): find each in the other."""
    everything = parallel.gather_with_gradient(torch.stack([one, other], 1)).flatten(0, 1)
    owner = parallel.gather(index).repeat_interleave(2)
    negatives = (Negatives(everything, valid=index[:, None] != owner),)
    return [Task(name, one, other, negatives, weight=0.5), Task(f"{name}/back", other, one, negatives, weight=0.5)]
