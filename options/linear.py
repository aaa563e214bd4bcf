"""Options of main_linear.py."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from options import base, contrast, shared
from options.base import FRACTION, NOT_NEGATIVE, POSITIVE, SHARE, option
from options.presets import DATASETS, HEADS, METHODS, VIEWS


@dataclass(frozen=True)
class LinearOptions(shared.Shared):
    """Evaluation of a pre-trained encoder. Data and model are the checkpoint's unless said otherwise."""

    dataset: Literal[tuple(DATASETS)] | None = option(None, "what to evaluate on", group="data")
    input_res: int | None = option(None, "side of the pictures in pixels", group="data", must=POSITIVE)
    crop: float = option(0.2, "smallest share of the picture a crop covers", group="data", must=SHARE)
    aug_linear: Literal["NULL", "RA"] = option("NULL", "RA: add RandAugment to crop and flip", group="data")

    ckpt: str | None = option(None, "run folder or checkpoint; without one, an untrained encoder", group="evaluation")
    eval: Literal["linear", "knn"] = option("linear", "what to measure", group="evaluation")
    layer: str | None = option(None, "layer of the backbone, name or number; by default the last", group="evaluation")
    n_class: int | None = option(
        None, "classes; by default as many as the data have", group="evaluation", must=POSITIVE
    )
    use_ema: bool = option(False, "evaluate the key encoder", group="evaluation")
    cache_features: bool = option(False, "one pass through the encoder, no augmentation", group="evaluation")
    knn_k: int = option(200, "neighbours", group="evaluation", must=POSITIVE)
    knn_t: float = option(0.1, "temperature of their votes", group="evaluation", must=POSITIVE)

    method: Literal[tuple(METHODS)] | None = option(None, "method", group="checkpoint")
    arch: str | None = option(None, "backbone", group="checkpoint")
    width: float | None = option(None, "factor on the backbone's channels", group="checkpoint", must=POSITIVE)
    head: Literal[HEADS] | None = option(None, "projection head", group="checkpoint")
    feat_dim: int | None = option(None, "size of the embedding", group="checkpoint", aliases=("-d",), must=POSITIVE)
    temperature: float | None = option(
        None, "temperature", group="checkpoint", aliases=("-t", "--nce_t"), must=POSITIVE
    )
    queue_size: int | None = option(
        None, "keys in the queue", group="checkpoint", aliases=("-k", "--nce_k"), must=POSITIVE
    )
    key_momentum: float | None = option(
        None, "momentum of the key encoder", group="checkpoint", aliases=("--alpha",), must=FRACTION
    )
    bank_momentum: float | None = option(
        None, "momentum of a memory bank", group="checkpoint", aliases=("-m", "--nce_m"), must=FRACTION
    )
    modal: Literal["RGB", "CMC"] | None = option(None, "what the encoder sees", group="checkpoint")
    view: Literal[VIEWS] | None = option(None, "colour space of --modal CMC", group="checkpoint")
    mem: Literal["moco", "bank", "batch", "none"] | None = option(None, "where negatives are kept", group="checkpoint")
    jigsaw: bool | None = option(None, "trained with a jigsaw branch", group="checkpoint")

    epochs: int = option(100, "passes over the data", group="optimisation", must=POSITIVE)
    learning_rate: float | None = option(
        None, "first learning rate; by default the published one, see docs/evaluation.md", group="optimisation",
        aliases=("--lr",), must=POSITIVE,
    )  # fmt: skip
    lr_decay_epochs: tuple[int, ...] = option(
        (60, 80), "epochs after which it drops", group="optimisation", must=POSITIVE
    )
    weight_decay: float = option(0.0, "weight decay", group="optimisation", must=NOT_NEGATIVE)

    def validate(self, typed: Collection[str] = ()) -> None:
        """Raise ValueError, naming the flags, for values that cannot work (together)."""
        shared.check(self)
        if self.eval == "linear":
            shared.check_shares(self)
        if self.cache_features and self.aug_linear != "NULL":
            raise ValueError(
                "--cache_features sees every picture once and --aug_linear RA changes it every epoch: leave one out"
            )


FROM_CHECKPOINT = tuple(f.name for f in dataclasses.fields(LinearOptions) if f.metadata["group"] == "checkpoint")

_PRETRAINING = [f.name for cls in (contrast.ContrastOptions, contrast.PublishedFT) for f in dataclasses.fields(cls)]
# Only looked up for flags this program does not have.
REFUSED = contrast.REFUSED | dict.fromkeys(
    (*_PRETRAINING, "aug", "custom_head"), "belongs to main_contrast.py: leave it out here"
)


def parse(argv: list[str]) -> tuple[LinearOptions, dict[str, str], list[str]]:
    """argv -> options, where each value came from, and lines worth printing. Exits with code 2 on a wrong argv."""
    options, sources, typed = base.parse(LinearOptions, argv, layers=lambda typed: [], refused=REFUSED)
    return shared.placed(options), sources, _notes(options, typed)


def contradictions(options: LinearOptions, trained: dict) -> list[str]:
    """What was typed about the checkpoint against `trained`, the option values it was trained with."""
    sentences = []
    for name in FROM_CHECKPOINT:
        asked, was = getattr(options, name), trained.get(name, False)
        if asked not in (None, was):
            how = f"with {was}" if was else "without it"
            sentences.append(f"--{name} {asked} contradicts the checkpoint, trained {how}: leave the flag out")
    return sentences


def _notes(options: LinearOptions, typed: dict) -> list[str]:
    probe_only = (
        "epochs", "learning_rate", "lr_decay_epochs", "lr_decay_rate", "cosine", "weight_decay", "momentum",
        "aug_linear", "crop", "cache_features",
    )  # fmt: skip
    unused = probe_only if options.eval == "knn" else ("knn_k", "knn_t")
    why = dict.fromkeys(unused, f"with --eval {options.eval}")
    if options.eval == "knn":
        why |= dict.fromkeys(("resume", "print_freq", "save_freq", "keep"), "with --eval knn, which trains nothing")
    if options.cache_features:
        why.setdefault("crop", "with --cache_features")
    return shared.notes(options, typed) + shared.without_effect(why, typed)
