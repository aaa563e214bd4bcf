"""What is evaluated: an encoder, and the labelled images it meets."""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from datasets.sources import Source
from learning import build
from models import trunks
from models.encoder import Encoder
from models.layouts import same_trunk
from options import base
from options.contrast import ContrastOptions
from options.linear import FROM_CHECKPOINT, LinearOptions, contradictions
from options.presets import DATASETS, presets
from options.shared import dataset_of, without_effect

Values = dict[str, Any]  # of the options an encoder was trained with
BACKBONE = ("arch", "width", "modal")  # what the weights alone tell
NETWORK = ("method", *BACKBONE, "view", "head", "feat_dim")  # what may be chosen for an encoder without checkpoint


def encoder(opt: LinearOptions) -> tuple[Callable[[int], Encoder], Values, list[str]]:
    """A function from the seed to the encoder, the option values of its training, and remarks on its file.

    Without --ckpt it is the untrained encoder with which main_contrast.py would start under that seed. ValueError when
    what was typed about the encoder contradicts its checkpoint, and when nothing says which images to evaluate it on.
    """
    if opt.ckpt is None:
        values = _untrained(opt)
        return partial(_initialised, values), values, []
    trained, values, remarks = build.load_encoder(opt.ckpt, opt.use_ema)
    values = values | {"view": values["view"] if values["modal"] == "CMC" else None}
    if "method" in values:
        wrong = contradictions(opt, values)
    else:
        wrong = _other_architecture(opt, values)
        remarks = remarks + _unread(opt, values)
        values = values | _images_meant(opt) | {"view": opt.view or values["view"]}  # of RGB it means nothing
    if wrong:
        raise ValueError(f"{wrong[0]}.")
    return lambda seed: trained, values, remarks


def _other_architecture(opt: LinearOptions, values: Values) -> list[str]:
    """All that another library's file can contradict."""
    arch, width, modal = (values[name] for name in BACKBONE)
    asked = (opt.arch or arch), (opt.width or (1.0 if opt.arch else width))
    if same_trunk(*asked, arch, width) and opt.modal in (None, modal):
        return []
    typed = " ".join(f"--{name} {getattr(opt, name)}" for name in BACKBONE if getattr(opt, name))
    holds = f"{arch} of width {width:g} for --modal {modal}"
    return [f"{opt.ckpt} holds a {holds}, which {typed} contradicts: leave the flag out"]


def _unread(opt: LinearOptions, values: Values) -> list[str]:
    """About a training of which another library's file tells nothing."""
    why = f"with {opt.ckpt}, of which only the backbone is read"
    pair = values["modal"] == "CMC"
    known = ("method", *BACKBONE, *["view"] * pair)
    typed = {name: getattr(opt, name) for name in FROM_CHECKPOINT if name not in known}
    typed = {name: value for name, value in typed.items() if value is not None}
    colours = f"{opt.ckpt} does not tell its colour space, taken to be {values['view']} as published: --view changes it"
    return without_effect(dict.fromkeys(typed, why), typed) + [colours] * (pair and not opt.view)


def _images_meant(opt: LinearOptions) -> Values:
    """Other libraries' files do not tell what they were trained on."""
    if opt.dataset is None and opt.data_folder is None:
        raise ValueError(f"{opt.ckpt} does not say which images it is for: add --data_folder, or --dataset shapes.")
    dataset = opt.dataset or dataset_of(opt.data_folder)
    return {"dataset": dataset, "input_res": DATASETS[dataset].get("input_res", ContrastOptions.input_res)}


def _untrained(opt: LinearOptions) -> Values:
    beside = [name for name in (*FROM_CHECKPOINT, "use_ema") if name not in NETWORK and getattr(opt, name)]
    if beside:
        raise ValueError(f"--{beside[0]} is about a trained encoder; leave it out or name its checkpoint with --ckpt.")
    dataset = opt.dataset or ("shapes" if opt.data_folder is None else dataset_of(opt.data_folder))
    typed = {name: getattr(opt, name) for name in (*NETWORK, "input_res") if getattr(opt, name) is not None}
    brought = presets(dataset, opt.method or ContrastOptions.method)
    layers = [*brought, ("typed", typed), ("untrained", {"dataset": dataset, "seed": 0})]
    options, _ = base.merge(ContrastOptions, layers)
    return dataclasses.asdict(build.resolve(options, {}, n_data=0)[0])


def _initialised(values: Values, seed: int) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build.encoder(values).eval()


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 of all parameters and buffers: equal if and only if they are bit for bit the same."""
    digest = hashlib.sha256()
    for name, x in encoder.state_dict().items():
        digest.update(name.encode() + x.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def complete(opt: LinearOptions, trained: Values) -> tuple[LinearOptions, dict[str, str]]:
    """Fill in what was not typed, the data options from those of the training, and tell where they came from.

    `layer` becomes a name; ValueError when there is none such.
    """
    moved = opt.data_folder is not None and trained["dataset"] in ("shapes", "npz", "folder")
    dataset = opt.dataset or (dataset_of(opt.data_folder) if moved else trained["dataset"])
    names = ["input_res", *(("data_folder", "imagenet100path") if dataset == trained["dataset"] else ())]
    taken = {"dataset": dataset} if opt.dataset is None else {}
    taken |= {name: trained[name] for name in names if getattr(opt, name) is None and trained.get(name) is not None}
    where = "untrained encoder" if opt.ckpt is None else "checkpoint" if "method" in trained else f"dataset {dataset}"
    origins = dict.fromkeys(taken, where)
    taken["layer"] = _layer(opt.layer, trained["arch"])
    if opt.layer is None:
        origins["layer"] = "the last"
    if opt.learning_rate is None:
        taken["learning_rate"], origins["learning_rate"] = _learning_rate(trained, taken["layer"])
    return dataclasses.replace(opt, **taken), origins


def _layer(asked: str | None, arch: str) -> str:
    names = trunks.layers(arch)
    numbered = {str(number): name for number, name in enumerate(names, 1)}
    layer = numbered.get(asked, asked or names[-1])
    if layer not in names:
        raise ValueError(f"{arch} has no --layer {asked}; choose one of {', '.join(names)}, or 1 to {len(names)}.")
    return layer


def _learning_rate(trained: Values, layer: str) -> tuple[float, str]:
    """What was published for a linear probe on such an encoder, and the rule (He et al., 2020; Tian et al., 2020)."""
    arch, factor = trunks.split_factor(trained["arch"])
    if arch == "alexnet":
        return 0.1, "auto: published for AlexNet"
    if layer == "pool" and factor * trained["width"] >= 4:
        return 50.0, "auto: published for the last layer of ResNets of width 4"
    return 30.0, "auto: published for ResNets"


def images(opt: LinearOptions, trained: Values) -> tuple[Source, Source]:
    """Labelled training and test images, normalised as the encoder is used to."""
    train, test = (_as_in_training(source, opt, trained) for source in build.labelled_sources(opt))
    return train, test


def _as_in_training(source: Source, opt: LinearOptions, trained: Values) -> Source:
    """`source` normalised as was typed, else as the training images were; an untrained encoder is used to nothing."""
    wanted = {name: getattr(opt, name) or trained.get(name) for name in ("mean", "std")}
    return dataclasses.replace(source, **{name: tuple(values) for name, values in wanted.items() if values})


def n_class(opt: LinearOptions, source: Source) -> int:
    """Outputs of the classifier. ValueError when --n_class leaves out classes that the images have."""
    found = len(source.classes)
    if opt.n_class is not None and opt.n_class < found:
        raise ValueError(f"--n_class {opt.n_class} is below the {found} classes of the images; leave it out.")
    return opt.n_class or found
