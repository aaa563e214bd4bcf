"""Loaders: batches of named views, the same ones for any number of workers and any split over processes."""

import signal
from collections.abc import Iterator

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.decode import read_image, why
from datasets.keyed import generator, hash64, sample_keys
from datasets.recipes import Recipe
from datasets.sources import Source

Batch = dict[str, Tensor]

ATTEMPTS = 10  # images to try for one sample before the data as a whole are at fault


class KeyedSampler:
    """This process's part of every global batch of an epoch, each sample with the key its draws hang on.

    The order is a permutation drawn from (seed, epoch); the incomplete last batch is dropped. Rank r of world_size
    holds rows r * n to (r + 1) * n of each global batch, with n = batch_size / world_size.
    """

    def __init__(self, n: int, *, batch_size: int, rank: int, world_size: int, seed: int):
        if batch_size % world_size:
            raise ValueError(f"--batch_size {batch_size} is not a multiple of the {world_size} processes; change one.")
        if n < batch_size:
            fitting = 1 << max(n.bit_length() - 1, 0)
            raise ValueError(
                f"--batch_size {batch_size} is more than the {n} images there are; lower it, to {fitting} or less."
            )
        self.n, self.batch_size, self.seed = n, batch_size, seed
        share = batch_size // world_size
        self.rows = slice(rank * share, (rank + 1) * share)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch to iterate over, without its first `start_step` batches."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return self.n // self.batch_size

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and keys, int64 (n,) each."""
        order = torch.randperm(self.n, generator=generator("cpu", self.seed, self.epoch, "order"))
        for step in range(self.start_step, len(self)):
            index = order[step * self.batch_size : (step + 1) * self.batch_size][self.rows]
            yield index, sample_keys(self.seed, self.epoch, index)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (list(zip(index.tolist(), keys.tolist())) for index, keys in self.batches())


class TrainLoader:
    """Batches of a training epoch, on `device`.

    batch_size is global. A batch holds index, key_draw (the samples' keys of this epoch) and, where the source has
    labels, label, int64 (n,) each, and every view of the recipe, float (n, 3, size, size) or of a jigsaw (n, 9, 3,
    size, size). Images held in memory are cropped in batches on the device; files are decoded and cropped by
    `num_workers` processes.

    A file that cannot be read raises ValueError. With `replace_bad` the sample becomes another one of the data, drawn
    from its key: index, label and views are the other's, key_draw stays; and `bad` tells, path by path, what was wrong
    in the batches so far.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        replace_bad: bool = False,
    ):
        self.sampler = KeyedSampler(len(source), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
        self.feed = _feed(source, recipe, self.sampler, num_workers, torch.device(device), replace_bad)
        self.bad = self.feed.bad

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.sampler.set_epoch(epoch, start_step)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.feed)


class EvalLoader:
    """Every image exactly once and in order, nothing dropped and nothing padded, on `device`.

    Rank r gets the r-th of world_size consecutive shards, whose sizes differ by one at most; batch_size is the number
    of images per batch of this process. A batch holds index, label (where the source has labels) and the views.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ):
        start, stop = (len(source) * r // world_size for r in (rank, rank + 1))
        self.sampler = _InOrder(start, stop, batch_size)
        self.feed = _feed(source, recipe, self.sampler, num_workers, torch.device(device))

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.feed:
            del batch["key_draw"]
            yield batch


class _InOrder:
    """The samples start to stop; evaluation views draw nothing, so the index serves as the key."""

    def __init__(self, start: int, stop: int, batch_size: int):
        self.index, self.batch_size = torch.arange(start, stop), batch_size

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((index, index) for index in self.index.split(self.batch_size) if len(index))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (list(zip(index.tolist(), keys.tolist())) for index, keys in self.batches())


class _Memory:
    """Batches of a source held in memory: uint8 on the device, cropped and finished there."""

    def __init__(self, source: Source, recipe: Recipe, sampler: KeyedSampler | _InOrder, device: torch.device):
        self.images, self.labels = source.images.to(device), source.labels
        self.bad: dict[str, str] = {}  # nothing here can be
        self.recipe, self.sampler, self.device = recipe, sampler, device

    def __iter__(self) -> Iterator[Batch]:
        for index, keys in self.sampler.batches():
            batch = {"index": index, "key_draw": keys}
            if self.labels is not None:
                batch["label"] = self.labels[index]
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
            views = self.recipe.crop_batch(self.images.index_select(0, batch["index"]), keys)
            yield batch | self.recipe.finish(views, keys)


class _Files:
    """Batches of image files: decoded and cropped by workers, finished on the device."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        sampler: KeyedSampler | _InOrder,
        num_workers: int,
        device: torch.device,
        replace_bad: bool,
    ):
        self.recipe, self.device = recipe, device
        self.bad: dict[str, str] = {}
        crops = _Crops(source, recipe, replace_bad)
        crops.read(0, 0)  # files that are no images are found out before anything starts
        self.loader = DataLoader(
            crops,
            batch_sampler=sampler,
            collate_fn=_collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_interrupts,
            generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._decoded():
            keys = batch["key_draw"]
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
            yield batch | self.recipe.finish(batch, keys)

    def _decoded(self) -> Iterator[Batch]:
        try:
            for batch in self.loader:
                self.bad |= batch.pop("bad")
                yield batch
        except ValueError as error:  # from a worker it comes wrapped in a traceback; the last line is what it said
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers too, but what it means is for the training loop to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Crops(Dataset):
    def __init__(self, source: Source, recipe: Recipe, replace_bad: bool):
        self.source, self.recipe, self.replace_bad = source, recipe, replace_bad

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, int | Tensor | dict[str, str]]:
        _, key = sample
        index, image, bad = self.read(*sample)
        item = {"index": index, "key_draw": key, "bad": bad}
        if self.source.labels is not None:
            item["label"] = self.source.labels[index]
        return item | self.recipe.crop(image, key)

    def read(self, index: int, key: int) -> tuple[int, Image, dict[str, str]]:
        """The image `index` or what replaces it, as its own index and itself; and why others could not be read."""
        bad = {}
        for attempt in range(ATTEMPTS):
            path = self.source.images[index]
            try:
                return index, read_image(path), bad
            except ValueError as error:
                if not self.replace_bad:
                    raise
                bad[path] = why(error.__cause__)
            index = int(hash64(key, attempt, "replacement")) % len(self.source)
        path, reason = next(iter(bad.items()))
        raise ValueError(
            f"{path} cannot be read as an image ({reason}), nor can others in its place; repair them, or see that the "
            "data are still where they were."
        )


def _collate(items: list[dict[str, int | Tensor | dict[str, str]]]) -> Batch:
    bad = {path: reason for item in items for path, reason in item.pop("bad").items()}
    return default_collate(items) | {"bad": bad}


def _feed(
    source: Source,
    recipe: Recipe,
    sampler: KeyedSampler | _InOrder,
    num_workers: int,
    device: torch.device,
    replace_bad: bool = False,
):
    if source.in_memory:
        return _Memory(source, recipe, sampler, device)
    return _Files(source, recipe, sampler, num_workers, device, replace_bad)
