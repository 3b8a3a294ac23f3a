"""One process at a time writes a run's folder."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2pfast.errors import UsageError

_FILE = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder; the system lets go of it when the process ends, however it does.

    Raises UsageError if another process holds it. File systems without locks are not guarded.
    """
    handle = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise UsageError(
                    f"{folder}: another process trains there; wait for it, or use another --name"
                ) from None
        yield
    finally:
        os.close(handle)
