"""BYOL (Grill et al., NeurIPS 2020): predict what a slowly moving copy of the encoder says of the other view."""

from torch import nn
from torch.nn.functional import normalize

from learning.draws import Draws
from learning.methods.base import Batch, Contrast, Method, Schedule, StepOutput
from memory.task import Task
from models.momentum import MomentumEncoder


class BYOL(Method):
    """Views "query" and "key", (N, 3, H, W) each; no negatives.

    The loss is the sum of both directions' squared distances of unit vectors, 2 - 2 cosines (equation 2).
    `key_momentum` gives the target's momentum by step (section 3.1).
    """

    def __init__(
        self, encoder: nn.Module, *, predictor: nn.Module, key_momentum: Schedule, contrast: Contrast, seed: int
    ):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.momentum_encoder = MomentumEncoder(encoder)
        self.key_momentum, self.contrast, self.seed = key_momentum, contrast, seed

    def forward(self, batch: Batch) -> StepOutput:
        draws = Draws(self.seed, batch["step"], batch["key_draw"])
        views = batch["query"], batch["key"]
        predictions = [normalize(self.predictor(*self.encoder(view)).float(), dim=1) for view in views]
        targets = [normalize(*self.momentum_encoder(view), dim=1) for view in reversed(views)]
        names = "image", "image/back"
        tasks = [Task(*of) for of in zip(names, predictions, targets)]
        return self.contrast(tasks, draws, embeddings=targets[0])

    def after_step(self, out: StepOutput, step: int) -> None:
        self.momentum_encoder.update(self.encoder, self.key_momentum(step))
