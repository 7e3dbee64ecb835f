"""Where models, recordings and artefacts are kept between runs, and how two processes take turns there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...contracts import MoebenchError


def cache_dir() -> Path:
    """Return ``$MOEBENCH_CACHE``, or ``~/.cache/moebench``."""
    return Path(os.environ.get("MOEBENCH_CACHE") or Path.home() / ".cache" / "moebench").expanduser()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other processes until the block ends; the kernel frees the lock of a dead process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a")
    except OSError as error:
        raise MoebenchError(f"{folder} cannot be written ({error.strerror}); set MOEBENCH_CACHE elsewhere.") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
