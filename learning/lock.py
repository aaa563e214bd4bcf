"""One process at a time writes to a run folder."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

_held: dict[Path, TextIO] = {}


def hold(folder: Path) -> None:
    """Keep others from writing to `folder` until this process ends, however it ends, or holds another folder.

    ValueError if another process holds it or it is somebody else's. A record lock (POSIX): forked loader workers do
    not inherit it.
    """
    if folder.resolve() in _held:  # opening and closing the file once more would let go
        return
    try:
        file = (folder / "lock").open("a+")
    except PermissionError:
        raise ValueError(f"{folder} is not yours to write to: begin a run of another --name or --model_path.") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(
            f"{folder} is being written to by {file.read() or 'another process'}: wait until it ends, or begin a run "
            "of another --name."
        ) from None
    except OSError:  # a file system without locks: go on as if alone
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held.clear()
    _held[folder.resolve()] = file
