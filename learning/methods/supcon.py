"""SupCon (Khosla et al., NeurIPS 2020): with labels, all images of a class in the batch are each other's positives."""

import torch
from torch import Tensor, nn

from datasets.keyed import hash64
from learning import parallel
from learning.draws import Draws
from learning.methods.base import Batch, Contrast, Method, StepOutput
from memory.task import Negatives, Task


class SupCon(Method):
    """Views "query" and "key", (N, 3, H, W) each, and "label" (N,). One encoder, gradients through all embeddings.

    Each of the 2B embeddings of the global batch of B has all others of its class as positives. Every pair of the two
    is a row of its own, whose loss is over all embeddings but the anchor (L_out, equation 2); an anchor is the mean of
    its rows, the loss the mean of the anchors. Without equal labels this is SimCLR.
    """

    def __init__(self, encoder: nn.Module, *, contrast: Contrast, seed: int):
        super().__init__()
        self.encoder = encoder
        self.contrast, self.seed = contrast, seed

    def forward(self, batch: Batch) -> StepOutput:
        draws = Draws(self.seed, batch["step"], batch["key_draw"])
        (one,), (other,) = self.encoder(batch["query"]), self.encoder(batch["key"])
        return self.contrast(pairs(one, other, batch["label"], draws), draws)


def pairs(one: Tensor, other: Tensor, label: Tensor, draws: Draws) -> list[Task]:
    """Tasks of two views (N, D) of images with `label` (N,): the two views of each image first, then all other pairs.

    How many there are depends on the labels, which a GPU has to be asked for; statistics are of the former alone. In
    each row the other images of the class count, but are not to be mixed.
    """
    features = parallel.gather_with_gradient(torch.stack([one, other], 1)).flatten(0, 1)
    labels = parallel.gather(label).repeat_interleave(2)
    place = torch.arange(len(labels), device=label.device)
    mine = parallel.own_rows(place)
    keys = hash64(parallel.gather(draws.keys).repeat_interleave(2), place % 2)  # of every embedding
    alike = (labels[mine, None] == labels) & (mine[:, None] != place)
    share = 1 / alike.sum(1)  # of a row in its anchor
    views = (mine[:, None] % 2 == 0) & (place == mine[:, None] + 1)

    def task(name: str, chosen: Tensor) -> Task:
        row, positive = chosen.nonzero(as_tuple=True)
        counts = (place != mine[row, None]) & (place != positive[:, None])
        negatives = Negatives(features, valid=counts, unmixed=counts & alike[row])
        weight = share[row] * (len(row) / len(mine))
        drawn = hash64(keys[mine[row]], keys[positive])
        anchors, shown = features[mine[row]], name == "image"
        return Task(name, anchors, features[positive], (negatives,), weight, keys=drawn, shown=shown)

    return [task("image", views), task("class", alike & ~views)]
