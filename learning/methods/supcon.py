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

    Each of the 2B embeddings of the global batch of B has all others of its class as positives; the loss of a pair is
    over all embeddings but the anchor (L_out, equation 2), an anchor's the mean over its pairs, the batch's that over
    the anchors. Without equal labels this is SimCLR. Feature transformation moves either side of a pair, so under it
    every pair is a row of its own; else one row an anchor says the same, in 2B x 2B scores.
    """

    def __init__(self, encoder: nn.Module, *, contrast: Contrast, seed: int):
        super().__init__()
        self.encoder = encoder
        self.contrast, self.seed = contrast, seed

    def forward(self, batch: Batch) -> StepOutput:
        draws = Draws(self.seed, batch["step"], batch["key_draw"])
        (one,), (other,) = self.encoder(batch["query"]), self.encoder(batch["key"])
        with torch.autocast(one.device.type, enabled=False):
            found = tasks(one, other, batch["label"], draws, every_pair=bool(self.contrast.rewriting.transforms))
        return self.contrast(found, draws)


def tasks(one: Tensor, other: Tensor, label: Tensor, draws: Draws, *, every_pair: bool) -> list[Task]:
    """Of two views (N, D) of images with `label` (N,): "image", a row for each image, and "class", all other pairs.

    Statistics are of the former alone. With `every_pair` the latter is a row for each, whose number hangs on the
    labels, so that a GPU has to be asked for it; without it a row for each embedding, with the mean of its positives.
    In each row the other images of the class count, but are not to be mixed.
    """
    features = parallel.gather_with_gradient(torch.stack([one, other], 1)).flatten(0, 1)
    labels = parallel.gather(label).repeat_interleave(2)
    place = torch.arange(len(labels), device=label.device)
    mine = parallel.own_rows(place)
    keys = hash64(parallel.gather(draws.keys).repeat_interleave(2), place % 2)  # of every embedding
    alike = (labels[mine, None] == labels) & (mine[:, None] != place)
    share = 1 / alike.sum(1).to(features.dtype)  # of a pair in its anchor

    def pairs(name: str, row: Tensor, positive: Tensor) -> Task:
        counts = (place != mine[row, None]) & (place != positive[:, None])
        negatives = Negatives(features, valid=counts, unmixed=counts & alike[row])
        weight = share[row] * (len(row) / len(mine))
        drawn = hash64(keys[mine[row]], keys[positive])
        anchors, shown = features[mine[row]], name == "image"
        return Task(name, anchors, features[positive], (negatives,), weight, keys=drawn, shown=shown)

    first = torch.arange(0, len(mine), 2, device=label.device)
    image = pairs("image", first, mine[first] + 1)
    others = alike & ((mine[:, None] % 2 == 1) | (place != mine[:, None] + 1))
    if every_pair:
        return [image, pairs("class", *others.nonzero(as_tuple=True))]
    count = others.sum(1)
    mean = others.to(features.dtype) @ features / count.clamp(min=1).unsqueeze(1)
    everything = Negatives(features, valid=place != mine[:, None])
    return [image, Task("class", features[mine], mean, (everything,), share * count, shown=False, apart=True)]
