"""Write the encoder in a checkpoint, this program's or another's, as other programs read it.

examples:
  python scripts/export.py save/NAME --to torchvision                   # save/NAME/current_torchvision.pth
  python scripts/export.py save/NAME --to timm --ema -o backbone.pth    # of the momentum encoder
  python scripts/export.py save/NAME --to onnx --head                   # pictures -> embeddings
  python scripts/export.py moco_v2_200ep_pretrain.pth.tar --to detectron2
"""

import argparse
import pickle
import re
import sys
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from learning import build, checkpoint  # noqa: E402
from models.encoder import Encoder  # noqa: E402
from models.heads import UnitLength  # noqa: E402
from models.layouts import detectron2_names  # noqa: E402
from models.resnet import ARCHITECTURES  # noqa: E402
from models.trunks import split_factor  # noqa: E402

About = dict[str, Any]  # arch, width, stem, mean, std, input_res and the source file
_STEM = "net.conv1, net.maxpool = torch.nn.Conv2d(3, {}, 3, padding=1, bias=False), torch.nn.Identity()"


# Each gives what fills the file, and the lines of Python that use it at `path`. Without --head there are no heads.
Written = tuple[Callable[[BinaryIO], Any], str]


def to_torchvision(encoder: Encoder, about: About, path: Path) -> Written:
    import torchvision

    alike = about["arch"] in ARCHITECTURES and hasattr(torchvision.models, about["arch"])  # its AlexNet is another one
    _check("torchvision", about, alike and about["width"] == 1)
    layers = [f"torch.nn.{layer}" for head in encoder.heads for layer in head if not isinstance(layer, UnitLength)]
    make = [f"import torch, torchvision\nnet = torchvision.models.{about['arch']}()"]
    make += [*_stem(encoder, about), f"net.fc = torch.nn.Sequential({', '.join(layers)})", _load(path)]
    return partial(torch.save, _weights(encoder)), "\n".join(make)


def to_timm(encoder: Encoder, about: About, path: Path) -> Written:
    import timm

    _check("timm", about, about["width"] <= 1 and timm.is_model(about["arch"]))
    _check_headless("timm", encoder)
    channels = tuple(int(64 * about["width"]) * 2**stage for stage in range(4))
    narrow = f", channels={channels}" if about["width"] < 1 else ""
    make = [f'import timm, torch\nnet = timm.create_model("{about["arch"]}", num_classes=0{narrow})']
    return partial(torch.save, _weights(encoder)), "\n".join([*make, *_stem(encoder, about), _load(path)])


def to_safetensors(encoder: Encoder, about: About, path: Path) -> Written:
    import safetensors.torch

    text = {name: ",".join(map(str, x)) if isinstance(x, tuple) else str(x) for name, x in about.items()}
    content = safetensors.torch.save(_weights(encoder), {"format": "pt", **text})
    return methodcaller("write", content), f'import safetensors.torch\nweights = safetensors.torch.load_file("{path}")'


def to_detectron2(encoder: Encoder, about: About, path: Path) -> Written:
    _check("detectron2", about, about["arch"] in ARCHITECTURES and about["stem"] == "imagenet")
    _check_headless("detectron2", encoder)
    arrays = {name: x.numpy() for name, x in detectron2_names(_weights(encoder)).items()}
    content = {"model": arrays, "__author__": "contrast-ft", "matching_heuristics": True}
    _, _, groups, group_width = ARCHITECTURES[about["arch"]]
    trunk = encoder.backbones[0]
    settings = {
        "MODEL.WEIGHTS": str(path),
        "MODEL.RESNETS.DEPTH": int("".join(filter(str.isdigit, about["arch"].split("_")[0]))),
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": int(int(64 * about["width"]) * group_width / 64),
        "MODEL.RESNETS.STEM_OUT_CHANNELS": trunk.conv1.out_channels,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": trunk.feature_dim // 8,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.PIXEL_MEAN": [round(255 * x, 3) for x in about["mean"]],
        "MODEL.PIXEL_STD": [round(255 * x, 3) for x in about["std"]],
        "INPUT.FORMAT": "RGB",
    }
    return partial(pickle.dump, content), "\n".join(f"cfg.{name} = {value!r}" for name, value in settings.items())


def to_onnx(encoder: Encoder, about: About, path: Path) -> Written:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (what torch.onnx writes with)
    except ImportError as error:
        raise ValueError(f"--to onnx needs {error.name}: pip install onnx onnxscript onnxruntime.") from error
    _check("onnx", about, about["arch"] in ARCHITECTURES)  # it has no adaptive max-pooling
    net = nn.Sequential(*encoder.backbones, *encoder.heads).eval()
    images = torch.randn(3, 3, about["input_res"], about["input_res"])
    names = {"input_names": ["images"], "output_names": ["features"], "dynamic_shapes": ({0: "batch"},)}
    content = torch.onnx.export(net, (images[:2],), **names, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content)
    wanted, found = net(images).detach(), torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if (found - wanted).abs().max() > 1e-4 * wanted.abs().max():
        raise ValueError(f"onnxruntime disagrees with PyTorch about {path}; update onnx, onnxscript and onnxruntime.")
    code = f'import onnxruntime\nnet = onnxruntime.InferenceSession("{path}")\nnet.run(None, {{"images": images}})[0]'
    return methodcaller("write", content), code


def _weights(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Under torchvision's names; the head is the classifier, as in MoCo's files."""
    heads = {f"fc.{name}": x for head in encoder.heads for name, x in head.state_dict().items()}
    return {name: x.contiguous() for name, x in encoder.backbones[0].state_dict().items()} | heads


def _stem(encoder: Encoder, about: About) -> list[str]:
    return [_STEM.format(encoder.backbones[0].conv1.out_channels)] if about["stem"] == "small" else []


def _load(path: Path) -> str:
    return f'net.load_state_dict(torch.load("{path}"))'


def _check(library: str, about: About, can_build: bool) -> None:
    if not can_build:
        kind = f"{about['arch']} of width {about['width']:g} with {about['stem']} stem"
        raise ValueError(f"{library} builds no {kind}; export --to safetensors or, of a ResNet, onnx instead.")


def _check_headless(library: str, encoder: Encoder) -> None:
    if encoder.heads:
        raise ValueError(f"{library} has no place for a projection head; leave --head out.")


FORMATS = {"torchvision": (to_torchvision, ".pth"), "timm": (to_timm, ".pth"), "onnx": (to_onnx, ".onnx")}
FORMATS |= {"safetensors": (to_safetensors, ".safetensors"), "detectron2": (to_detectron2, ".pkl")}
_ENDING = r"\.(pth\.tar|pth|pt|ckpt|safetensors|bin|torch)$"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT", help="run folder or file; see docs/weights.md")
    add("--to", required=True, choices=FORMATS, help="who is to read it")
    add("-o", "--output", type=Path, metavar="FILE", help="by default beside the checkpoint, named after it")
    add("--ema", action="store_true", help="the momentum encoder")
    add("--head", action="store_true", help="with the projection head")
    return parser.parse_args(argv)


def load(file: Path, *, ema: bool, head: bool) -> tuple[Encoder, About, list[str]]:
    """The encoder, without heads unless asked for; what a user of it must know; what was recognised in the file."""
    encoder, values, remarks = build.load_encoder(str(file), ema)
    if len(encoder.channels) > 1:
        raise ValueError(f"{file} holds an encoder of two modalities, which no other library builds; use it here.")
    if head and not encoder.heads:
        raise ValueError(f"{file} holds no projection head that can be read; leave --head out.")
    if not head:
        encoder.heads = nn.ModuleList()
    arch, factor = split_factor(values["arch"])
    about = {
        "arch": arch,
        "width": values["width"] * factor,
        "input_res": 224,
        "source": f"{file.parent.name}/{file.name}",
    }
    known = {name: values[name] for name in ("stem", "input_res") if name in values}
    return encoder, about | known | {name: tuple(values[name]) for name in ("mean", "std")}, remarks


def check_output(path: Path, file: Path) -> None:
    """ValueError where writing to `path` cannot work or would destroy the checkpoint."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"-o {path} is not the name of a file in a folder that exists; make the folder or change it.")
    if path.exists() and path.samefile(file):
        raise ValueError(f"-o {path} is the checkpoint itself, which stays as it is; give another name.")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    write, ending = FORMATS[options.to]
    try:
        file, damaged = checkpoint.locate(options.checkpoint)
        parts = [re.sub(_ENDING, "", file.name), options.to, *["ema"] * options.ema, *["head"] * options.head]
        path = options.output or file.with_name("_".join(parts) + ending)
        encoder, about, remarks = load(file, ema=options.ema, head=options.head)
        check_output(path, file)
        fill, code = write(encoder, about, path)
        checkpoint.write(path, fill)
    except (ValueError, OSError) as error:
        sys.exit(f"export.py: {error}")
    mean, std = (", ".join(f"{x:g}" for x in about[name]) for name in ("mean", "std"))
    what = "embedding" if options.head else f"{encoder.feature_dim} features"
    print(
        *damaged,
        *remarks,
        f"Wrote {path}: {about['arch']} of width {about['width']:g}, {what}. Read it with:",
        code,
        sep="\n",
    )
    print(f"It expects RGB pictures between 0 and 1, minus mean {mean}, divided by std {std}.")


if __name__ == "__main__":
    main()
