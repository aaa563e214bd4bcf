"""What both programs have in common: flags, checks, notes."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

from options.base import BELOW_ONE, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, SHARE, check_ranges, option

DOWNLOADABLE = ("cifar10", "cifar100", "stl10")


@dataclass(frozen=True)
class Shared:
    """The flags both programs have."""

    data_folder: str | None = option(None, "folder of images, list file or npz file; see docs/data.md", group="data")
    imagenet100path: str | None = option(None, "class list for imagenet100, instead of the one shipped", group="data")
    download: bool = option(False, "fetch cifar10, cifar100 or stl10 into --data_folder", group="data")
    data_fraction: float = option(1.0, "share of the training images, of each class alike", group="data", must=SHARE)
    mean: tuple[float, ...] | None = option(
        None, "of the colour channels, 0 to 1; by default the data's", group="data", must=FRACTION
    )
    std: tuple[float, ...] | None = option(None, "the same: standard deviation", group="data", must=SHARE)
    num_workers: int = option(2, "loader processes on this node", group="data", aliases=("-j",), must=NOT_NEGATIVE)

    batch_size: int = option(256, "images per step over all processes", group="optimisation", must=POSITIVE)
    cosine: bool = option(False, "cosine schedule instead of steps", group="optimisation")
    lr_decay_rate: float = option(0.1, "factor of each drop; cosine ends at its cube", group="optimisation", must=SHARE)
    momentum: float = option(0.9, "momentum of SGD", group="optimisation", must=BELOW_ONE)
    amp: Literal["off", "auto", "bf16", "fp16"] = option(
        "off", "mixed precision; --amp alone means auto", group="optimisation", bare="auto"
    )

    fast_images: bool = option(True, "decode by torchvision, crop and colour in batches", group="speed")
    channels_last: bool = option(True, "lay images out pixel by pixel", group="speed")
    keep_memory: bool = option(True, "keep what a step frees for the next step", group="speed")

    model_path: str = option("./save", "folder that holds the run folders", group="run")
    tb_path: str = option("./tb", "the same for TensorBoard", group="run")
    name: str | None = option(None, "name of the run folder; made from the settings by default", group="run")
    print_freq: int = option(10, "steps between log lines", group="run", must=POSITIVE)
    save_freq: int = option(20, "epochs between kept checkpoints; 0 keeps none", group="run", must=NOT_NEGATIVE)
    keep: int = option(2, "newest checkpoints that stay besides those", group="run", must=POSITIVE)
    resume: str = option("", "run or checkpoint to go on from; auto: the newest with equal options", group="run")
    seed: int | None = option(None, "random seed; drawn and printed by default", group="run", must=SEED)

    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute", group="processes")
    gpu: int | None = option(None, "index of the only GPU to use", group="processes", must=NOT_NEGATIVE)
    multiprocessing_distributed: bool = option(False, "one process per visible GPU", group="processes")
    nprocs: int | None = option(None, "processes on this node", group="processes", must=POSITIVE)
    world_size: int = option(-1, "number of nodes", group="several nodes")
    node_rank: int = option(-1, "number of this node, from 0", group="several nodes", aliases=("--rank",))
    dist_url: str = option("tcp://127.0.0.1:23456", "where several nodes meet", group="several nodes")
    dist_backend: Literal["auto", "nccl", "gloo"] = option("auto", "communication library", group="several nodes")


def placed(options):
    """With paths to the data that mean the same from every other folder: checkpoints remember them."""
    paths = {name: getattr(options, name) for name in ("data_folder", "imagenet100path")}
    return dataclasses.replace(options, **{name: path and os.path.abspath(path) for name, path in paths.items()})


def dataset_of(folder: str) -> str:
    """The data set that --data_folder means by itself."""
    return "npz" if folder.lower().endswith(".npz") else "folder"


def check(options) -> None:
    """Raise ValueError for a value out of range and for shared flags that cannot work together."""
    check_ranges(options)
    for name in ("mean", "std"):
        if len(getattr(options, name) or (0, 0, 0)) != 3:
            raise ValueError(f"--{name} takes three numbers, for red, green and blue, with commas between them")
    if options.download and options.dataset not in (None, *DOWNLOADABLE):
        raise ValueError(
            f"--download fetches {', '.join(DOWNLOADABLE)}; --dataset {options.dataset} is yours to put in place"
        )
    if options.name is not None and (os.path.basename(options.name) != options.name or options.name in ("", ".", "..")):
        raise ValueError(f"--name '{options.name}' is not the name of a folder: say where it lies with --model_path")
    drops = options.lr_decay_epochs
    if any(later <= earlier for earlier, later in zip(drops, drops[1:])):
        raise ValueError(f"--lr_decay_epochs must ascend, not {_listed(drops)}")
    if options.device == "cpu" and options.gpu is not None:
        raise ValueError("--gpu and --device cpu contradict each other: leave one out")
    if options.gpu is not None and (options.nprocs or 1) > 1:
        raise ValueError(f"--gpu is one GPU and --nprocs {options.nprocs} wants several: leave one out")
    _check_processes(options)


def _check_processes(options) -> None:
    nodes, node = options.world_size, options.node_rank
    if nodes > 1 and node < 0:
        raise ValueError(f"--world_size {nodes} needs --rank as well: the number of this node, from 0")
    if node >= max(nodes, 1):
        raise ValueError(f"--rank {node} does not exist with --world_size {nodes}: nodes are counted from 0")


def check_shares(options, parts: int = 1) -> None:
    """Raise ValueError unless the batch, in so many parts, can be dealt out evenly to the processes asked for."""
    processes = (options.nprocs or 1) * max(options.world_size, 1)
    shares, each = processes * parts, f" in {parts} parts each" if parts > 1 else ""
    if options.batch_size % shares:
        raise ValueError(
            f"--batch_size {options.batch_size} is not a multiple of the {processes} processes{each}: "
            f"take {max(options.batch_size // shares, 1) * shares}, or another --nprocs"
        )


def notes(options, typed: dict) -> list[str]:
    """Sentences about shared flags that will have no effect."""
    drops = options.lr_decay_epochs
    why = {}
    if options.dataset not in (None, "imagenet100"):
        why["imagenet100path"] = f"with --dataset {options.dataset}"
    if options.dataset == "shapes":
        why["data_folder"] = "with --dataset shapes, which is drawn on the spot"
    if options.multiprocessing_distributed:
        why["gpu"] = "with --multiprocessing_distributed, which takes every visible GPU"
    if options.cosine and drops:
        why["lr_decay_epochs"] = "and is ignored under --cosine"
    sentences = without_effect(why, typed)
    if not options.cosine and drops and options.epochs <= drops[0]:
        sentences.append(
            f"the learning rate never drops: --lr_decay_epochs {_listed(drops)} with --epochs {options.epochs}"
        )
    return sentences


def without_effect(why: dict[str, str], typed: dict) -> list[str]:
    """One sentence for every typed flag in `why`; a flag typed as off or none asks for nothing."""
    return [
        f"--{name} has no effect {why[name]}"
        for name, value in typed.items()
        if name in why and value is not False and value != "none"
    ]


def _listed(numbers: tuple) -> str:
    return ",".join(map(str, numbers))
