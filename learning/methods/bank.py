"""InsDis (Wu et al., CVPR 2018), CMC (Tian et al., ECCV 2020), PIRL (Misra & van der Maaten, CVPR 2020): a memory bank.

With one modality this is InsDis; with two it is CMC; with a jigsaw branch beside either it is PIRL.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from learning import parallel
from learning.draws import Draws
from learning.methods.base import Batch, Contrast, Method, StepOutput
from learning.methods.jigsaw import Jigsaw, image_tasks
from memory.stores import Bank


class MemoryBank(Method):
    """View "query" (N, 3, H, W), and "jigsaw" where there is that branch; `banks`: one per modality.

    A query's positive is what the bank of the other modality (of its own if there is one only) remembers of its image,
    its negatives are `draws` random rows of the same bank. Gradients reach the query alone; afterwards each modality's
    embeddings move their rows of its bank. The modalities share the draws; their losses are added. Images that the bank
    has not seen yet have a loss of 0.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        banks: Sequence[Bank],
        negatives: int,
        contrast: Contrast,
        seed: int,
        jigsaw: Sequence[Jigsaw] = (),
    ):
        super().__init__()
        self.encoder = encoder
        self.banks, self.jigsaw = nn.ModuleList(banks), nn.ModuleList(jigsaw)
        self.contrast, self.negatives, self.seed = contrast, negatives, seed

    def forward(self, batch: Batch) -> StepOutput:
        draws = Draws(self.seed, batch["step"], batch["key_draw"])
        index, generator = batch["index"], draws.shared("bank")
        drawn = torch.randint(len(self.banks[0].rows), (self.negatives,), generator=generator, device=index.device)
        memories = [bank.read(index, drawn) for bank in self.banks]
        queries = self.encoder(batch["query"])
        tasks = image_tasks(queries, memories, self.jigsaw)
        for branch in self.jigsaw:
            tasks += branch(self.encoder, batch["jigsaw"], memories, draws)
        seen = self.banks[0].seen[index].float()
        tasks = [replace(task, weight=task.weight * seen) for task in tasks]
        writes = [parallel.gather(x) for x in (index, *(query.detach() for query in queries))]
        return self.contrast(tasks, draws, writes=writes)

    def after_step(self, out: StepOutput, step: int) -> None:
        self.contrast.after_step(out)
        index, *queries = out.writes
        for bank, features in zip(self.banks, queries):
            bank.write(index, features, out.ok)
