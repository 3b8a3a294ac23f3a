"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

_PREFIX, _SUFFIX = ".p2pfast-", ".tmp"


@contextmanager
def whole(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """A stream to write ``path`` with: a file beside it that takes its name at the end, or is removed.

    ``durable`` waits until the contents are on the disk before the file takes the place of an older one.
    """
    handle, temporary = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield cast(BinaryIO, stream)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while writing have left in ``folder``."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        path.unlink(missing_ok=True)


# There is no way to read the mask without setting it; see umask(2). Other threads would see the gap, so it is
# read once, at import.
_UMASK = os.umask(0)
os.umask(_UMASK)
