"""Images that cannot be read: training goes on without them, but says which they are, and ends if they are too many."""

import os
from collections.abc import Sequence

from learning import parallel
from learning.run import Run, SilentRun

FILE = "bad_images.txt"
NOTED = 3  # images named in the log, too
SPARED = 2  # images that never end a run, however small the data


class BadImages:
    """Those of `paths` that any rank has met, each once. `found` is this rank's, path -> reason; its loader adds to it.

    All ranks call a method at the same step.
    """

    def __init__(self, found: dict[str, str], paths: Sequence[str]):
        self.found, self.paths = found, paths
        self.known: dict[str, str] = {}
        self.listed = 0

    def count(self, run: Run | SilentRun) -> dict[str, int]:
        """What a record tells of them, once there are any."""
        self._gather(run)
        return {"bad_images": len(self.known)} if self.known else {}

    @property
    def too_many(self) -> bool:
        """Whether they were more than 1 % when last counted: the same on every rank."""
        return len(self.known) > max(SPARED, len(self.paths) // 100)

    def check(self, run: Run | SilentRun) -> None:
        """ValueError if they are too many."""
        if self.too_many:
            raise ValueError(
                f"{len(self.known)} of the {len(self.paths)} images could not be read, which is more than 1 %; they "
                f"are listed in {run.folder / FILE}: repair them and go on, or remove them and start again."
            )

    def _gather(self, run: Run | SilentRun) -> None:
        new = {path: why for path, why in self.found.items() if path not in self.known}
        self.found.clear()
        if parallel.any_rank(bool(new)):
            together = {path: why for part in parallel.gather_objects(new) for path, why in part.items()}
            for path in sorted(together)[: max(NOTED - len(self.known), 0)]:
                shown = os.fsencode(path).decode(errors="replace")
                run.log(f"note: {shown} cannot be read as an image ({together[path]}); another one takes its place")
            if len(self.known) <= NOTED < len(self.known) + len(together):
                run.log(f"note: further images that cannot be read are listed in {run.folder / FILE}")
            self.known |= together
        if len(self.known) > self.listed:
            run.write_text(FILE, "".join(f"{path}\t{why}\n" for path, why in sorted(self.known.items())))
            self.listed = len(self.known)

    def state_dict(self, run: Run | SilentRun) -> dict[str, str]:
        self._gather(run)
        return dict(self.known)

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Those that have left the data since do not count, nor do any if they were too many: they may be repaired."""
        self.known = {path: state[path] for path in self.paths if path in state}
        self.known = {} if self.too_many else self.known
