"""Features of whole data sets under a frozen encoder."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from datasets.loader import EvalLoader, KeyedSampler, TrainLoader
from learning import parallel

Forward = Callable[[Tensor], Tensor]  # images (n, 3, H, W) -> features (n, d) float32


class Live:
    """Batches (features, labels) of a loader's images, computed anew in every pass."""

    def __init__(self, forward: Forward, loader: TrainLoader | EvalLoader):
        self.forward, self.loader = forward, loader

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            with torch.no_grad():
                features = self.forward(batch["image"])
            yield features, batch["label"]


class Cached:
    """Batches of features computed once, dealt in the order in which a `TrainLoader` deals the images."""

    def __init__(
        self, features: Tensor, labels: Tensor, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int
    ):
        self.features, self.labels = features, labels
        self.sampler = KeyedSampler(len(features), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, _, _ in self.sampler.batches():
            index = index[self.sampler.mine].to(self.features.device, non_blocking=True)
            yield self.features[index], self.labels[index]


def extract(forward: Forward, loader: EvalLoader) -> tuple[Tensor, Tensor]:
    """Features (N, d) and labels (N,) of all images in their order, complete on every rank, on the loader's device."""
    place = 0
    for part in Live(forward, loader):
        if not place:  # room for all at once: joining parts in the end would take twice as much
            whole = [x.new_empty(len(loader.sampler.index), *x.shape[1:]) for x in part]
        for kept, x in zip(whole, part):
            kept[place : place + len(x)] = x
        place += len(part[0])
    features, labels = map(parallel.gather_uneven, whole)
    return features, labels
