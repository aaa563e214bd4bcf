"""Trunk and head per modality. One embedding per modality comes out, so plain RGB is the same loop of length one."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.heads import head as build_head
from models.layered import Layered
from models.trunks import layers
from models.trunks import trunk as build_trunk

CHANNELS = {"RGB": (3,), "CMC": (1, 2)}  # --modal: how the input's channels are shared out among the modalities


class Encoder(nn.Module):
    """One trunk and head for each modality, which `channels` says the input's channels of.

    `width` is that of the whole: each of M trunks has a width of `width` / M, as the published halves of CMC. With
    `head` none there are trunks only, and no embeddings come out.
    """

    def __init__(
        self, *, arch: str, width: float, stem: str, head: str, feat_dim: int, channels: tuple[int, ...] = (3,)
    ):
        super().__init__()
        self.channels = channels
        each = {"width": width / len(channels), "small_stem": stem == "small"}
        self.backbones = nn.ModuleList(build_trunk(arch, in_channels=c, **each) for c in channels)
        headed = () if head == "none" else self.backbones
        self.heads = nn.ModuleList(build_head(head, b.feature_dim, feat_dim) for b in headed)
        self.feature_dim = sum(b.feature_dim for b in self.backbones)
        self.embedding_dim = feat_dim * len(self.heads)
        self.layers = layers(arch)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, sum(channels), H, W) -> one (N, feat_dim) float32 embedding per modality.

        Embeddings have unit length, except those of the heads `linear_wo_norm`, `simsiam` and `byol`.
        """
        return self.embed(self.trunks(images))

    def features(self, images: Tensor, layer: str | None = None) -> Tensor:
        """Features of all modalities side by side, not normalised: (N, feature_dim) float32.

        `layer`, one of `layers`, gives the output of another layer than the last, pooled as for CMC's linear probe:
        (N, d), where d depends on the size of the images.
        """
        return torch.cat([trunk.features(part, layer) for trunk, part in self._shared_out(images)], dim=1)

    def trunks(self, images: Tensor) -> list[Tensor]:
        """What each modality's head is given: (N, features of its trunk), in the precision of the forward pass."""
        return [trunk(part) for trunk, part in self._shared_out(images)]

    def embed(self, trunks: list[Tensor]) -> list[Tensor]:
        """The second half of `forward`."""
        return [head(features).float() for head, features in zip(self.heads, trunks)]

    def _shared_out(self, images: Tensor) -> Iterator[tuple[Layered, Tensor]]:
        return zip(self.backbones, images.split(self.channels, dim=1))
