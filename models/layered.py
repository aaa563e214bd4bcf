"""Trunks known by their layers, each of which a classifier can be put on."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn


class Layered(nn.Module):
    """Base of the trunks: a subclass has a member, module or method, for every name in `sides`, to be run in order.

    `sides`: the side that a layer's map is pooled to, by `shrink`, for a classifier (None: none). `feature_dim`: how
    many numbers the last layer gives.
    """

    sides: ClassVar[dict[str, int | None]]
    shrink: Callable[[Tensor, list[int]], Tensor]
    feature_dim: int

    def forward(self, images: Tensor, layer: str | None = None) -> Tensor:
        """What `layer` makes of images (N, C, H, W): a map (N, c, h, w) or, as the last does, features (N, d)."""
        x = images
        for name in self.sides:
            x = getattr(self, name)(x)
            if name == layer:
                break
        return x

    def features(self, images: Tensor, layer: str | None = None) -> Tensor:
        """The same as (N, d) float32: a map is pooled, never to more than it has, and made a row."""
        x, side = self(images, layer).float(), self.sides.get(layer)
        return (self.shrink(x, [min(side, n) for n in x.shape[2:]]) if side else x).flatten(1)
