"""Options of main_contrast.py."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from options import base, shared
from options.base import FRACTION, NOT_NEGATIVE, POSITIVE, SHARE, option
from options.presets import DATASETS, HEADS, METHODS, VIEWS, presets

_FT, _SINGLE, _PUBLISHED = "feature transformation", "single methods", "published spellings"
_DEAD = "never had an effect in the published code and is not offered: leave it out"
_LINEAR = "belongs to main_linear.py: leave it out here"

REFUSED = {
    **dict.fromkeys(("feature_mix", "mix_ratio", "mix_alpha", "time_mix", "only_mix"), _DEAD),
    **dict.fromkeys(("aug_linear", "crop", "ckpt", "n_class", "use_ema"), _LINEAR),
}

REMEMBERING = ("moco", "bank")  # kinds of --mem that keep past embeddings
MEMORY = {"SimSiam": "none", "BYOL": "none", "SwAV": "none", "SupCon": "batch"}  # methods with a loss of their own

Distribution = Literal["beta", "uniform"]
Granularity = Literal["batch", "sample", "dim"]


@dataclass(frozen=True)
class ContrastOptions(shared.Shared):
    """Contrastive pre-training. The defaults shown are those of the chosen --dataset and --method."""

    dataset: Literal[tuple(DATASETS)] = option("shapes", "what to train on", group="data")
    input_res: int = option(224, "side of the views in pixels", group="data", must=POSITIVE)
    crop_min: float = option(0.2, "smallest share of the picture a crop covers", group="data", must=SHARE)
    recipe: Literal["mocov1", "mocov2", "cmc", "cmcv2", "infomin", "simclr", "byol", "swav"] = option(
        "mocov1", "how views are made", group="data", aliases=("--aug",),
        spellings={"A": "mocov1", "B": "mocov2", "C": "cmc", "D": "infomin", "E": "cmcv2"},
    )  # fmt: skip
    on_bad_image: Literal["skip", "stop"] = option(
        "skip", "what to do about one that cannot be read; skip: show another", group="data"
    )
    modal: Literal["RGB", "CMC"] = option("RGB", "what the encoder sees; CMC: two halves of --view", group="method")
    view: Literal[VIEWS] = option("YDbDr", "colour space that --modal CMC splits", group="method")

    method: Literal[tuple(METHODS)] = option("MoCov2", "preset to start from", group="method")
    arch: str = option("resnet50", "backbone; resnet50x2 is twice as wide", group="method")
    init: str | None = option(None, "checkpoint to start the backbone from; see docs/weights.md", group="method")
    width: float = option(1.0, "factor on the backbone's channels", group="method", must=POSITIVE)
    stem: Literal["auto", "imagenet", "small"] = option(
        "auto", "first layers; small: stride 1 for small pictures", group="method"
    )
    head: Literal[HEADS] = option("linear", "projection head", group="method", aliases=("--custom_head",))
    feat_dim: int = option(128, "size of the embedding", group="method", aliases=("-d",), must=POSITIVE)
    temperature: float = option(
        0.07, "temperature of the softmax", group="method", aliases=("-t", "--nce_t"), must=POSITIVE
    )
    mem: Literal["moco", "bank", "batch", "none"] = option(
        "moco", "negatives: a queue, a bank of all images, the batch itself", group="method"
    )
    queue_size: int | None = option(
        None, "negatives: queue, or draws of a bank", group="method",
        aliases=("-k", "--nce_k", "--queue_length"), must=NOT_NEGATIVE,
    )  # fmt: skip
    loss: Literal["ce", "nce"] = option("ce", "softmax, or NCE with a running constant", group="method")
    key_momentum: float | None = option(
        None, "EMA of the key encoder; by default as the data allow", group="method", aliases=("--alpha",),
        must=FRACTION,
    )  # fmt: skip
    jigsaw: bool = option(False, "match a jigsaw of each image too", group="method")
    beta: float = option(0.5, "weight of the jigsaw's loss", group="method", must=FRACTION)
    bn_splits: int | Literal["auto"] = option("auto", "chunks batch norm sees separately", group="method")
    sync_bn: bool = option(False, "batch norm over all processes", group="method")

    bank_momentum: float = option(
        0.5, "EMA of the bank's rows", group=_SINGLE, aliases=("-m", "--nce_m"), must=FRACTION
    )
    key_schedule: Literal["constant", "cosine"] = option(
        "constant", "cosine: the key encoder's EMA grows to 1", group=_SINGLE
    )
    fix_pred_lr: bool = option(False, "SimSiam: the predictor keeps the peak learning rate", group=_SINGLE)
    prototypes: int | None = option(None, "SwAV: clusters", group=_SINGLE, aliases=("--nmb_prototypes",), must=POSITIVE)
    epsilon: float = option(0.05, "SwAV: entropy of the assignments", group=_SINGLE, must=POSITIVE)
    sinkhorn_iterations: int = option(3, "SwAV: of the assignments", group=_SINGLE, must=POSITIVE)
    small_crops: int | None = option(
        None, "SwAV: small views beside the two large ones", group=_SINGLE, must=NOT_NEGATIVE
    )
    small_res: int | None = option(None, "SwAV: side of the small views", group=_SINGLE, must=POSITIVE)
    small_min: float = option(0.05, "SwAV: smallest share of the picture they cover", group=_SINGLE, must=SHARE)
    queue_epoch: int = option(
        15, "SwAV: epochs before the queue starts", group=_SINGLE, aliases=("--epoch_queue_starts",), must=NOT_NEGATIVE
    )
    freeze_prototypes: int | None = option(
        None, "SwAV: first steps in which clusters stay; one epoch by default", group=_SINGLE,
        aliases=("--freeze_prototypes_niters",), must=NOT_NEGATIVE,
    )  # fmt: skip

    ft_pos: Literal["none", "extrapolate", "interpolate"] = option("none", "transform positive pairs", group=_FT)
    ft_pos_alpha: float = option(2.0, "Beta parameter of its lambda", group=_FT, must=POSITIVE)
    ft_pos_distribution: Distribution = option("beta", "distribution of its lambda", group=_FT)
    ft_pos_granularity: Granularity = option("batch", "how many share a lambda", group=_FT)
    ft_neg: Literal["none", "interpolate", "append"] = option("none", "mix negatives; append: add them", group=_FT)
    ft_neg_alpha: float = option(1.6, "Beta parameter of its lambda", group=_FT, must=POSITIVE)
    ft_neg_distribution: Distribution = option("beta", "distribution of its lambda", group=_FT)
    ft_neg_granularity: Granularity = option("batch", "the same; sample: each negative", group=_FT)
    ft_post_norm: Literal["none", "pos", "neg", "both"] = option(
        "none", "normalise again what was transformed", group=_FT
    )
    ft_begin_epoch: int = option(0, "epochs before it starts", group=_FT, must=NOT_NEGATIVE)
    ft_jigsaw: bool = option(False, "transform the jigsaw's pairs too", group=_FT)

    epochs: int = option(200, "passes over the data", group="optimisation", must=POSITIVE)
    stop_epoch: int = option(
        0, "pause here, to be gone on from by --resume; 0: do not", group="optimisation",
        must=NOT_NEGATIVE,
    )  # fmt: skip
    accumulate: int = option(
        1, "parts of a batch that are seen in turn, to save memory", group="optimisation", must=POSITIVE
    )
    optimizer: Literal["sgd", "lars"] = option("sgd", "lars: layer-wise rates, for large batches", group="optimisation")
    learning_rate: float = option(0.03, "peak learning rate", group="optimisation", aliases=("--lr",), must=POSITIVE)
    lr_decay_epochs: tuple[int, ...] = option(
        (120, 160), "epochs after which it drops", group="optimisation", must=POSITIVE
    )
    weight_decay: float = option(1e-4, "weight decay", group="optimisation", must=NOT_NEGATIVE)
    decay_all: bool = option(True, "of biases and batch norms too", group="optimisation")
    warm: bool = option(False, "warm up; always done for a batch above 256", group="optimisation")
    warmup_epochs: int | None = option(
        None, "its length; by default 5, 10 of above 500, at most a quarter", group="optimisation", must=NOT_NEGATIVE
    )
    on_nan: Literal["stop", "skip"] = option(
        "stop", "what follows a step whose loss is not finite", group="optimisation"
    )
    schedule_per: Literal["step", "epoch"] = option("step", "how often the rate moves", group="optimisation")
    opt_level: Literal["O1", "O2"] | None = option(None, "published spelling of --amp auto", group=_PUBLISHED)

    one_pass: bool = option(True, "score a queue in one pass that keeps no scores", group="speed")

    save_score: bool = option(False, "record statistics of the scores", group="run")
    pre_scores: bool = option(True, "record the scores before FT too", group="run")
    save_every_steps: int = option(
        0, "steps between checkpoints within an epoch; 0 for none", group="run", must=NOT_NEGATIVE
    )
    knn_freq: int = option(0, "epochs between k-NN evaluations; 0 for none", group="run", must=NOT_NEGATIVE)
    grad_norms: int = option(
        0, "steps between records of each layer's gradient norm; 0 for none", group="run", must=NOT_NEGATIVE
    )
    dry_run: bool = option(False, "show what would happen, run two steps, leave nothing behind", group="run")
    exp_iter: int = option(-1, "number of this repetition, added to the name", group=_PUBLISHED)

    def validate(self, typed: Collection[str] = ()) -> None:
        """Raise ValueError, naming the flags, for values (of flags `typed` in particular) that cannot work together."""
        shared.check(self)
        shared.check_shares(self, self.accumulate)
        if self.dataset != "shapes" and self.data_folder is None:
            fetch = ", and add --download if it is not there yet" if self.dataset in shared.DOWNLOADABLE else ""
            raise ValueError(f"--dataset {self.dataset} is read from disk: say where with --data_folder{fetch}")
        self._check_method()
        if self.mem == "batch" and self.batch_size < 4 * self.accumulate:
            raise ValueError(
                f"--batch_size {self.batch_size} leaves too few negatives with --mem batch: take 4 or more, in each of "
                "the --accumulate parts"
            )
        if self.mem in REMEMBERING and self.queue_size in range(4):
            raise ValueError(f"--queue_size {self.queue_size} leaves too few negatives: take 4 or more")
        if self.mem == "moco" and "queue_size" in typed and self.queue_size < self.batch_size:
            raise ValueError(
                f"--queue_size {self.queue_size} is below --batch_size {self.batch_size}, so keys would be lost before "
                "they are ever a negative: raise the one or lower the other"
            )
        if self.bn_splits != "auto" and not 1 <= self.bn_splits <= self.batch_size:
            raise ValueError(f"--bn_splits must lie between 1 and --batch_size {self.batch_size}, not {self.bn_splits}")
        if self.sync_bn and self.bn_splits not in ("auto", 1):
            raise ValueError(f"--bn_splits {self.bn_splits} takes apart what --sync_bn joins: add --no_sync_bn")
        if self.sync_bn and self.mem == "moco":
            raise ValueError("--sync_bn lets batch norm give away what --mem moco is to learn: add --no_sync_bn")
        if self.prototypes is not None and self.prototypes < 4:
            raise ValueError(f"--prototypes {self.prototypes} leaves hardly anything to tell apart: take 4 or more")

    def _check_method(self) -> None:
        """Raise ValueError for parts that have no meaning in the method."""
        method, mem = self.method, MEMORY.get(self.method)
        if mem and self.mem != mem:
            raise ValueError(f"--method {method} is --mem {mem} by definition: leave --mem {self.mem} out")
        if self.mem == "none" and not mem:
            without = ", ".join(name for name, kind in MEMORY.items() if kind == "none")
            raise ValueError(f"--mem none is of {without}: choose one of them, or another --mem")
        if self.mem == "none" and self.ft_neg != "none":
            raise ValueError(
                f"--ft_neg {self.ft_neg} mixes negatives and --method {method} has none: leave it out (--ft_pos works)"
            )
        if self.modal == "CMC" and mem:
            raise ValueError(f"--modal CMC contrasts two halves of an image, --method {method} sees it whole: drop one")
        if self.jigsaw and self.mem not in REMEMBERING:
            raise ValueError(f"--jigsaw looks for its image in a memory and --mem {self.mem} is none: add --no_jigsaw")
        if method == "SwAV" and self.small_crops != 0 and self.small_min >= self.crop_min:
            raise ValueError(
                f"--small_min {self.small_min} is where small views begin and --crop_min {self.crop_min} where they "
                "end: lower the one or raise the other"
            )
        if self.loss == "nce" and self.mem not in REMEMBERING:
            raise ValueError(f"--loss nce needs noise from all the data and --mem {self.mem} has none: leave it out")


@dataclass(frozen=True)
class PublishedFT:
    """Feature transformation as the published command lines spell it; see `published_to_ft`."""

    mixnorm: bool = option(False, "switch FT on", group=_PUBLISHED)
    mixnorm_target: Literal["pos", "neg", "posneg"] = option("neg", "what to transform", group=_PUBLISHED)
    expolation_mask: bool = option(False, "extrapolate positives (else interpolate)", group=_PUBLISHED)
    mask_distribution: Distribution = option("beta", "distribution of lambda", group=_PUBLISHED)
    beta_alpha: float = option(2.0, "Beta parameter without --sep_alpha", group=_PUBLISHED, must=POSITIVE)
    sep_alpha: bool = option(False, "one Beta parameter each (posneg, beta)", group=_PUBLISHED)
    pos_alpha: float = option(2.0, "the positives' under --sep_alpha", group=_PUBLISHED, must=POSITIVE)
    neg_alpha: float = option(1.6, "the negatives' under --sep_alpha", group=_PUBLISHED, must=POSITIVE)
    dim_mask: Literal["pos", "neg", "both", "none"] = option(
        "none", "lambda per dimension under --sep_alpha", group=_PUBLISHED
    )
    postmix_norm: bool = option(False, "normalise transformed positives", group=_PUBLISHED)
    norm_target: Literal["pos", "neg"] | None = option(None, "without effect, as published", group=_PUBLISHED)
    mix_start_epoch: int = option(0, "epochs before FT starts", group=_PUBLISHED, must=NOT_NEGATIVE)

    @property
    def separate(self) -> bool:
        """Only here do the two parts get a Beta parameter of their own and one lambda per batch."""
        return self.sep_alpha and self.mixnorm_target == "posneg" and self.mask_distribution == "beta"


def parse(argv: list[str]) -> tuple[ContrastOptions, dict[str, str], list[str]]:
    """argv -> options, where each value came from, and lines worth printing. Exits with code 2 on a wrong argv."""
    options, sources, typed = base.parse(
        ContrastOptions, argv, layers=_layers, refused=REFUSED, shorthands=(PublishedFT,)
    )
    options = shared.placed(options)
    if options.mem in ("batch", "none") and options.method != "SwAV":
        options = dataclasses.replace(options, queue_size=0)
        sources["queue_size"] = f"implied by --mem {options.mem}"
    return options, sources, _notes(options, typed)


def published_to_ft(flags: PublishedFT) -> dict[str, object]:
    """What the published flags do, as ft_* options ("Improving Contrastive Learning by Visualizing Feature
    Transformation", ICCV 2021, behaviour of the released code).

    Unless separate, lambda is drawn per dimension from Beta(beta_alpha) and sep_alpha, pos_alpha, neg_alpha and
    dim_mask count for nothing. --expolation_mask shifts the positives' lambda only; negatives are never normalised.
    """
    if flags.expolation_mask and flags.mixnorm_target == "neg":
        raise ValueError(
            "--expolation_mask extrapolates positives and --mixnorm_target neg has none: "
            "take --mixnorm_target pos or posneg, or leave --expolation_mask out"
        )
    changes = dict(ft_pos="none", ft_neg="none", ft_post_norm="none", ft_begin_epoch=flags.mix_start_epoch)
    parts = {"pos": ("pos",), "neg": ("neg",), "posneg": ("pos", "neg")}[flags.mixnorm_target]
    for part in parts:
        per_dim = not flags.separate or flags.dim_mask in (part, "both")
        changes[f"ft_{part}"] = "extrapolate" if part == "pos" and flags.expolation_mask else "interpolate"
        changes[f"ft_{part}_alpha"] = getattr(flags, f"{part}_alpha") if flags.separate else flags.beta_alpha
        changes[f"ft_{part}_distribution"] = flags.mask_distribution
        changes[f"ft_{part}_granularity"] = "dim" if per_dim else "batch"
    if flags.postmix_norm and "pos" in parts:
        changes["ft_post_norm"] = "pos"
    return changes


def usual(options: ContrastOptions) -> ContrastOptions:
    """What the --dataset and the --method of `options` bring by themselves."""
    layers = presets(options.dataset, options.method)
    return ContrastOptions(**{name: value for _, layer in layers for name, value in layer.items()})


def _layers(typed: dict) -> list[tuple[str, dict]]:
    implied = {"dataset": shared.dataset_of(typed["data_folder"])} if "data_folder" in typed else {}
    dataset = typed.get("dataset", implied.get("dataset", ContrastOptions.dataset))
    method = typed.get("method", ContrastOptions.method)
    layers = [("implied by --data_folder", implied), *presets(dataset, method)]
    if "opt_level" in typed:
        layers.append((f"published --opt_level {typed['opt_level']}", {"amp": "auto"}))
    published = _published(typed)
    if published:
        flags = PublishedFT(**published)
        base.check_ranges(flags)
        ours = [name for name in typed if name.startswith("ft_")]
        if ours:
            raise ValueError(
                f"--{ours[0]} and --{next(iter(published))} belong to two families of flags for the same thing: use one"
            )
        if flags.mixnorm:
            layers.append((f"published {_command_line(published)}", published_to_ft(flags)))
    return layers


def _published(typed: dict) -> dict:
    return {field.name: typed[field.name] for field in dataclasses.fields(PublishedFT) if field.name in typed}


def _command_line(typed: dict) -> str:
    return " ".join(
        (f"--{name}" if value else f"--no_{name}") if isinstance(value, bool) else f"--{name} {value}"
        for name, value in typed.items()
    )


def _notes(options: ContrastOptions, typed: dict) -> list[str]:
    why = {}
    if options.warmup_epochs is not None:
        why["warm"] = f"next to --warmup_epochs {options.warmup_epochs}"
    why |= _of_other_methods(options)
    if options.ft_pos == options.ft_neg == "none":
        why["pre_scores"] = "without FT, where scores are the same before and after"
    if "amp" in typed:
        why["opt_level"] = f"next to --amp {options.amp}"
    sentences = shared.notes(options, typed) + shared.without_effect(why, typed)
    if options.opt_level and "amp" not in typed:
        sentences.append(f"--opt_level {options.opt_level} maps to --amp auto")
    if options.stop_epoch > options.epochs:
        sentences.append(f"--stop_epoch {options.stop_epoch} lies beyond --epochs {options.epochs}, where the run ends")
    if typed.get("mixnorm") and typed.get("mix_start_epoch") and not options.save_score:
        sentences.append("--mix_start_epoch counts without --save_score too, unlike in the published code")
    return sentences + _ft_notes(options, typed) + _published_notes(_published(typed))


def _of_other_methods(options: ContrastOptions) -> dict[str, str]:
    """Flags that mean nothing to the chosen method, and why."""
    method, mem, why = options.method, options.mem, {}

    def only(flags: str, meant: bool, reason: str) -> None:
        if not meant:
            why.update(dict.fromkeys(flags.split(), reason))

    swav = "prototypes epsilon sinkhorn_iterations small_crops small_res small_min queue_epoch freeze_prototypes"
    only(swav, method == "SwAV", f"with --method {method}: it is SwAV's")
    only("fix_pred_lr", method == "SimSiam", f"with --method {method}, which has no predictor of that kind")
    only("queue_size", mem in REMEMBERING or method == "SwAV", f"with --mem {mem}, which keeps no past embeddings")
    only("key_momentum key_schedule", mem == "moco" or method == "BYOL", f"with --method {method}: no key encoder")
    only("one_pass", mem == "moco" and options.loss == "ce", "where it is no queue under a softmax that is scored")
    only("bank_momentum", mem == "bank", f"with --mem {mem}")
    only("temperature", method not in ("SimSiam", "BYOL"), f"with --method {method}, which has no softmax")
    only("mean std", options.modal == "RGB", "with --modal CMC, whose colour spaces have constants of their own")
    only("view", options.modal == "CMC", f"with --modal {options.modal}")
    only("beta ft_jigsaw", options.jigsaw, "without --jigsaw")
    return why


def _ft_notes(options: ContrastOptions, typed: dict) -> list[str]:
    """ft_* flags that were typed for a part that is off."""
    why = {}
    for part in ("pos", "neg"):
        off = getattr(options, f"ft_{part}") == "none"
        if getattr(options, f"ft_{part}_distribution") == "uniform":
            why[f"ft_{part}_alpha"] = f"with --ft_{part}_distribution uniform"
        if off:
            settings = (f"ft_{part}_{setting}" for setting in ("alpha", "distribution", "granularity"))
            why |= dict.fromkeys(settings, f"while --ft_{part} is none")
        if off and options.ft_post_norm == part:
            why["ft_post_norm"] = f"while --ft_{part} is none"
    if options.ft_pos == options.ft_neg == "none":
        why |= dict.fromkeys(("ft_post_norm", "ft_begin_epoch"), "while --ft_pos and --ft_neg are none")
    return shared.without_effect(why, typed)


def _published_notes(published: dict) -> list[str]:
    flags = PublishedFT(**published)
    if not flags.mixnorm:
        others = (field.name for field in dataclasses.fields(flags))
        return shared.without_effect(dict.fromkeys(others, "without --mixnorm, as published"), published)
    why = {"norm_target": "as published: --postmix_norm is about the positives"}
    if not flags.separate:
        needs = "without --mixnorm_target posneg --mask_distribution beta --sep_alpha, as published"
        why |= dict.fromkeys(("sep_alpha", "pos_alpha", "neg_alpha", "dim_mask"), needs)
    if flags.separate:
        why["beta_alpha"] = "next to --sep_alpha"
    elif flags.mask_distribution == "uniform":
        why["beta_alpha"] = "with --mask_distribution uniform"
    if flags.mixnorm_target == "neg":
        why["postmix_norm"] = "with --mixnorm_target neg: it is about the positives, as published"
    return shared.without_effect(why, published)
