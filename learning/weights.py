"""Trunks out of checkpoint files, whoever wrote them."""

from pathlib import Path
from typing import Any

from datasets.sources import IMAGENET
from learning import checkpoint
from models.encoder import Encoder
from models.layouts import Trunk, find_trunk


def read(path: str | Path) -> Any:
    """What the file holds; see `checkpoint.read`. ValueError for the checkpoint of a linear probe, too."""
    state = checkpoint.read(path)
    if is_ours(state) and "eval" in state["options"]:
        raise ValueError(f"{path} is a checkpoint of main_linear.py and holds no encoder; give that of the encoder.")
    return state


def is_ours(state: Any) -> bool:
    return isinstance(state, dict) and state.keys() >= set(checkpoint.KEYS)


def trunk(path: str | Path, state: Any, *, use_ema: bool = False) -> Trunk:
    """The backbone in the `state` that a file holds. ValueError, naming the file, when there is none we can build."""
    try:
        found = find_trunk(state, ema=use_ema)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    wrong = [name for name, x in found.weights.items() if not x.isfinite().all()]
    if wrong:
        raise ValueError(f"{path} holds nan or inf in {wrong[0]}: its training diverged; take an earlier checkpoint.")
    return found


def foreign_encoder(found: Trunk, state: Any) -> tuple[Encoder, dict[str, Any]]:
    """An encoder without a head around `found`, and what is known of its training: how images were normalised.

    That is by ImageNet's statistics, as everywhere, unless the file's metadata say otherwise.
    """
    values = {"arch": found.arch, "width": found.width, "stem": found.stem, "head": "none", "feat_dim": 0}
    network = Encoder(**values)
    network.backbones[0].load_state_dict(found.weights)
    about = state.get(checkpoint.METADATA, {})
    known = {name: tuple(map(float, about[name].split(","))) for name in ("mean", "std") if name in about}
    return network.eval(), values | dict(zip(("mean", "std"), IMAGENET)) | known
