"""Loaders: batches of named views, the same ones for any number of workers and any split over processes."""

import multiprocessing.util
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.decode import Unreadable, why
from datasets.keyed import generator, hash64, sample_keys
from datasets.recipes import Recipe
from datasets.sources import Source

Batch = dict[str, Tensor]
Exchange = Callable[[Tensor, Tensor], Tensor]  # this process's rows of a global batch and an order -> its rows of that

WORKER_GONE = ("DataLoader worker (pid", "Pin memory thread")  # what PyTorch's errors contain
ROOM = 2**25  # bytes of decoded images that a loader process holds, and one image more
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
        self.mine = slice(rank * share, (rank + 1) * share)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch to iterate over, without its first `start_step` batches."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return self.n // self.batch_size

    def order(self) -> Tensor:
        """The samples (n,) as the epoch goes through them, those of the dropped batch at the end."""
        return torch.randperm(self.n, generator=generator("cpu", self.seed, self.epoch, "order"))

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices, keys and an order in which to deal them out anew, int64 (batch_size,) each: of all processes."""
        order = self.order()
        for step in range(self.start_step, len(self)):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            shuffle = generator("cpu", self.seed, self.epoch * len(self) + step, "shuffle")
            yield index, sample_keys(self.seed, self.epoch, index), torch.randperm(len(index), generator=shuffle)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return _listed(self)


def _listed(sampler) -> Iterator[list[tuple[int, int]]]:
    """This process's samples, batch by batch, as a DataLoader wants them."""
    return (
        list(zip(index[sampler.mine].tolist(), keys[sampler.mine].tolist())) for index, keys, _ in sampler.batches()
    )


class TrainLoader:
    """Batches of a training epoch, on `device`.

    batch_size is global. A batch holds index, key_draw (the samples' keys of this epoch) and, where the source has
    labels, label, int64 (n,) each, and every view of the recipe, float (n, 3, size, size) or of a jigsaw (n, 9, 3,
    size, size). Images held in memory are cropped in batches on the device; files are decoded and cropped by
    `num_workers` processes.

    A file that cannot be read raises ValueError. With `replace_bad` the sample becomes another one of the data, drawn
    from its key: index, label and views are the other's, key_draw stays; and `bad` tells, path by path, what was wrong
    in the batches so far.

    The views `dealt` are shuffled over the global batch: row i of the global batch has that view of sample order[i],
    and "order", int64 (batch_size,), comes along. In memory each process makes what it is to see; of files it makes
    those of its own samples, and `exchange` swaps the uint8 crops.
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
        dealt: Sequence[str] = (),
        exchange: Exchange = torch.Tensor.__getitem__,
        replace_bad: bool = False,
    ):
        self.sampler = KeyedSampler(len(source), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
        self.recipe = recipe
        self._feed = partial(_feed, source, device=torch.device(device), replace_bad=replace_bad)
        self.feed = self._feed(_Views(recipe, dealt, exchange), self.sampler, num_workers)
        self.bad = self.feed.bad

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.sampler.set_epoch(epoch, start_step)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.feed)

    def of(self, index: Tensor) -> Batch:
        """Samples `index` (n,) as the epoch shows them, in one batch: whichever batches they are in, on any process."""
        keys = sample_keys(self.sampler.seed, self.sampler.epoch, index)
        return next(iter(self._feed(_Views(self.recipe), _InOrder(index, keys, len(index)), 0)))


class EvalLoader:
    """Every image exactly once and in order, nothing dropped and nothing padded, on `device`.

    Rank r gets the r-th of world_size consecutive shards, whose sizes differ by one at most; batch_size is the number
    of images per batch of this process. A batch holds index, label (where the source has labels) and the views.
    `replace_bad` and `bad` are as in TrainLoader.
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
        replace_bad: bool = False,
    ):
        start, stop = (len(source) * r // world_size for r in (rank, rank + 1))
        index = torch.arange(start, stop)
        self.sampler = _InOrder(index, index, batch_size)  # evaluation views draw nothing: any key will do
        self.feed = _feed(source, _Views(recipe), self.sampler, num_workers, torch.device(device), replace_bad)
        self.bad = self.feed.bad

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.feed:
            del batch["key_draw"]
            yield batch


class _InOrder:
    """The samples `index` (n,) with their keys (n,), one after another."""

    mine = slice(None)

    def __init__(self, index: Tensor, keys: Tensor, batch_size: int):
        self.index, self.keys, self.batch_size = index, keys, batch_size

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        parts = zip(self.index.split(self.batch_size), self.keys.split(self.batch_size))
        return ((index, keys, torch.arange(len(index))) for index, keys in parts if len(index))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return _listed(self)


class _Views:
    """A recipe's views of a batch, apart by whose samples they are of: `own`, or after being `dealt` out anew."""

    def __init__(self, recipe: Recipe, dealt: Sequence[str] = (), exchange: Exchange = torch.Tensor.__getitem__):
        self.recipe, self.exchange = recipe, exchange
        self.own, self.dealt = recipe.only(set(recipe.views) - set(dealt)), recipe.only(dealt)

    def order(self, order: Tensor) -> Batch:
        """What a batch says of the order of the views that are dealt, if any are."""
        return {"order": order} if self.dealt.looks else {}

    def of_images(
        self, images: Tensor, device: torch.device, index: Tensor, keys: Tensor, order: Tensor, mine: slice
    ) -> Batch:
        """On `device`, from uint8 `images` (N, 3, H, W) in memory, there or on the host, and a global batch."""
        views = {}
        for part, rows in ((self.own, mine), (self.dealt, order[mine])):
            if part.looks:
                chosen = images.index_select(0, index[rows].to(images.device, non_blocking=True))
                chosen = chosen.to(device, non_blocking=True)
                views |= part.finish(part.crop_batch(chosen, keys[rows]), keys[rows])
        return views

    def of_crops(self, crops: Batch, keys: Tensor, order: Tensor, mine: slice) -> Batch:
        """From the uint8 crops of this process's samples."""
        swapped = {name: self.exchange(crops[name], order) for name in self.dealt.views}
        return self.own.finish(crops, keys[mine]) | self.dealt.finish(swapped, keys[order[mine]])


class _Memory:
    """Batches of a source held in memory: uint8, on the device if that has room, and cropped and finished there."""

    def __init__(self, source: Source, views: _Views, sampler: KeyedSampler | _InOrder, device: torch.device):
        home = device if _has_room(device, source.images.nbytes) else "cpu"
        self.images, self.labels = source.images.to(home), source.labels
        self.bad: dict[str, str] = {}  # nothing here can be
        self.views, self.sampler, self.device = views, sampler, device

    def __iter__(self) -> Iterator[Batch]:
        for index, keys, order in self.sampler.batches():
            mine = self.sampler.mine
            batch = {"index": index[mine], "key_draw": keys[mine]} | self.views.order(order)
            if self.labels is not None:
                batch["label"] = self.labels[index[mine]]
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
            yield batch | self.views.of_images(self.images, self.device, index, keys, order, mine)


def _has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes leave most of what is free on the device to training."""
    return device.type != "cuda" or 4 * size < torch.cuda.mem_get_info(device)[0]


class _Files:
    """Batches of image files: decoded and cropped by workers, finished on the device."""

    def __init__(
        self,
        source: Source,
        views: _Views,
        sampler: KeyedSampler | _InOrder,
        num_workers: int,
        device: torch.device,
        replace_bad: bool,
    ):
        self.views, self.sampler, self.device = views, sampler, device
        self.bad: dict[str, str] = {}
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)  # else SIGTERM would be tried, and waited for
        crops = _Crops(source, views.recipe, replace_bad)
        crops.read(0, 0)  # files that are no images are found out before anything starts
        self.loader = DataLoader(
            crops,
            batch_sampler=sampler,
            collate_fn=_collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch, (_, keys, order) in zip(self._decoded(), self.sampler.batches()):
            batch |= self.views.order(order)
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
            yield batch | self.views.of_crops(batch, keys, order, self.sampler.mine)

    def _decoded(self) -> Iterator[Batch]:
        """Batches of the workers. ChildProcessError when one of them has been ended, Unreadable for an image."""
        try:
            batches = iter(self.loader)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises anywhere; the loader looks itself
            for batch in batches:
                self.bad |= batch.pop("bad")
                yield batch
        except (RuntimeError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in WORKER_GONE):
                raise
            raise ChildProcessError(
                "A loader process was ended from outside, mostly for want of memory; go on with --resume auto and a "
                "smaller --num_workers."
            ) from error
        except ValueError as error:  # from a worker it comes wrapped in a traceback; the last line is what it said
            raise Unreadable(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def _leave_signals(worker: int) -> None:
    """What ends a program reaches its workers too, but what it means is for the training loop to say."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    for worker in filter(lambda child: child.daemon, multiprocessing.active_children()):
        worker.kill()


class _Crops(Dataset):
    """Samples as items; asked for a batch of them, it draws numbers for as many at a time as there is room for."""

    def __init__(self, source: Source, recipe: Recipe, replace_bad: bool):
        self.source, self.recipe, self.replace_bad = source, recipe, replace_bad

    def __getitems__(self, samples: list[tuple[int, int]]) -> list[dict[str, int | Tensor | dict[str, str]]]:
        items, found, keys, held = [], [], [], 0
        for index, key in samples:
            found.append(self.read(index, key))
            keys.append(key)
            held += found[-1][1].nbytes
            if held > ROOM or len(items) + len(found) == len(samples):
                items += self._items(found, keys)
                found, keys, held = [], [], 0
        return items

    def _items(
        self, found: list[tuple[int, Tensor, dict[str, str]]], keys: list[int]
    ) -> list[dict[str, int | Tensor | dict[str, str]]]:
        """Of what `read` has returned."""
        indices, images, bad = zip(*found)
        columns = {"index": indices, "key_draw": keys, "bad": bad}
        if self.source.labels is not None:
            columns["label"] = [self.source.labels[index] for index in indices]
        columns |= self.recipe.crop(images, torch.tensor(keys))
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def read(self, index: int, key: int) -> tuple[int, Tensor, dict[str, str]]:
        """The image `index` or what replaces it, as its own index and itself; and why others could not be read."""
        bad = {}
        for attempt in range(ATTEMPTS):
            path = self.source.images[index]
            try:
                return index, self.source.read(path), bad
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
    views: _Views,
    sampler: KeyedSampler | _InOrder,
    num_workers: int,
    device: torch.device,
    replace_bad: bool,
):
    if source.in_memory:
        return _Memory(source, views, sampler, device)
    return _Files(source, views, sampler, num_workers, device, replace_bad)
