"""What ends a program from outside: Ctrl-C, SIGTERM (kill, scancel) and SIGUSR1 (Slurm, some time before the end)."""

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GO_ON = "the same command with --resume auto goes on from the last checkpoint, if any"


class Ended(KeyboardInterrupt):
    """What a signal raises wherever the program stands. `status` is the exit status that shells expect after it."""

    def __init__(self, number: int):
        super().__init__(f"stopped; {GO_ON}.")
        self.status = 128 + number


def end_at_once() -> None:
    """From now on each of SIGNALS raises `Ended`."""
    for number in SIGNALS:
        signal.signal(number, _end)


def ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: Any) -> NoReturn:
    raise Ended(number)


class Patience(AbstractContextManager):
    """A context in which the first signal is only noted in `number` and told to `hear`; the second raises `Ended`."""

    same = 1.0  # seconds in which what comes again is the same one: a launcher passes on what a terminal sent to all

    def __init__(self, hear: Callable[[int], Any] = lambda number: None):
        self.hear, self.number = hear, 0

    def __enter__(self) -> "Patience":
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
            self.hear(number)
        elif time.monotonic() > self.since + self.same:
            raise Ended(number)
