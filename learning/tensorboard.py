"""TensorBoard scalars through tensorboard_logger, or through torch's writer where that is missing."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class ScalarWriter(Protocol):
    def __call__(self, tag: str, value: float, step: int) -> None: ...


def scalar_writer(folder: Path) -> tuple[ScalarWriter, Callable[[], None], str | None]:
    """Begin an event file in `folder`: how to write one scalar, how to flush, and a note if it is not the usual way."""
    try:
        import tensorboard_logger

        while any(
            folder.glob(f"events.out.tfevents.{int(time.time())}.*")
        ):  # it would begin a file of this second anew
            time.sleep(0.05)
        return tensorboard_logger.Logger(str(folder)).log_value, lambda: None, None  # it always flushes
    except Exception as reason:  # an old generated file fails with TypeError, a missing package with ImportError
        first = f"tensorboard_logger cannot be used ({type(reason).__name__})"
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), flush_secs=2)
        return writer.add_scalar, writer.flush, f"{first}; torch.utils.tensorboard writes the same tags."
    except ImportError:
        note = f"{first} and tensorboard is not installed: no event files are written."
        return lambda tag, value, step: None, lambda: None, note


def cut(path: Path, size: int) -> None:
    """Take back what was written to a file beyond `size` bytes; of nothing no file is left."""
    if path.exists() and not size:
        path.unlink()
    elif path.exists():
        os.truncate(path, min(size, path.stat().st_size))
