"""Measure this machine, each row against the reference recipe.

examples:
  python scripts/benchmark.py                                    # everything: six minutes on 2 cores
  python scripts/benchmark.py data --data_folder my/images

Both sides of a row run in turn (A B A B ...), of images and training the reference in a process of its own; the table,
in Markdown, has their medians. "Reference" is what public code does, in a few lines of our own: training in fp32 on
views that torchvision makes image by image, and FT's published recipe, which draws every lambda with numpy. "Here" are
the program's parts under the options it would choose. What would be faster on this machine is said below the table.
"""

import argparse
import copy
import ctypes
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial, partialmethod
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as T

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from datasets import decode, sources  # noqa: E402
from learning import build, parallel  # noqa: E402
from learning.draws import Draws  # noqa: E402
from learning.host import keep_freed_memory  # noqa: E402
from learning.losses import InfoNCE  # noqa: E402
from learning.methods.base import Contrast, Rewriting  # noqa: E402
from learning.pretraining import Pretraining  # noqa: E402
from learning.run import SilentRun  # noqa: E402
from memory.task import Negatives, Task  # noqa: E402
from options import contrast  # noqa: E402

MAIN = [sys.executable, str(ROOT / "main_contrast.py")]
TEMPERATURE, POSITIVE, NEGATIVE = 0.2, 2.0, 1.6  # Beta parameters as published
FT = f"--ft_pos extrapolate --ft_neg interpolate --ft_pos_alpha {POSITIVE} --ft_neg_alpha {NEGATIVE}"
LEVELS = {x: f"{FT} --ft_pos_granularity {x} --ft_neg_granularity {x}" for x in ("batch", "sample", "dim")}
ALONE = "--no_pre_scores"  # FT without the scores before it
FT_TRANSFORMS = build.transforms(contrast.parse(shlex.split(FT))[0])
NEVER = 10**9
TINY = "--width 0.125 --batch_size 8 --queue_size 64 --input_res 32 --feat_dim 16"
SCALES = [(64, 4**power) for power in range(6, 11)] + [(n, 65536) for n in (16, 256, 1024)]  # N, K

Sides = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Workload:
    """A whole training: its flags, and how many times the reference's speed it is to have."""

    name: str
    flags: str
    goal: float


CIFAR = Workload("CIFAR ResNet-18", "--dataset cifar10 --batch_size 64", 2)
IMAGENET = Workload("ResNet-50 at 224", "--dataset imagenet --batch_size 32 --queue_size 65536", 3)


@dataclass(frozen=True)
class Setting:
    device: torch.device
    rounds: int
    tiny: bool
    folder: Path  # of JPEG files; written if it is empty

    @property
    def pairs(self) -> "Pairs":
        return Pairs(*((8, 64, 16) if self.tiny else (64, 65536, 128)), self.device)

    @property
    def files(self) -> int:
        return 16 if self.tiny else 96


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(sides: Sides, rounds: int) -> dict[str, float]:
    """Median seconds of each side, run in turn; a first round, which does not count, warms up."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            began = clock()
            side()
            seconds[name].append(clock() - began)
    return {name: median(values[1:]) for name, values in seconds.items()}


def row(what: str, reference: str = "", here: str = "", result: str = "", goal: str = "", met: bool = True) -> str:
    return f"| {what} | {reference} | {here} | {result} | {goal}{'' if met else ', missed'} |"


def faster(what: str, times: dict[str, float], *, images: int = 0, goal: float = 0) -> str:
    """Both sides' milliseconds, or images/s where there are `images`, and how many times as fast it is here."""
    shown = [f"{digits(images / x)} images/s" if images else ms(x) for x in (times["reference"], times["here"])]
    ratio = times["reference"] / times["here"]
    return row(what, *shown, f"{ratio:.1f} x", f">= {goal} x" if goal else "", ratio >= goal)


def share(what: str, part: float, whole: float, at_most: float) -> str:
    return row(what, "", ms(part), f"{part / whole:.2%}", f"<= {at_most:.1%}", part <= at_most * whole)


def ms(seconds: float) -> str:
    return f"{digits(1e3 * seconds)} ms"


def digits(value: float) -> str:
    """Three, or all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


# The contrast head: loss and gradient


class Pairs:
    """Random unit vectors: queries (N, D) with a gradient, positives (N, D) and a queue's keys (K, D)."""

    def __init__(self, queries: int, queue: int, dim: int, device: torch.device):
        made = [torch.randn(rows, dim, device=device) for rows in (queries, queries, queue)]
        self.query, self.positive, self.keys = (x.div_(x.norm(dim=1, keepdim=True)) for x in made)
        self.query.requires_grad_()
        self.task = Task("queue", self.query, self.positive, (Negatives(self.keys),))
        self.draws = Draws(0, 0, torch.arange(queries, device=device))

    def published(self, level: str = "") -> Tensor:
        """Loss and gradient by the reference recipe, with FT where there is a `level`; returns the loss."""
        query, positive, negatives = self.query, self.positive, self.keys.clone()
        if level:
            alphas = {POSITIVE: query.shape, NEGATIVE: negatives.shape}
            for _ in range(2):  # all masks are drawn twice, however few of the numbers are used
                drawn = [torch.from_numpy(np.random.beta(a, a, shape)).float() for a, shape in alphas.items()]
                out, mix = (x.to(query.device) for x in drawn)
            if level == "batch":
                out, mix = (np.random.beta(a, a) for a in alphas)
            query, positive = (out + 1) * query - out * positive, (out + 1) * positive - out * query
            negatives = mix * negatives + (1 - mix) * self.keys.clone()[torch.randperm(len(negatives))]
        loss, scores = cross_entropy(query, positive, negatives, TEMPERATURE)
        for part in (scores[:, 0], scores[:, 1:]):
            part.mean().item(), part.var().item()
        loss.item()
        return self._backward(loss)

    def here(self, flags: str = "") -> Callable[[], Tensor]:
        """What computes loss and gradient by the program, of MoCo with these flags, and returns the loss."""
        opt, _, _ = contrast.parse(shlex.split(flags))
        transforms = build.transforms(opt)
        rewriting = Rewriting(transforms, before=opt.pre_scores and bool(transforms))
        head = Contrast(InfoNCE(TEMPERATURE, opt.one_pass), rewriting)
        return lambda: self._backward(head([self.task], self.draws).loss)

    def bare(self) -> Tensor:
        """`here` with FT at batch level, in one pass too, but with nothing that the loss can do without."""
        move, mix = FT_TRANSFORMS
        task = mix(move(self.task, self.draws), self.draws)
        scaled = task.query.detach() / TEMPERATURE
        top, total, pull = scaled.new_full((len(scaled), 1), -torch.inf), 0.0, torch.zeros_like(scaled)
        for chunk in task.negatives[0].chunks():
            logits = scaled @ chunk.T
            above, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
            shrunk, weights = (above - top).exp(), (logits - top).exp_()
            total = total * shrunk + weights.sum(1, keepdim=True)
            pull = torch.addmm(pull * shrunk, weights, chunk)
        known = (top + total.log())[:, 0] + ((task.query - task.query.detach()) * pull / total).sum(1) / TEMPERATURE
        return self._backward(F.softplus(known - task.positive_scores() / TEMPERATURE).mean())

    def _backward(self, loss: Tensor) -> Tensor:
        self.query.grad = None
        loss.backward()
        return loss.detach()


def cross_entropy(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of the positive among all scores, and the scores (N, 1 + K)."""
    scores = torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives.T], 1)
    return F.cross_entropy(scores / temperature, scores.new_zeros(len(scores), dtype=torch.long)), scores


def head(setting: Setting) -> Iterator[str]:
    """the loss over a queue and its gradient, with FT and without"""
    pairs = setting.pairs
    size = f"N {len(pairs.query)}, K {len(pairs.keys)}"
    for what, flags in (("loss", ""), ("loss with --no_one_pass", "--no_one_pass")):
        sides = {"reference": pairs.published, "here": pairs.here(flags)}
        yield faster(f"{what}, {size}", alternate(sides, setting.rounds))
    for level, goal in zip(LEVELS, (20, 20, 10)):
        recipe = partial(pairs.published, "dim" if level == "dim" else "batch")  # there is none for samples
        sides = {"reference": recipe, "here": pairs.here(f"{LEVELS[level]} {ALONE}")}
        yield faster(f"FT, a lambda for each {level}, and loss", alternate(sides, setting.rounds), goal=goal)
    for workload in (CIFAR, IMAGENET):
        pairs = pairs_of(workload, setting)
        sides = {level: pairs.here(f"{flags} {ALONE}") for level, flags in LEVELS.items()}
        times = alternate({"plain": pairs.here()} | sides, 10 * setting.rounds)
        for level in LEVELS:
            cost, whole = times[level] - times["plain"], step_times(workload, setting)["here"]
            yield share(f"FT, a lambda for each {level}, of a {workload.name} step", cost, whole, 0.03)


def statistics(setting: Setting) -> Iterator[str]:
    """what the statistics of the scores cost, and a log line"""
    costs = _costs(setting.pairs, setting)
    yield share("statistics after FT, of FT and loss", costs["after"], costs["whole"], 0.15)
    products = f"{costs['before'] / costs['product']:.1f} products of queries and queue"
    yield row("statistics before FT (off: --no_pre_scores)", "", ms(costs["before"]), products)
    costs, whole = _costs(pairs_of(IMAGENET, setting), setting), step_times(IMAGENET, setting)["here"]
    yield share(f"both, of a {IMAGENET.name} step", costs["after"] + costs["before"], whole, 0.005)
    small = Here(CIFAR, setting)
    sides = {"looking": partial(small, print_freq=1), "usual": small}
    times, often = alternate(sides, 8 * setting.rounds), small.training.opt.print_freq
    cost = (times["looking"] - times["usual"]) / often
    yield share(f"live statistics every {often} steps, of a {CIFAR.name} step", cost, times["usual"], 0.01)


def _costs(pairs: Pairs, setting: Setting) -> dict[str, float]:
    """Seconds of the statistics "after" and "before" FT, of the "whole" without the latter, and of one "product"."""
    sides = {"bare": pairs.bare, "whole": pairs.here(f"{FT} {ALONE}"), "both": pairs.here(FT)}
    times = alternate(sides | {"product": lambda: pairs.query.detach() @ pairs.keys.T}, 10 * setting.rounds)
    return times | {"after": times["whole"] - times["bare"], "before": times["both"] - times["whole"]}


def pairs_of(workload: Workload, setting: Setting) -> Pairs:
    opt, _ = resolved(workload, setting)
    return Pairs(opt.batch_size, opt.queue_size, opt.feat_dim, setting.device)


# Images


@cache
def resolved(workload: Workload, setting: Setting) -> tuple[contrast.ContrastOptions, sources.Source]:
    """A training's options as the program chooses them, and its images."""
    typed = f"{workload.flags} --data_folder . --amp --num_workers 0 --seed 0 --device {setting.device.type}"
    opt, origins, _ = contrast.parse(shlex.split(f"{typed} {TINY if setting.tiny else ''}"))
    images = build.source(contrast.parse([])[0], "train")  # the built-in ones, 32 pixels wide and in memory
    if workload == IMAGENET:
        images = files(images, setting)
    return build.resolve(opt, origins, n_data=len(images))[0], images


def files(pictures: sources.Source, setting: Setting) -> sources.Source:
    """Those in the folder; where there are none, `pictures` as JPEG of ImageNet's size: 500 x 375 pixels, 100 KB."""
    if not any(setting.folder.iterdir()):
        noise = np.random.default_rng(0)
        for number, picture in enumerate(pictures.images[: setting.files]):
            large = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((500, 375), Image.Resampling.BICUBIC)
            pixels = np.asarray(large) + noise.normal(0, 16, (375, 500, 1))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(setting.folder / f"{number}.jpg", quality=90)
    source = sources.open_source("folder", "train", folder=setting.folder)
    return source.part(torch.arange(len(source)) < setting.files)


class PublishedViews:
    """Two MoCo v2 views of each image by torchvision and Pillow."""

    def __init__(self, data: sources.Source, opt: contrast.ContrastOptions):
        blur = [T.RandomApply([self._blur], 0.5)] if opt.input_res > sources.SMALL else []
        colour = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2), *blur]
        crop, numbers = T.RandomResizedCrop(opt.input_res, (opt.crop_min, 1)), T.Normalize(data.mean, data.std)
        self.data, self.view = data, T.Compose([crop, *colour, T.RandomHorizontalFlip(), T.ToTensor(), numbers])

    def __call__(self, index: list[int]) -> list[Tensor]:
        """(N, 3, size, size) each, float."""
        pictures = [self.read(self.data.images[number]) for number in index]
        return [torch.stack([self.view(picture) for picture in pictures]) for _ in range(2)]

    @staticmethod
    def read(image: Tensor | str) -> Image.Image:
        return Image.open(image).convert("RGB") if isinstance(image, str) else T.functional.to_pil_image(image)

    @staticmethod
    def _blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


def data(setting: Setting) -> Iterator[str]:
    """two MoCo v2 views of every image, on one core"""
    for workload in (IMAGENET, CIFAR):
        yield from _views(workload, setting)


def _views(workload: Workload, setting: Setting) -> Iterator[str]:
    keep_freed_memory()
    opt, images = resolved(workload, setting)
    count = min(len(images), 4 * setting.files) // opt.batch_size * opt.batch_size
    images = images.part(torch.arange(len(images)) < count)
    loader = build.train_loader(opt, images, setting.device)
    by_pillow = replace(images, read=decode.read_by_pillow)
    slow = build.train_loader(replace(opt, fast_images=False), by_pillow, setting.device)
    published = cache(partial(Apart, _published_views, images, opt))  # by device
    kind, sides = f"in memory, {opt.input_res} px", {}
    if not images.in_memory:
        kind, samples = f"JPEG files, {opt.input_res} px", [(number, number) for number in range(count)]
        crops = partial(loader.feed.loader.dataset.__getitems__, samples)
        reading = Apart(_published_reading, images)
        sides["decoding", 0] = reading, partial(each, decode.read_image, images.images)
        sides["all that a loader process does", 5] = published(torch.device("cpu")), crops
    recipe = published(setting.device)
    sides["from image to views on the device", 0] = recipe, partial(each, len, loader)
    sides["the same with --no_fast_images", 0] = recipe, partial(each, len, slow)
    for (what, goal), (reference, here) in sides.items():
        with one_core():
            times = alternate({"reference": reference, "here": here}, setting.rounds)
        yield faster(f"{kind}: {what}", times, images=count, goal=goal)


def _published_views(
    images: sources.Source, opt: contrast.ContrastOptions, device: torch.device
) -> Callable[[], object]:
    torch.set_num_threads(1)
    views, index = PublishedViews(images, opt), [*range(len(images))]
    return lambda: [view.to(device) for view in views(index)]


def _published_reading(images: sources.Source) -> Callable[[], object]:
    return partial(each, PublishedViews.read, images.images)


def each(function: Callable, things: Iterable) -> None:
    for thing in things:
        function(thing)


@contextmanager
def one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Whole training steps


class Here:
    """Training steps of the program."""

    def __init__(self, workload: Workload, setting: Setting):
        keep_freed_memory()
        self.training = Pretraining(*resolved(workload, setting), lambda size: SilentRun(ROOT))
        self.training.progress.bar.disable = True

    def __call__(self, print_freq: int = NEVER) -> None:
        head = self.training.method.contrast
        head.rewriting = replace(head.rewriting, look_every=print_freq)
        self.training.progress.print_freq = print_freq
        self.training.advance(1)


class Published:
    """MoCo v2 as public code trains it: in fp32, with whole batch norm and a host read per step."""

    def __init__(self, workload: Workload, setting: Setting):
        self.opt, images = resolved(workload, setting)
        self.device, self.count, self.place = setting.device, len(images), 0
        self.views = PublishedViews(images, self.opt)
        self.encoder = build.encoder(asdict(self.opt)).to(self.device)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.queue = F.normalize(torch.randn(self.opt.queue_size, self.opt.feat_dim, device=self.device))
        settings = {"momentum": self.opt.momentum, "weight_decay": self.opt.weight_decay}
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=self.opt.learning_rate, **settings)

    def __call__(self) -> float:
        index = torch.randperm(self.count)[: self.opt.batch_size].tolist()
        query_view, key_view = (view.to(self.device) for view in self.views(index))
        query = self.encoder(query_view)[0]
        with torch.no_grad():
            for old, new in zip(self.key_encoder.parameters(), self.encoder.parameters()):
                old.mul_(self.opt.key_momentum).add_(new, alpha=1 - self.opt.key_momentum)
            key = self.key_encoder(key_view)[0]
        loss, _ = cross_entropy(query, key, self.queue.clone(), self.opt.temperature)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue[(self.place + torch.arange(len(key))) % len(self.queue)] = key
        self.place += len(key)
        return loss.item()


class Apart:
    """Something made and called in a process of its own, which the settings of this one's memory do not reach.

    ValueError where that fails.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *args: object):
        context = torch.multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, args), daemon=True).start()
        theirs.close()

    def __call__(self) -> None:
        with suppress(BrokenPipeError):  # what went wrong is still to be read
            self.line.send("go")
        if error := self.line.recv():
            raise ValueError(f"the reference failed: {error}")


def _serve(line: Connection, make: Callable[..., Callable[[], object]], args: tuple) -> None:
    try:
        made = make(*args)
        while line.recv():
            made()
            line.send("")
    except EOFError:  # the other end is gone: enough
        pass
    except Exception as error:
        line.send(repr(error))


@cache
def step_times(workload: Workload, setting: Setting) -> dict[str, float]:
    """Seconds of a training step."""
    sides = {"reference": Apart(Published, workload, setting), "here": Here(workload, setting)}
    return alternate(sides, setting.rounds)


def training(setting: Setting) -> Iterator[str]:
    """whole training steps of MoCo v2: same network, batch and images"""
    for workload in (CIFAR, IMAGENET):
        opt, _ = resolved(workload, setting)
        what = f"{workload.name}, batch {opt.batch_size}, K {opt.queue_size}, --amp {opt.amp}"
        yield faster(what, step_times(workload, setting), images=opt.batch_size, goal=workload.goal)


def shares(setting: Setting) -> Iterator[str]:
    """what a training step is spent on, on one core"""
    for workload in (CIFAR, IMAGENET):
        with one_core():
            spent = _parts(Here(workload, setting), setting.rounds)
        whole = spent.pop("step")
        parts = ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in spent.most_common())
        yield row(f"{workload.name} step, one core: {parts}", here=ms(whole / setting.rounds))


def _parts(here: Here, rounds: int) -> Counter[str]:
    """Seconds that `rounds` steps spend on each part, and the whole "step"."""
    spent, run, method = Counter(), here.training, here.training.method
    key_encoder = method.momentum_encoder
    places = [(Tensor, "backward"), (method.encoder, "forward"), (key_encoder, "forward"), (method.contrast, "forward")]
    places += [(run.guard, "begin"), (run.guard, "undo"), (run.scaler, "step"), (key_encoder, "update")]
    names = ["backward", "forward of queries", "forward of keys", "head", "guard", "guard", "optimizer", "EMA"]

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            began = clock()
            result = function(*args, **kwargs)
            spent[name] += clock() - began
            return result

        return call

    here()
    with ExitStack() as patches:
        for name, (owner, called) in zip(names, places):
            function = timed(name, getattr(owner, called))
            bound = partialmethod(function) if isinstance(owner, type) else function
            patches.enter_context(mock.patch.object(owner, called, bound))
        for _ in range(rounds):
            timed("step", here)()
            spent["data"] += run.progress.waited
    return spent


# Start and scale


def start(setting: Setting) -> Iterator[str]:
    """seconds from a command to its answer"""
    sides = {"help": partial(subprocess.run, [*MAIN, "--help"], capture_output=True)}
    answer = alternate(sides, setting.rounds)["help"]
    yield row("main_contrast.py --help", "", f"{answer:.2f} s", "", "< 0.5 s", answer < 0.5)
    first, _ = next(logged(f"--print_freq 1 --device {setting.device.type}"))
    yield row("main_contrast.py, first step, built-in pictures", "", f"{first:.1f} s", "", "< 10 s", first < 10)


def logged(flags: str) -> Iterator[tuple[float, str]]:
    """Seconds since the start of main_contrast.py with these flags and images/s, at every step it logs."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        typed = shlex.split(f"{flags} --model_path {folder} --tb_path {folder} --seed 0")
        unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen([*MAIN, *typed], stdout=subprocess.PIPE, text=True, env=unbuffered) as run:
            try:
                for line in run.stdout:
                    if found := re.search(r" step \d+/.* (\d+) images/s", line):
                        yield time.perf_counter() - began, found[1]
            finally:
                run.terminate()
                run.stdout.read()


def scaling(setting: Setting) -> Iterator[str]:
    """the head's time and memory against queue and batch, speed against processes"""
    for queries, queue in [(8, 64)] if setting.tiny else SCALES:
        pairs = Pairs(queries, queue, 128, setting.device)
        sides = {"reference": pairs.published, "here": pairs.here(), "FT": pairs.here(f"{FT} {ALONE}")}
        memory = {name: extra_bytes(side, setting.device) / 1e6 for name, side in sides.items()}
        times = alternate(sides, setting.rounds)
        reference, here, ft = (f"{ms(times[name])}, {memory[name]:.0f} MB" for name in sides)
        yield row(f"loss, N {queries}, K {queue} ({pairs.keys.nbytes / 1e6:.0f} MB)", reference, here, f"with FT {ft}")
    for processes in (1, 2):
        lines = logged(f"--nprocs {processes} --device cpu --print_freq {4 * setting.rounds}")
        *_, (_, speed) = islice(lines, 2)
        yield row(f"built-in pictures, --nprocs {processes} --device cpu", here=f"{speed} images/s")


def extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Memory that a call takes for a while: on a GPU, or on Linux with glibc. Some of it is chance: the least of 3."""
    return min(_extra_bytes(function, device) for _ in range(3))


def _extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# What a reader wants to know beside the rows


def machine(device: torch.device) -> str:
    described = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", described.read_text()) if described.exists() else None
    gpu = f"{torch.cuda.get_device_name()}, " if device.type == "cuda" else ""
    cpu = found[1] if found else platform.processor()
    return f"{gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def advice(device: torch.device) -> Iterator[str]:
    """What is faster on this machine, by rules: nothing is measured for it."""
    opt, rules = build.settle(contrast.parse(["--amp", "--device", device.type])[0])
    why = rules["amp"].removeprefix("auto: ")
    yield f"Leave `--amp` out: {why}." if opt.amp == "off" else f"Add `--amp`, which computes in {opt.amp}: {why}."
    cores, threads = os.cpu_count(), torch.get_num_threads()
    if device.type == "cuda":
        yield f"For image files raise `--num_workers` as long as log lines show `waiting`, up to {cores}."
    else:
        yield "Take a GPU: nine tenths of a step are convolutions, and here they run at the processor's limit."
        yield "Leave `--num_workers` at 2 or below: loader processes take cores from training."
        if threads < cores:
            yield f"Set OMP_NUM_THREADS={cores}: PyTorch uses {threads} threads on {cores} cores."
    if decode.decode_jpeg is None:
        yield "Install another build of torchvision: this one has no JPEG decoder, and Pillow's takes its place."
    yield "Try things at a small `--input_res`: the time of a step goes with its square."


ROWS = {function.__name__: function for function in (head, statistics, data, training, shares, start, scaling)}


def parse(argv: list[str] | None = None) -> tuple[list[str], argparse.Namespace]:
    listed = "\n".join(f"  {name:10}  {function.__doc__}" for name, function in ROWS.items())
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=f"{__doc__}\nrows:\n{listed}", formatter_class=raw)
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="what to measure; by default, or with all, everything")
    add("--data_folder", help="take the JPEG files of this folder instead of made ones")
    add("--rounds", type=int, default=5, metavar="N", help="how often each side runs (default: %(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default: %(default)s)")
    add("--tiny", action="store_true", help="small sizes, which tell nothing but whether all runs")
    options = parser.parse_args(argv)
    unknown = set(options.rows) - {*ROWS, "all"}
    if unknown:
        parser.error(f"there is no row {min(unknown)}: choose from all, {', '.join(ROWS)}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} measures nothing: give 1 or more")
    chosen = [name for name in ROWS if {name, "all"} & set(options.rows or ["all"])]
    return chosen, options


def main(argv: list[str] | None = None) -> int:
    rows, options = parse(argv)
    device = parallel.device(options.device)
    print(f"{machine(device)}\n\n{row('', 'reference', 'here', 'result', 'goal')}\n|---|---|---|---|---|")
    try:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(device, options.rounds, options.tiny, Path(options.data_folder or folder))
            for line in (line for name in rows for line in ROWS[name](setting)):
                print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 1
    print("\nWhat would be faster here:\n", *(f"- {sentence}" for sentence in advice(device)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
