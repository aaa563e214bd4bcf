"""Weighted k-nearest-neighbour classification (Wu et al., CVPR 2018, section 3.4), which needs no training."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.loader import EvalLoader
from learning import parallel
from learning.evaluations.features import extract
from models.encoder import Encoder

CHUNK = 2**25  # similarities held at a time


@torch.no_grad()
def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int,
    temperature: float,
    n_class: int,
) -> dict[str, float]:
    """Let the k training images of highest cosine s vote for their class with weight exp(s / temperature).

    Features (N, d), labels (N,), the same on every rank; k is capped to the number of training images. Returns the
    percentage of test images whose class got the most votes ("top1") or is among the first five ("top5").
    """
    keys = F.normalize(train_features, dim=1).T
    rank, world = parallel.rank(), parallel.world_size()
    mine = slice(len(test_labels) * rank // world, len(test_labels) * (rank + 1) // world)
    queries, answers = F.normalize(test_features[mine], dim=1), test_labels[mine]
    hits = torch.zeros(2, dtype=torch.float64, device=keys.device)
    rows = max(CHUNK // keys.shape[1], 1)
    for query, answer in zip(queries.split(rows), answers.split(rows)):
        votes = _votes(query @ keys, train_labels, k, temperature, n_class)
        weight, ranked = votes.topk(min(5, n_class))
        correct = (ranked == answer[:, None]) & (weight > 0)  # a class without a vote is no answer
        hits += torch.stack([correct[:, 0].sum(), correct.sum()])
    top1, top5 = (100 * parallel.all_sum(hits) / len(test_labels)).tolist()
    return {"top1": top1, "top5": top5}


def _votes(similarity: Tensor, labels: Tensor, k: int, temperature: float, n_class: int) -> Tensor:
    """(n, N) cosines -> (n, n_class) weight per class, relative to the nearest: finite at any temperature."""
    nearest, index = similarity.topk(min(k, similarity.shape[1]))
    votes = similarity.new_zeros(len(similarity), n_class)
    return votes.scatter_add_(1, labels[index], ((nearest - nearest[:, :1]) / temperature).exp())


def evaluate(
    encoder: Encoder,
    train: EvalLoader,
    test: EvalLoader,
    *,
    k: int,
    temperature: float,
    n_class: int,
    layer: str | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, dict[str, float]]:
    """k-NN on the trunk's features ("backbone") and on the embeddings ("head"): they differ, and papers report either.

    `layer` gives the features of another layer than the last; see `Encoder.features`. Of an encoder without a head
    there are those alone. The encoder is used in evaluation mode and left in the mode it came in.
    """
    training = encoder.training
    encoder.eval()

    def both(images: Tensor) -> Tensor:
        with autocast():
            trunks = encoder.trunks(images)
            features = trunks if layer in (None, encoder.layers[-1]) else [encoder.features(images, layer)]
            return torch.cat([x.float() for x in (*features, *encoder.embed(trunks))], dim=1)

    (train_x, train_y), (test_x, test_y) = extract(both, train), extract(both, test)
    encoder.train(training)
    end = train_x.shape[1] - encoder.embedding_dim
    parts = {"backbone": slice(end)} | ({"head": slice(end, None)} if encoder.heads else {})
    return {
        name: knn(train_x[:, part], train_y, test_x[:, part], test_y, k=k, temperature=temperature, n_class=n_class)
        for name, part in parts.items()
    }
