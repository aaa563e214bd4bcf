"""SimSiam (Chen & He, CVPR 2021): predict the embedding of one view from the other's, and stop the gradient there."""

from torch import nn
from torch.nn.functional import normalize

from learning.draws import Draws
from learning.methods.base import Batch, Contrast, Method, StepOutput
from memory.task import Task


class SimSiam(Method):
    """Views "query" and "key", (N, 3, H, W) each; neither negatives nor a second encoder.

    The loss is the mean of both directions' negative cosine (equation 2). `fix_predictor`: its learning rate does not
    fall (section 4.2). "feature_std" near 1 / sqrt(D) tells that embeddings have not collapsed (figure 2).
    """

    def __init__(self, encoder: nn.Module, *, predictor: nn.Module, fix_predictor: bool, contrast: Contrast, seed: int):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.fix_predictor, self.contrast, self.seed = fix_predictor, contrast, seed

    def forward(self, batch: Batch) -> StepOutput:
        draws = Draws(self.seed, batch["step"], batch["key_draw"])
        (one,), (other,) = self.encoder(batch["query"]), self.encoder(batch["key"])
        predictions = [normalize(self.predictor(z).float(), dim=1) for z in (one, other)]
        targets = [normalize(z.detach(), dim=1) for z in (other, one)]
        names = "image", "image/back"
        tasks = [Task(*of, weight=0.5) for of in zip(names, predictions, targets)]
        return self.contrast(tasks, draws, embeddings=targets[0])

    def param_groups(self) -> list[dict]:
        predictor = list(self.predictor.parameters())
        return [{"params": list(self.encoder.parameters())}, {"params": predictor, "fixed_lr": self.fix_predictor}]
