"""The jigsaw branch of PIRL (Misra & van der Maaten, CVPR 2020, section 3) and InfoMin (Tian et al., NeurIPS 2020)."""

from collections.abc import Sequence

from torch import Tensor, nn

from learning.draws import Draws
from memory.task import Negatives, Task
from models.heads import JigsawHead

PATCHES = 9


class Jigsaw(nn.Module):
    """Nine patches of an image, embedded together, must find the same target as the image itself.

    `heads`: one per modality. Each modality meets its own memory, also where whole images meet that of the other one.
    """

    def __init__(self, heads: Sequence[JigsawHead], weight: float):
        super().__init__()
        self.heads, self.weight = nn.ModuleList(heads), weight

    def forward(
        self, encoder: nn.Module, patches: Tensor, targets: Sequence[tuple[Tensor, Negatives]], draws: Draws
    ) -> list[Task]:
        """patches (N, 9, 3, p, p); targets: positives (N, D) and negatives per modality. One task each comes out."""
        order = draws.per_sample(PATCHES, "jigsaw/order").argsort(dim=1)
        trunks = encoder.trunks(patches.flatten(0, 1))
        queries = [head(x.unflatten(0, (-1, PATCHES)), order) for head, x in zip(self.heads, trunks)]
        return [
            Task(f"jigsaw{m}", query, positive, (negatives,), self.weight, branch="jigsaw")
            for m, (query, (positive, negatives)) in enumerate(zip(queries, targets))
        ]


def image_tasks(
    queries: Sequence[Tensor], targets: Sequence[tuple[Tensor, Negatives]], branches: Sequence[Jigsaw]
) -> list[Task]:
    """Each modality's query (N, D) and the target of the next one (of its own, where there is one only).

    Targets are positives (N, D) and negatives. What jigsaw `branches` weigh is taken from the images.
    """
    weight, tasks = 1 - sum(branch.weight for branch in branches), []
    for m, query in enumerate(queries):
        positive, negatives = targets[(m + 1) % len(targets)]
        tasks.append(Task(f"image{m}", query, positive, (negatives,), weight))
    return tasks
