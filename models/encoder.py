"""Trunk and head per modality. One embedding per modality comes out, so plain RGB is the same loop of length one."""

import torch
from torch import Tensor, nn

from models.heads import head as build_head
from models.resnet import resnet


class Encoder(nn.Module):
    """`channels` says how the input's channels are shared out among the modalities; each has its own trunk and head.

    With `head` none there are trunks only, and no embeddings come out.
    """

    def __init__(
        self, *, arch: str, width: float, stem: str, head: str, feat_dim: int, channels: tuple[int, ...] = (3,)
    ):
        super().__init__()
        self.channels = channels
        small = stem == "small"
        self.backbones = nn.ModuleList(resnet(arch, width=width, in_channels=c, small_stem=small) for c in channels)
        headed = () if head == "none" else self.backbones
        self.heads = nn.ModuleList(build_head(head, b.feature_dim, feat_dim) for b in headed)
        self.feature_dim = sum(b.feature_dim for b in self.backbones)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, sum(channels), H, W) -> one (N, feat_dim) float32 embedding per modality.

        Embeddings have unit length, except those of the head `linear_wo_norm`.
        """
        return self.embed(self.trunks(images))

    def features(self, images: Tensor) -> Tensor:
        """Pooled trunk features of all modalities side by side: (N, feature_dim) float32, not normalised."""
        return torch.cat([features.float() for features in self.trunks(images)], dim=1)

    def trunks(self, images: Tensor) -> list[Tensor]:
        """What each modality's head is given: (N, features of its trunk), in the precision of the forward pass."""
        return [trunk(part) for trunk, part in zip(self.backbones, images.split(self.channels, dim=1))]

    def embed(self, trunks: list[Tensor]) -> list[Tensor]:
        """The second half of `forward`."""
        return [head(features).float() for head, features in zip(self.heads, trunks)]
