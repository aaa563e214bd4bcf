"""TensorBoard scalars through tensorboard_logger, or through torch's writer where that is missing."""

from pathlib import Path
from typing import Protocol


class ScalarWriter(Protocol):
    def __call__(self, tag: str, value: float, step: int) -> None: ...


def scalar_writer(folder: Path) -> tuple[ScalarWriter, str | None]:
    """A function that writes one scalar below `folder`, and a note if it is not the usual writer."""
    try:
        import tensorboard_logger

        return tensorboard_logger.Logger(str(folder), flush_secs=2).log_value, None
    except Exception as reason:  # an old generated file fails with TypeError, a missing package with ImportError
        first = f"tensorboard_logger cannot be used ({type(reason).__name__})"
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(
            str(folder), flush_secs=2
        ).add_scalar, f"{first}; torch.utils.tensorboard writes the same tags."
    except ImportError:
        return lambda tag, value, step: None, f"{first} and tensorboard is not installed: no event files are written."
