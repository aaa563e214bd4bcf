"""A signal stops training between two steps instead of in the middle of one, on all processes at the same one."""

from contextlib import AbstractContextManager

from learning import parallel, signals


class Interrupt(AbstractContextManager):
    """A context in which the first signal only asks the loop to stop; the second one ends the program at once."""

    def __init__(self):
        self.patience, self.agreement = signals.Patience(), parallel.Agreement()
        self.status = 0  # what the program is to exit with

    def __enter__(self) -> "Interrupt":
        self.patience.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.patience.__exit__(*exception)

    def __call__(self, step: int) -> bool:
        number = self.agreement(step, self.patience.number)
        self.status = number and 128 + number
        return number > 0
