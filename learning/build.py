"""The only place that turns options into objects."""

import dataclasses
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from datasets import recipes, sources
from datasets.colours import Colours
from datasets.colours import colours as colour_space
from datasets.decode import read_by_pillow, read_image
from datasets.loader import EvalLoader, TrainLoader
from datasets.one_by_one import one_by_one
from learning import checkpoint, parallel, weights
from learning.evaluations import knn
from learning.losses import NCE, Cosine, InfoNCE
from learning.methods.bank import MemoryBank
from learning.methods.base import Contrast, Method, Rewriting
from learning.methods.byol import BYOL
from learning.methods.jigsaw import Jigsaw
from learning.methods.moco import MoCo
from learning.methods.simclr import SimCLR
from learning.methods.simsiam import SimSiam
from learning.methods.supcon import SupCon
from learning.methods.swav import SwAV
from learning.schedule import Schedule, cosine
from memory.feature_transform import Coefficient, NegativeTransform, PositiveTransform
from memory.stores import Bank, Queue
from models.encoder import CHANNELS, Encoder
from models.heads import JigsawHead, predictor
from models.layouts import Trunk, same_trunk
from models.norm import split_batch_norm, sync_batch_norm
from options.contrast import ContrastOptions

LARGEST_QUEUE = 65536
LARGE = 100_000  # images from which on the key encoder may take its time
SPLIT_CHUNK = range(8, 65)  # images per batch-norm chunk


# Choices that depend on the data or the machine: made once by a written rule, printed, stored, kept on resume.


def resolve(
    opt: ContrastOptions, origins: dict[str, str], *, n_data: int, trained_with: dict[str, Any] | None = None
) -> tuple[ContrastOptions, dict[str, str]]:
    """Replace every automatic option by its value; returns the options and, by name, the rule that chose each one.

    `trained_with` is the checkpoint a run goes on from: its batch-norm chunks are dealt out anew if it ran on another
    number of processes.
    """
    chosen: dict[str, tuple[Any, str]] = {}
    if trained_with and not opt.sync_bn and origins["bn_splits"] == "checkpoint":
        chunks = opt.bn_splits * trained_with["position"]["processes"]
        chosen["bn_splits"] = max(chunks // parallel.world_size(), 1), f"the checkpoint's {chunks} over all processes"
    if opt.queue_size is None:
        chosen["queue_size"] = _queue_size(opt, n_data)
    if opt.key_momentum is None and (opt.mem == "moco" or opt.method == "BYOL"):
        chosen["key_momentum"] = 0.999 if n_data >= LARGE else 0.99, f"0.99 below {LARGE} images, 0.999 from there on"
    if opt.bn_splits == "auto":
        chosen["bn_splits"] = _bn_splits(opt)
    if opt.stem == "auto":
        small = opt.input_res <= sources.SMALL
        chosen["stem"] = "small" if small else "imagenet", f"--input_res {opt.input_res}"
    if opt.method == "SwAV":
        chosen |= _swav(opt, n_data, chosen["queue_size"][0] if "queue_size" in chosen else opt.queue_size)
    if opt.warmup_epochs is None:
        length = min(10 if opt.epochs > 500 else 5, max(opt.epochs // 4, 1))
        rule = "with --warm or a batch above 256: 5 epochs, 10 of more than 500, at most a quarter of the run"
        chosen["warmup_epochs"] = length if opt.warm or opt.batch_size > 256 else 0, rule
    return settle(opt, chosen)


def settle(opt, chosen: dict[str, tuple[Any, str]] | None = None) -> tuple[Any, dict[str, str]]:
    """Put `chosen` (name -> value and rule) into any program's options, and a precision and a seed where none is."""
    chosen = dict(chosen or {})
    if opt.amp == "auto":
        chosen["amp"] = _precision(parallel.device(opt.device, opt.gpu))
    if opt.seed is None:
        chosen["seed"] = parallel.broadcast_object(secrets.randbelow(2**31)), "drawn"
    values = {name: value for name, (value, _) in chosen.items()}
    return dataclasses.replace(opt, **values), {name: f"auto: {why}" for name, (_, why) in chosen.items()}


def _swav(opt: ContrastOptions, n_data: int, queue_size: int) -> dict[str, tuple[Any, str]]:
    """3000 prototypes, 6 small views of 96 where large ones have 224, and the first epoch frozen, as published."""
    together = opt.batch_size + (queue_size if opt.queue_epoch < opt.epochs else 0)
    rules = {
        "prototypes": (min(3000, together), "3000, at most the images assigned at a time"),
        "small_crops": (6 if opt.input_res > sources.SMALL else 0, f"6 above {sources.SMALL} px"),
        "small_res": (max(round(opt.input_res * 96 / 224), 1), f"96 / 224 of --input_res {opt.input_res}"),
        "freeze_prototypes": (n_data // opt.batch_size, "the steps of an epoch"),
    }
    return {name: rule for name, rule in rules.items() if getattr(opt, name) is None}


def _queue_size(opt: ContrastOptions, n_data: int) -> tuple[int, str]:
    if opt.method == "SwAV":
        size = min(15 * opt.batch_size, n_data // 2) if opt.batch_size < 1024 else 0
        return size, "15 batches, where one is below 1024 images, at most half of all"
    size = min(LARGEST_QUEUE, 1 << max((n_data // 2).bit_length() - 1, 2))
    return size, f"largest power of two up to half of {n_data} images, 4 to {LARGEST_QUEUE}"


def _bn_splits(opt: ContrastOptions) -> tuple[int, str]:
    """Several processes protect the match by shuffling (MoCo, section 3.3); one process splits its batch instead."""
    if opt.mem != "moco":
        return 1, f"with --mem {opt.mem} batch norm cannot give the match away"
    if parallel.world_size() > 1:
        return 1, "batches are shuffled over processes"
    batch = opt.batch_size // opt.accumulate
    fitting = [n for n in SPLIT_CHUNK if batch % n == 0 and 2 * n <= batch]
    if not fitting:
        return 1, "the batch cannot be split into equal chunks of 8 to 64 images, so batch norm may leak the match"
    return batch // fitting[-1], f"one process normalises chunks of {fitting[-1]} images, in place of ShuffleBN"


def _precision(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has it") if bf16 else ("fp16", "this GPU has no bf16 of its own")
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, but nothing public tells
    bf16 = any(getattr(torch.cpu, test, bool)() for test in tests)
    return ("bf16", "this CPU multiplies it natively") if bf16 else ("off", "this CPU has no native bf16")


def run_name(opt: ContrastOptions) -> str:
    """A short readable name, to which a number is added."""
    ft = "-ft" if (opt.ft_pos, opt.ft_neg) != ("none", "none") else ""
    repetition = f"-run{opt.exp_iter}" if opt.exp_iter >= 0 else ""
    return f"{opt.method}{ft}-{opt.dataset}-{opt.arch}{repetition}"


# Objects


def source(opt, split: str) -> sources.Source:
    """One split of the data, normalised as asked; with --download, fetched by the main process before others look."""
    where = {"folder": opt.data_folder, "imagenet100path": opt.imagenet100path}
    if opt.download:
        parallel.on_main(lambda: sources.open_source(opt.dataset, split, **where, download=True) and None)
    data = sources.open_source(opt.dataset, split, **where, fraction=opt.data_fraction)
    read = read_image if opt.fast_images else read_by_pillow
    return dataclasses.replace(data, mean=opt.mean or data.mean, std=opt.std or data.std, read=read)


def views(opt, recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe as it is asked for: in batches or one by one."""
    return recipe if opt.fast_images else one_by_one(recipe)


def workers(opt) -> int:
    """--num_workers counts those of a node, as published."""
    return -(-opt.num_workers // parallel.local_world_size())


def labelled_sources(opt, train: sources.Source | None = None) -> tuple[sources.Source, sources.Source]:
    """Training and test images for an evaluation, their classes numbered alike. `train` is used if it has labels.

    ValueError where there are no labels.
    """
    if train is None or train.labels is None:
        train = source(opt, "labelled")
    if train.labels is None:
        raise ValueError(
            f"{opt.data_folder} has no labels, and an evaluation needs them; sort the images into a folder per class."
        )
    test, processes = source(opt, "val"), parallel.world_size()
    if len(test) < processes:
        raise ValueError(f"{len(test)} images to evaluate on are fewer than the {processes} processes; lower --nprocs.")
    return train, test


def train_loader(opt: ContrastOptions, data: sources.Source, device: torch.device) -> TrainLoader:
    """Batches of the views that the method needs. ValueError where it needs labels and there are none."""
    if opt.method == "SupCon" and data.labels is None:
        raise ValueError(
            f"--method SupCon learns from labels and {opt.data_folder or opt.dataset} has none; sort the images into a "
            "folder per class or choose another --method."
        )
    recipe = recipes.training(
        opt.recipe,
        views=("query",) if opt.mem == "bank" else ("query", "key"),
        input_res=opt.input_res,
        crop_min=opt.crop_min,
        colours=colours(dataclasses.asdict(opt), data),
        small=(opt.small_crops, opt.small_res, opt.small_min) if opt.method == "SwAV" else (0, 0, 0.0),
        jigsaw=opt.jigsaw,
    )
    return TrainLoader(
        data,
        views(opt, recipe),
        batch_size=opt.batch_size // opt.accumulate,
        **parallel.share(),
        seed=opt.seed,
        num_workers=workers(opt),
        device=device,
        dealt=("key",) if opt.mem == "moco" else (),
        exchange=parallel.deal,
        replace_bad=opt.on_bad_image == "skip",
    )


def colours(values: dict[str, Any], data: sources.Source) -> Colours:
    """How the encoder trained with these option values wants to see the images of `data`."""
    return colour_space(values["modal"], values["view"], data.mean, data.std)


def encoder(values: dict[str, Any]) -> Encoder:
    """An untrained encoder from option values, as they are stored in a checkpoint."""
    network = {name: values[name] for name in ("arch", "width", "stem", "head", "feat_dim")}
    return Encoder(**network, channels=CHANNELS[values["modal"]])


def transforms(opt: ContrastOptions) -> list:
    chosen = []
    if opt.ft_pos != "none":
        lam = Coefficient(1.0 if opt.ft_pos_distribution == "uniform" else opt.ft_pos_alpha, opt.ft_pos_granularity)
        unit = opt.ft_post_norm in ("pos", "both") or opt.method == "SwAV"  # whose prototypes are of unit length
        chosen.append(PositiveTransform(lam, opt.ft_pos == "extrapolate", unit))
    if opt.ft_neg != "none":
        lam = Coefficient(1.0 if opt.ft_neg_distribution == "uniform" else opt.ft_neg_alpha, opt.ft_neg_granularity)
        chosen.append(NegativeTransform(lam, opt.ft_neg == "append", opt.ft_post_norm in ("neg", "both")))
    return chosen


def layout(opt) -> torch.memory_format:
    """How networks and images lie in memory."""
    return torch.channels_last if opt.channels_last else torch.contiguous_format


def method(opt: ContrastOptions, steps_per_epoch: int, n_data: int, start: Trunk | None = None) -> Method:
    """The method on the CPU, every weight a function of the seed, except for the backbone that --init gave."""
    chunks = parallel.world_size() * opt.bn_splits * opt.accumulate
    if opt.batch_size < 2 * chunks:
        raise ValueError(
            f"--batch_size {opt.batch_size} is too small for the {chunks} parts that batch norm sees separately "
            "(processes times --bn_splits times --accumulate), which need 2 images each: raise it."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(opt.seed)
        network = encoder(dataclasses.asdict(opt))
        if start:
            network.backbones.load_state_dict(start.weights)
        network = split_batch_norm(network, opt.bn_splits) if opt.bn_splits > 1 else network
        made = _around(network, opt, steps_per_epoch, n_data)
    made = made.to(memory_format=layout(opt))
    return _synchronised(made, opt) if opt.sync_bn and parallel.world_size() > 1 else made


def _synchronised(made: Method, opt: ContrastOptions) -> Method:
    if parallel.device(opt.device, opt.gpu).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(made)
    return sync_batch_norm(made, parallel.mean_with_gradient, parallel.world_size())


def _around(network: Encoder, opt: ContrastOptions, steps_per_epoch: int, n_data: int) -> Method:
    """The method that trains `network`. A memory's random vectors come from the global generator."""
    rewriting, modalities, seed = _rewriting(opt, steps_per_epoch), len(network.channels), opt.seed
    match opt.method:
        case "SwAV":
            return _make_swav(network, opt, rewriting, steps_per_epoch)
        case "SimSiam":
            head, contrast = predictor(opt.feat_dim, max(opt.feat_dim // 4, 1)), Contrast(Cosine(0, 1), rewriting)
            return SimSiam(network, predictor=head, fix_predictor=opt.fix_pred_lr, contrast=contrast, seed=seed)
        case "BYOL":
            head, contrast = predictor(opt.feat_dim, 2 * network.feature_dim), Contrast(Cosine(2, 2), rewriting)
            momentum = _key_momentum(opt, steps_per_epoch)
            return BYOL(network, predictor=head, key_momentum=momentum, contrast=contrast, seed=seed)
    objective = InfoNCE(opt.temperature, opt.one_pass)
    if opt.loss == "nce":
        objective = NCE(opt.temperature, tasks=modalities * (1 + opt.jigsaw))
    contrast = Contrast(objective, rewriting)
    if opt.mem == "batch":
        return (SupCon if opt.method == "SupCon" else SimCLR)(network, contrast=contrast, seed=seed)
    heads = [JigsawHead(opt.head, trunk.feature_dim, opt.feat_dim) for trunk in network.backbones if opt.jigsaw]
    common = {"contrast": contrast, "seed": seed, "jigsaw": [Jigsaw(heads, opt.beta)] if heads else []}
    if opt.mem == "bank":
        banks = [Bank(n_data, opt.feat_dim, opt.bank_momentum) for _ in network.channels]
        return MemoryBank(network, banks=banks, negatives=opt.queue_size, **common)
    queues = [Queue(opt.queue_size, opt.feat_dim) for _ in network.channels]
    return MoCo(network, key_momentum=_key_momentum(opt, steps_per_epoch), queues=queues, **common)


def _make_swav(network: Encoder, opt: ContrastOptions, rewriting: Rewriting, steps_per_epoch: int) -> SwAV:
    return SwAV(
        network,
        dim=opt.feat_dim,
        prototypes=opt.prototypes,
        small=opt.small_crops,
        temperature=opt.temperature,
        epsilon=opt.epsilon,
        iterations=opt.sinkhorn_iterations,
        freeze=opt.freeze_prototypes,
        queues=[Queue(opt.queue_size, opt.feat_dim) for _ in range(2) if opt.queue_size],
        queue_start=opt.queue_epoch * steps_per_epoch,
        queue_full=opt.queue_epoch * steps_per_epoch + -(-opt.queue_size // opt.batch_size),
        rewriting=rewriting,
        seed=opt.seed,
    )


def _rewriting(opt: ContrastOptions, steps_per_epoch: int) -> Rewriting:
    chosen = transforms(opt)
    return Rewriting(
        chosen,
        begin_step=opt.ft_begin_epoch * steps_per_epoch,
        untouched=() if opt.ft_jigsaw else ("jigsaw",),
        before=opt.pre_scores and bool(chosen),
        look_every=opt.print_freq,
    )


def _key_momentum(opt: ContrastOptions, steps_per_epoch: int) -> Callable[[int], float]:
    """The key encoder's momentum by step; the cosine ends at 1 (Grill et al., 2020, section 3.2)."""
    if opt.key_schedule == "constant":
        return lambda step: opt.key_momentum
    return lambda step: 1 - cosine(step / (opt.epochs * steps_per_epoch), 1 - opt.key_momentum)


def optimizer(opt: ContrastOptions, model: Method) -> torch.optim.Optimizer:
    """SGD or LARS (You et al., 2017). Without --decay_all biases and norms do not decay, and LARS leaves their rate."""
    settings = {"lr": opt.learning_rate, "momentum": opt.momentum, "weight_decay": opt.weight_decay}
    groups = model.param_groups()
    large = {"always_adapt": True} if opt.optimizer == "lars" else {}
    small = {} if opt.decay_all else {"weight_decay": 0.0}
    if large or small:
        groups = [
            group | {"params": [p for p in group["params"] if (p.ndim > 1) is many]} | special
            for group in groups
            for many, special in ((True, large), (False, small))
        ]
    if opt.optimizer == "sgd":
        return torch.optim.SGD(groups, **settings)
    from timm.optim import Lars  # slow to import, and seldom needed

    return Lars(groups, **settings)


def schedule(opt, steps_per_epoch: int, **warmup: Any) -> Schedule:
    """The learning rates of either program; `warmup` goes to `Schedule` as it is."""
    return Schedule(
        base=opt.learning_rate,
        epochs=opt.epochs,
        steps_per_epoch=steps_per_epoch,
        cosine=opt.cosine,
        milestones=opt.lr_decay_epochs,
        decay_rate=opt.lr_decay_rate,
        **warmup,
    )


def autocast(amp: str, device: torch.device) -> partial[AbstractContextManager]:
    """A function that opens the precision `amp` (off, bf16, fp16) for a forward pass."""
    if amp == "off":
        return partial(nullcontext)
    return partial(torch.autocast, device.type, torch.bfloat16 if amp == "bf16" else torch.float16)


def eval_loader(
    opt, data: sources.Source, device: torch.device, seen: Colours, replace_bad: bool = False
) -> EvalLoader:
    """Every image of `data` once, under the test view."""
    return EvalLoader(
        data,
        views(opt, recipes.evaluation(opt.input_res, seen)),
        batch_size=opt.batch_size,
        **parallel.share(),
        num_workers=workers(opt),
        device=device,
        replace_bad=replace_bad,
    )


def knn_accuracy(
    opt: ContrastOptions,
    network: Encoder,
    images: tuple[sources.Source, sources.Source],
    device: torch.device,
    bad: dict[str, str],
) -> dict[str, dict[str, float]]:
    """k-NN top-1 and top-5 of an encoder in training, on the backbone and on the head output.

    It ends no training: images that cannot be read are replaced as there, and added to `bad`.
    """
    seen, replace_bad = colours(dataclasses.asdict(opt), images[0]), opt.on_bad_image == "skip"
    loaders = [eval_loader(opt, source, device, seen, replace_bad) for source in images]
    n_class, precision = len(images[0].classes), autocast(opt.amp, device)
    results = knn.evaluate(network, *loaders, k=200, temperature=0.1, n_class=n_class, autocast=precision)
    for loader in loaders:
        bad |= loader.bad
    return results


def load_encoder(path: str, use_ema: bool) -> tuple[Encoder, dict[str, Any], list[str]]:
    """The (momentum) encoder of a checkpoint in evaluation mode, the option values it was trained with, and remarks.

    Of another library's file that is the backbone alone, and only how to build it and to normalise images is known.
    """
    state = weights.read(path)
    if not checkpoint.is_ours(state):
        found = weights.trunk(path, state, use_ema=use_ema)
        return *weights.foreign_encoder(found, state), [str(found)]
    prefix = "momentum_encoder.encoder." if use_ema else "encoder."
    tensors = {name.removeprefix(prefix): w for name, w in state["method"].items() if name.startswith(prefix)}
    if not tensors:
        raise ValueError(f"{path} holds no momentum encoder; leave --use_ema or --ema out.")
    network: nn.Module = encoder(state["options"])
    network.load_state_dict(tensors)
    return network.eval(), state["options"], []


def starting_trunk(opt: ContrastOptions) -> Trunk:
    """The backbone in the file --init names. ValueError when it is another architecture than `opt` asks for."""
    found = weights.trunk(opt.init, weights.read(opt.init))
    same = same_trunk(opt.arch, opt.width, found.arch, found.width)
    if not same or (found.stem, found.modal) != (opt.stem, opt.modal):
        raise ValueError(
            f"--init {opt.init} holds another backbone than this run's {opt.arch} of width {opt.width:g} with "
            f"{opt.stem} stem: add {found.options}."
        )
    return found
