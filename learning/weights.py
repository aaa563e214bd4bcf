"""Trunks out of checkpoint files, whoever wrote them."""

from pathlib import Path
from typing import Any

from datasets.sources import IMAGENET
from learning import checkpoint
from models.encoder import CHANNELS, Encoder
from models.layouts import Trunk, find_trunk
from models.trunks import split_factor


def read(path: str | Path) -> Any:
    """What the file holds; see `checkpoint.read`. ValueError for the checkpoint of a linear probe, too."""
    state = checkpoint.read(path)
    if checkpoint.is_ours(state) and "eval" in state["options"]:
        raise ValueError(f"{path} is a checkpoint of main_linear.py and holds no encoder; give that of the encoder.")
    return state


def trunk(path: str | Path, state: Any, *, use_ema: bool = False) -> Trunk:
    """The backbone in the `state` that a file holds; of another library's on demand its moving average.

    ValueError, naming the file, when there is none we can build.
    """
    try:
        found = _our_trunk(state) if checkpoint.is_ours(state) else find_trunk(state, ema=use_ema)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    wrong = [name for name, x in found.weights.items() if not x.isfinite().all()]
    if wrong:
        name = wrong[0].split(".", 1)[1]  # without the number of the modality
        raise ValueError(f"{path} holds nan or inf in {name}: its training diverged; take an earlier checkpoint.")
    return found


def _our_trunk(state: dict[str, Any]) -> Trunk:
    """Nothing to be found out: a checkpoint of this program tells what its tensors are."""
    options, where = state["options"], "encoder.backbones."
    used = {name: x for name, x in state["method"].items() if name.startswith(where)}
    arch, factor = split_factor(options["arch"])
    return Trunk(
        layout="contrast-ft",
        where=f"method.{where}",
        arch=arch,
        width=options["width"] * factor,
        stem=options["stem"],
        view=options["view"] if options["modal"] == "CMC" else None,
        weights={name.removeprefix(where): x for name, x in used.items()},
        unused=tuple(f"method.{name}" for name in sorted(state["method"].keys() - used.keys())),
    )


def foreign_encoder(found: Trunk, state: Any) -> tuple[Encoder, dict[str, Any]]:
    """An encoder without a head around `found`, and what is known of its training: how images were normalised.

    That is by ImageNet's statistics, as everywhere, unless the file's metadata say otherwise.
    """
    values = {"arch": found.arch, "width": found.width, "stem": found.stem, "head": "none", "feat_dim": 0}
    network = Encoder(**values, channels=CHANNELS[found.modal])
    network.backbones.load_state_dict(found.weights)
    about = state.get(checkpoint.METADATA, {})
    known = {name: tuple(map(float, about[name].split(","))) for name in ("mean", "std") if name in about}
    colours = {"modal": found.modal, "view": found.view}
    return network.eval(), values | colours | dict(zip(("mean", "std"), IMAGENET)) | known
