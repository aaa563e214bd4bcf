"""Random numbers of a training step, each a function of a key: nothing to save, equal on any number of processes."""

from dataclasses import dataclass

from torch import Generator, Tensor

from datasets import keyed


@dataclass(frozen=True)
class Draws:
    """`keys` (N,) belong to the samples of the batch, made of (seed, epoch, sample); `seed` and `step` to all ranks."""

    seed: int
    step: int
    keys: Tensor

    def per_sample(self, count: int, salt: str, keys: Tensor | None = None) -> Tensor:
        """Uniform numbers (N, count) in [0, 1), for the samples of the batch or for other `keys` (N,)."""
        return keyed.uniform(self.keys if keys is None else keys, count, salt)

    def shared(self, salt: str) -> Generator:
        """A generator on the batch's device, seeded by (seed, step, salt)."""
        return keyed.generator(self.keys.device, self.seed, self.step, salt)
