"""Where models, recordings and artefacts are kept between runs, and how two processes take turns there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...contracts import MoebenchError

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
"""System errors that a user cures with another folder or more space; others are told as they are."""


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


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return ``target``, a file or a folder, after letting ``make`` write it aside where it does not exist.

    It appears by one rename under the lock of its folder: whole or absent, and made by one process only. What a killed
    process left aside is removed. ``make`` gets a path to write to and must not make anything else in that folder.
    """
    if target.exists():
        return target
    with locked(target.parent):
        if target.exists():
            return target
        for left in target.parent.glob(f".aside-{target.name}-*"):
            shutil.rmtree(left)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".aside-{target.name}-"))
        try:
            made = scratch / target.name
            make(made)
            _flush(made)
            made.rename(target)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            remedy = "free some space or set MOEBENCH_CACHE elsewhere."
            raise MoebenchError(f"{target} cannot be written ({error.strerror}); {remedy}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _flush(made: Path) -> None:
    """Have the kernel write out every file of ``made``, so that a rename never outlives its content."""
    for file in [made] if made.is_file() else [f for f in made.rglob("*") if f.is_file()]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
