"""How other libraries name the weights of a ResNet, and how to get from their names to ours and back.

Ours are torchvision's. A file is recognised by the names and shapes of its tensors alone; see docs/weights.md.
"""

import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.resnet import ARCHITECTURES, resnet, split_factor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """`trunk` and `ema`: what stands before conv1.weight in the encoder and in its moving average.

    `beside` stands before tensors which such files hold too; it tells layouts with the same `trunk` apart. Wrappers
    (`module.`, `state_dict.`, ...) are left out of all of them.
    """

    name: str
    trunk: str
    ema: str | None = None
    beside: tuple[str, ...] = ()


LAYOUTS = (
    Layout("contrast-ft", "method.encoder.backbones.0.", "method.momentum_encoder.encoder.backbones.0."),
    Layout("MoCo", "encoder_q.", "encoder_k."),
    Layout("MoCo v3", "base_encoder.", "momentum_encoder."),
    Layout("PyContrast, FT, CMC or SupCon", "encoder.", "model_ema.encoder.", ("head.", "contrast.")),
    Layout("SimSiam", "encoder.", None, ("predictor.", "encoder.fc.")),
    Layout("solo-learn", "backbone.", "momentum_backbone.", ("projector.", "classifier.")),
    Layout("solo-learn (older)", "encoder.", "momentum_encoder.", ("projector.", "classifier.")),
    Layout("lightly", "backbone.", "backbone_momentum.", ("backbone.1.", "projection_head.")),
    Layout("mmselfsup", "backbone.", None, ("neck.",)),
    Layout("OpenSelfSup", "encoder_q.0.", "encoder_k.0.", ("encoder_q.1.",)),
    Layout("DINO", "student.backbone.", "teacher.backbone."),
    Layout("VISSL", "_feature_blocks."),
    Layout("torchvision or timm", "", "model_ema.", ("fc.",)),
    Layout("timm", "", "state_dict_ema."),
    Layout("SwAV or DeepCluster", "", None, ("projection_head.", "prototypes.")),
)

# Parts of a tensor's name that only say how it was wrapped or stored.
_WRAPPERS = {
    # fmt: off
    "module",
    "_orig_mod",
    "_forward_module",
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "base_model",
    "trunk",
    "classy_state_dict",
    # fmt: on
}
_NOT_WEIGHTS = ("optimizer", "lr_scheduler", "scaler", "callbacks", "loops", "amp")
_TRUNK = re.compile(r"(conv1|bn1|layer\d+)\.")
_FIRST_BLOCK, _COUNTER = "layer1.0.conv1.weight", "num_batches_tracked"
_CHANNELS = {"basic": 64, "bottleneck": 256}  # that leave a block of the first stage at width 1


@dataclass(frozen=True)
class Trunk:
    """A trunk found in a file: what to build (`models.resnet.resnet`) and the weights to put in.

    `where`: what stands before its names in the file. `unused`: names of the file's other tensors.
    """

    layout: str
    where: str
    arch: str
    width: float
    stem: str
    weights: Weights
    unused: tuple[str, ...]

    @property
    def options(self) -> str:
        """The same as flags."""
        return f"--arch {self.arch} --width {self.width:g} --stem {self.stem}"

    def __str__(self) -> str:
        rest = f"; not used: {summary(self.unused)}" if self.unused else ""
        kind = f"{self.arch} of width {self.width:g}, {self.stem} stem"
        return f"{self.layout} layout ({self.where or 'no prefix'}): {kind}, {len(self.weights)} tensors used{rest}"


def find_trunk(state: Any, *, ema: bool = False) -> Trunk:
    """The (moving average of the) trunk in what a checkpoint file holds.

    ValueError, to be read after the file's name, when there is none, when its names are unknown or ambiguous, and when
    it is not a ResNet that `models.resnet` builds.
    """
    original = _flat(state) if isinstance(state, Mapping) else {}
    if not original:
        raise ValueError("holds no weights of a network; give the file that holds the model, not the optimizer.")
    named = _torchvision_names({_unwrapped(name): name for name in original})
    _refuse_other_networks(named)
    roots = {name.removesuffix(_FIRST_BLOCK) for name in named if name.endswith(_FIRST_BLOCK)}
    layout = _layout({_unwrapped(name) for name in original}, roots)
    root = layout.ema if ema else layout.trunk
    if root not in roots:
        raise ValueError(f"has the {layout.name} layout without a momentum encoder; leave --use_ema out.")
    parts = {name.removeprefix(root): old for name, old in named.items() if name.startswith(root)}
    used = {name: old for name, old in parts.items() if _TRUNK.match(name)}
    weights = {name: original[old] for name, old in used.items()}
    counters = {name.replace("running_mean", _COUNTER) for name in weights if name.endswith("running_mean")}
    weights |= {name: torch.tensor(0) for name in counters - weights.keys()}  # old files have none
    kind = _architecture(weights)
    where = used["conv1.weight"].removesuffix("conv1.weight").removesuffix("0.weight")
    unused = tuple(sorted(original.keys() - set(used.values())))
    return Trunk(layout.name, where, *kind, weights, unused)


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


def _torchvision_names(named: dict[str, str]) -> dict[str, str]:
    """A trunk written as nn.Sequential counts its modules: 0 and 1 are the stem, those made of blocks the stages."""
    numbers: dict[str, list[int]] = {}
    for name in named:
        stage = re.fullmatch(r"(|.*\.)(\d+)\.0\.conv1\.weight", name)
        if stage:
            numbers.setdefault(stage[1], []).append(int(stage[2]))
    new = {}
    for root, stages in numbers.items():
        if min(stages) == 2:  # lightly's own ResNet keeps the ReLU in its forward method, and a Sequential loses it
            raise ValueError("holds a ResNet without the ReLU after its first batch norm, which cannot be built here.")
        new |= {f"{root}0.": f"{root}conv1.", f"{root}1.": f"{root}bn1."}
        new |= {f"{root}{number}.": f"{root}layer{rank}." for rank, number in enumerate(sorted(stages), 1)}

    def rename(name: str) -> str:
        head = re.match(r"(|.*?\.)\d+\.", name)
        name = name.replace(head[0], new.get(head[0], head[0]), 1) if head else name
        return name.replace(".shortcut.", ".downsample.")

    return {rename(name): old for name, old in named.items()}


def _refuse_other_networks(named: Iterable[str]) -> None:
    parts = {part for name in named for part in name.split(".")}
    if parts >= {"l_to_ab", "ab_to_l"} or parts >= {"encoder1", "encoder2"}:
        raise ValueError("holds a pair of encoders, one per modality; this version evaluates encoders of RGB pictures.")
    if parts & {"patch_embed", "cls_token", "class_token", "pos_embed"}:
        raise ValueError("holds a vision transformer; this version builds ResNets and ResNeXts only.")


def _layout(names: set[str], roots: set[str]) -> Layout:
    def companions(layout: Layout) -> int:
        prefixes = (*layout.beside, *([layout.ema] if layout.ema else []))
        return sum(any(name.startswith(prefix) for name in names) for prefix in prefixes)

    fitting = [layout for layout in LAYOUTS if layout.trunk in roots]
    if fitting:
        return max(fitting, key=companions)
    prefixes = roots or {prefix for prefix, _ in _groups(names)}
    pairs = ((prefix, layout) for prefix in sorted(prefixes) for layout in LAYOUTS if layout.trunk)
    near = max(pairs, key=lambda pair: difflib.SequenceMatcher(None, pair[0], pair[1].trunk).ratio())[1]
    raise ValueError(
        f"has no layout this version knows: it holds {summary(names)}; the nearest known one is that of "
        f"{near.name}, with names such as {near.trunk}{_FIRST_BLOCK}, so save it again with tensors renamed to those."
    )


def _architecture(weights: Weights) -> tuple[str, float, str]:
    """Name, width and stem. ValueError unless an architecture of `models.resnet` has just these names and shapes."""
    if "conv1.weight" not in weights:
        raise ValueError("holds a ResNet with another stem (several convolutions); only a single one can be read.")
    block = "bottleneck" if "layer1.0.conv3.weight" in weights else "basic"
    last = f"layer1.0.{'conv3' if block == 'bottleneck' else 'conv2'}.weight"
    width = len(weights.get(last, weights[_FIRST_BLOCK])) / _CHANNELS[block]
    small = weights["conv1.weight"].shape[-1] == 3
    have = {(name, tuple(x.shape)) for name, x in weights.items() if not name.endswith(_COUNTER)}
    wanted = {arch: _shapes(arch, width, small) for arch, (kind, *_) in ARCHITECTURES.items() if kind == block}
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
def _shapes(arch: str, width: float, small: bool) -> frozenset[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        names = resnet(arch, width=width, small_stem=small).state_dict()
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
    renamed = {}
    for name, x in weights.items():
        for pattern, new in _DETECTRON2:
            name = re.sub(pattern, new, name)
        renamed[name] = x
    return {name: x for name, x in renamed.items() if not name.endswith("num_batches_tracked")}
