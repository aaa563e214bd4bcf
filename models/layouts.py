"""How other libraries name the weights of a ResNet, and how to get from their names to ours and back.

Ours are torchvision's. A file is recognised by the names and shapes of its tensors alone; see docs/weights.md.
"""

import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from models.encoder import CHANNELS
from models.resnet import ARCHITECTURES, resnet
from models.trunks import split_factor

Weights = dict[str, Tensor]


# What stands before conv1.weight in the encoder -> who writes that, and what stands there in its moving average.
# Wrappers (`module.`, `state_dict.`, ...) are left out of all of them.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "encoder_q.": ("MoCo", "encoder_k."),
    "encoder_q.0.": ("OpenSelfSup", "encoder_k.0."),
    "base_encoder.": ("MoCo v3", "momentum_encoder."),
    "encoder.": ("PyContrast, CMC, SupCon, SimSiam or solo-learn", "model_ema.encoder.", "momentum_encoder."),
    "encoder.l_to_ab.": ("CMC",),
    "encoder.ab_to_l.": ("CMC",),
    "encoder1.": ("PyContrast", "model_ema.encoder1."),
    "encoder2.": ("PyContrast", "model_ema.encoder2."),
    "backbone.": ("solo-learn, lightly or mmselfsup", "momentum_backbone.", "backbone_momentum."),
    "student.backbone.": ("DINO", "teacher.backbone."),
    "_feature_blocks.": ("VISSL",),
    "": ("torchvision, timm, SwAV or DeepCluster", "model_ema.", "state_dict_ema."),
}

# What tells the trunks of a file with one for each modality apart -> the colour space its authors published.
_PAIRS = {("l_to_ab", "ab_to_l"): "Lab", ("encoder1", "encoder2"): "YDbDr"}

# Parts of a tensor's name that only say how it was wrapped or stored.
_WRAPPERS = {
    "module", "_orig_mod", "_forward_module", "state_dict", "model", "model_state_dict", "net", "base_model", "trunk",
    "classy_state_dict",
}  # fmt: skip
_NOT_WEIGHTS = ("optimizer", "lr_scheduler", "scaler", "callbacks", "loops", "amp")
_TRUNK = re.compile(r"(conv1|bn1|layer\d+)\.")
_FIRST_BLOCK, _COUNTER = "layer1.0.conv1.weight", "num_batches_tracked"
_CHANNELS = {"basic": 64, "bottleneck": 256}  # that leave a block of the first stage at width 1


@dataclass(frozen=True)
class Trunk:
    """What an encoder is without its heads: what to build and the weights to put into its `backbones`.

    `where`: what stands before the names in the file. `view`: None, or of two modalities the usual colour space.
    `unused`: names of the file's other tensors.
    """

    layout: str
    where: str
    arch: str
    width: float
    stem: str
    view: str | None
    weights: Weights
    unused: tuple[str, ...]

    @property
    def modal(self) -> str:
        return "CMC" if self.view else "RGB"

    @property
    def options(self) -> str:
        """The same as flags."""
        return f"--arch {self.arch} --width {self.width:g} --stem {self.stem} --modal {self.modal}"

    def __str__(self) -> str:
        rest = f"; not used: {summary(self.unused)}" if self.unused else ""
        kind = f"{self.arch} of width {self.width:g}, {self.stem} stem{', two modalities' * bool(self.view)}"
        return f"{self.layout} layout ({self.where or 'no prefix'}): {kind}, {len(self.weights)} tensors used{rest}"


def find_trunk(state: Any, *, ema: bool = False) -> Trunk:
    """The (moving average of the) trunk, or trunks, one for each modality, in what another library's file holds.

    ValueError, to be read after the file's name, when there is none, when its names are unknown or ambiguous, and when
    it is not a ResNet that `models.resnet` builds.
    """
    original = _flat(state) if isinstance(state, Mapping) else {}
    if not original:
        raise ValueError("holds no weights of a network; give the file that holds the model, not the optimizer.")
    view, parts = _modalities(original)
    found = [_one_trunk(part, c, ema) for part, c in zip(parts, CHANNELS["CMC" if view else "RGB"])]
    return replace(
        found[0],
        where=" and ".join(trunk.where for trunk in found),
        width=sum(trunk.width for trunk in found),
        view=view,
        weights={f"{i}.{name}": x for i, trunk in enumerate(found) for name, x in trunk.weights.items()},
        unused=tuple(sorted({name for trunk in found for name in trunk.unused})),
    )


def _modalities(original: Weights) -> tuple[str | None, list[Weights]]:
    """The colour space of a file with a trunk for each modality, and what it holds but for the other one's."""
    parts = {name: name.split(".") for name in original}
    for pair, view in _PAIRS.items():
        if set(pair) <= set(chain(*parts.values())):
            return view, [{n: x for n, x in original.items() if other not in parts[n]} for other in reversed(pair)]
    return None, [original]


def _one_trunk(original: Weights, channels: int, ema: bool) -> Trunk:
    """That of a modality which has so many `channels`."""
    named = _torchvision_names(original)
    _refuse_other_networks(named.values())
    layout, roots = _layout(named, ema)
    used = _under(roots, named)
    _refuse_several(original, used)
    weights = {name: original[olds[0]] for name, olds in used.items()}
    counters = {name.replace("running_mean", _COUNTER) for name in weights if name.endswith("running_mean")}
    weights |= {name: torch.tensor(0) for name in counters - weights.keys()}  # old files have none
    kind = _architecture(weights, channels)
    unused = tuple(original.keys() - set(chain(*used.values())))
    return Trunk(layout, _beginning(used["conv1.weight"][0], "conv1.weight"), *kind, None, weights, unused)


def same_trunk(arch: str, width: float, found: str, found_width: float) -> bool:
    """Whether `models.resnet.resnet` builds the network `found` from what a user calls it."""
    name, factor = split_factor(arch)
    return (name, int(64 * width * factor)) == (found, int(64 * found_width))


def _flat(state: Mapping) -> Weights:
    """{"a": {"b": tensor}} -> {"a.b": tensor}; whatever is not a weight is left out."""
    found: Weights = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            found[str(key)] = value
        elif isinstance(value, Mapping) and not str(key).startswith(_NOT_WEIGHTS):
            found |= {f"{key}.{name}": x for name, x in _flat(value).items()}
    return found


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _torchvision_names(names: Iterable[str]) -> dict[str, str]:
    """The file's names -> torchvision's, unwrapped.

    A trunk written as nn.Sequential counts its modules: 0 and 1 are the stem, those made of blocks the stages.
    """
    named = {name: _unwrapped(name) for name in names}
    numbers: dict[str, set[int]] = {}
    for name in named.values():
        stage = re.fullmatch(r"(|.*\.)(\d+)\.0\.conv1\.weight", name)
        if stage:
            numbers.setdefault(stage[1], set()).add(int(stage[2]))
    new = {}
    for root, stages in numbers.items():
        if min(stages) == 2:  # lightly's own ResNet keeps the ReLU in its forward method, and a Sequential loses it
            raise ValueError("holds a ResNet without the ReLU after its first batch norm, which cannot be built here.")
        new |= {f"{root}0.": f"{root}conv1.", f"{root}1.": f"{root}bn1."}
        new |= {f"{root}{number}.": f"{root}layer{rank}." for rank, number in enumerate(sorted(stages), 1)}

    def rename(name: str) -> str:
        name = re.sub(r"^(|.*?\.)\d+\.", lambda head: new.get(head[0], head[0]), name)
        return name.replace(".shortcut.", ".downsample.")

    return {old: rename(name) for old, name in named.items()}


def _refuse_other_networks(named: Iterable[str]) -> None:
    parts = {part for name in named for part in name.split(".")}
    if "conv_block_1" in parts:
        raise ValueError("holds the AlexNet of CMC; of other libraries this version reads ResNets and ResNeXts only.")
    if parts & {"patch_embed", "cls_token", "class_token", "pos_embed"}:
        raise ValueError("holds a vision transformer; this version builds ResNets and ResNeXts only.")


def _layout(named: dict[str, str], ema: bool) -> tuple[str, list[str]]:
    """Who wrote the file, and what stands before the names of its trunk: several things where it has several names."""
    roots = {name.removesuffix(_FIRST_BLOCK) for name in named.values() if name.endswith(_FIRST_BLOCK)}
    known = [trunk for trunk in LAYOUTS if trunk in roots]
    if not known:
        raise ValueError(_unknown(named, roots))
    layout = LAYOUTS[known[0]][0]
    averages = [root for trunk in known for root in LAYOUTS[trunk][1:] if root in roots]
    if ema and not averages:
        raise ValueError(f"has the layout of {layout} without a momentum encoder; leave --use_ema or --ema out.")
    return layout, averages if ema else known


def _unknown(names: Iterable[str], roots: set[str]) -> str:
    prefixes = roots or {prefix for prefix, _ in _groups(names)}
    pairs = ((prefix, trunk) for prefix in sorted(prefixes) for trunk in LAYOUTS if trunk)
    _, near = max(pairs, key=lambda pair: difflib.SequenceMatcher(None, *pair).ratio())
    return (
        f"has no layout this version knows: it holds {summary(names)}; the nearest known one is that of "
        f"{LAYOUTS[near][0]}, with names such as {near}{_FIRST_BLOCK}, so save it again with tensors renamed to those."
    )


def _under(roots: list[str], named: dict[str, str]) -> dict[str, list[str]]:
    """torchvision's names in a trunk -> all of the file's that mean it."""
    found: dict[str, list[str]] = {}
    for (old, name), root in product(named.items(), roots):
        if name.startswith(root) and _TRUNK.match(name, len(root)):
            found.setdefault(name.removeprefix(root), []).append(old)
    return found


def _refuse_several(original: Weights, used: dict[str, list[str]]) -> None:
    """One trunk may be stored under two names (OpenSelfSup's `backbone.` is its `encoder_q.0.`), but not two."""
    for name, (first, *others) in used.items():
        for other in others:
            if not torch.equal(original[first], original[other]):
                places = " and ".join(_beginning(old, name) or "no prefix" for old in (first, other))
                raise ValueError(f"holds several networks, under {places}; save the one you want alone.")


def _beginning(old: str, name: str) -> str:
    """What stands before `name`, which the file may spell otherwise, in the file's name `old`."""
    return "".join(f"{part}." for part in old.split(".")[: -len(name.split("."))])


def _architecture(weights: Weights, channels: int) -> tuple[str, float, str]:
    """Name, width and stem. ValueError unless an architecture of `models.resnet` has just these names and shapes."""
    if "conv1.weight" not in weights:
        raise ValueError("holds a ResNet with another stem (several convolutions); only a single one can be read.")
    found = weights["conv1.weight"].shape[1]
    if found != channels:
        raise ValueError(f"expects {found} input channels, not {channels}; only RGB and CMC's two halves are known.")
    block = "bottleneck" if "layer1.0.conv3.weight" in weights else "basic"
    last = f"layer1.0.{'conv3' if block == 'bottleneck' else 'conv2'}.weight"
    width = len(weights.get(last, weights[_FIRST_BLOCK])) / _CHANNELS[block]
    small = weights["conv1.weight"].shape[-1] == 3
    have = {(name, tuple(x.shape)) for name, x in weights.items() if not name.endswith(_COUNTER)}
    alike = [arch for arch, (kind, *_) in ARCHITECTURES.items() if kind == block]
    wanted = {arch: _shapes(arch, width, small, channels) for arch in alike}
    arch = min(wanted, key=lambda arch: len(wanted[arch] ^ have))
    lacking, beyond = sorted(wanted[arch] - have), sorted(have - wanted[arch])
    if lacking or beyond:
        both = {f"lacks {len(lacking)} of its tensors": lacking, f"has {len(beyond)} others": beyond}
        says = (f"{what} ({', '.join(f'{n} {s}' for n, s in some[:2])})" for what, some in both.items() if some)
        raise ValueError(
            f"is nearest to a {arch} of width {width:g}, but {' and '.join(says)}; this version builds only "
            f"{', '.join(ARCHITECTURES)}."
        )
    return arch, width, "small" if small else "imagenet"


@functools.cache
def _shapes(arch: str, width: float, small: bool, channels: int) -> frozenset[tuple[str, tuple[int, ...]]]:
    try:
        with torch.device("meta"):
            names = resnet(arch, width=width, in_channels=channels, small_stem=small).state_dict()
    except ValueError:  # too narrow for its groups
        names = {}
    return frozenset((name, tuple(x.shape)) for name, x in names.items() if not name.endswith(_COUNTER))


def summary(names: Iterable[str]) -> str:
    """Names by what they begin with: "foo.bar. (312 tensors), queue"."""
    groups = _groups(names)
    shown = [f"{prefix} ({count} tensors)" if count > 1 else prefix for prefix, count in groups[:4]]
    return ", ".join(shown + (["..."] if len(groups) > 4 else []))


def _groups(names: Iterable[str]) -> list[tuple[str, int]]:
    """(common beginning, count) of the names alike up to the first part that tells any apart, most frequent first."""
    split = [name.split(".") for name in names]
    depth = len(os.path.commonprefix(split)) + 1
    groups: dict[tuple, list] = {}
    for parts in split:
        groups.setdefault(tuple(parts[:depth]), []).append(parts)
    found = [(".".join(os.path.commonprefix(alike)) + "." * (len(alike) > 1), len(alike)) for alike in groups.values()]
    return sorted(found, key=lambda group: -group[1])


_DETECTRON2 = (
    (r"^(?=conv1|bn1)", "stem."),
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)


def detectron2_names(weights: Weights) -> Weights:
    """A trunk under the names of detectron2's ResNet, which counts no steps."""
    names = {name: functools.reduce(lambda new, rule: re.sub(*rule, new), _DETECTRON2, name) for name in weights}
    return {names[name]: x for name, x in weights.items() if not name.endswith(_COUNTER)}
