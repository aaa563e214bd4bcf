"""Ctrl-C between two steps instead of in the middle of one."""

import signal

from learning import parallel


class Interrupt:
    """A context in which the first Ctrl-C only asks the loop to stop; the second one ends the program at once."""

    every = 10  # steps between two times that several processes ask each other; a single one stops at once

    def __init__(self):
        self.asked = self.stopped = False

    def __enter__(self) -> "Interrupt":
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, *signal_and_frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __call__(self, step: int) -> bool:
        if parallel.world_size() == 1 or step % self.every == 0:
            self.stopped = parallel.any_rank(self.asked)
        return self.stopped
