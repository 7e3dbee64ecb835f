"""Reading slabs from their file, and being sure of what was read. Imports no torch."""

from __future__ import annotations

import errno
import os
import time
import zlib
from typing import TYPE_CHECKING, Literal

from .errors import OffloadError
from .faults import Faults
from .header import ALIGN, Identity, Slab

if TYPE_CHECKING:
    from .file import SlabFile

IO = Literal["direct", "page_cache"]
IOS = ("direct", "page_cache")
"""``direct`` reads past the page cache (O_DIRECT); ``page_cache`` may find there what was read or written before."""


class Source:
    """The very file whose header was read, open for reads by several threads at once."""

    def __init__(self, file: SlabFile, io: IO) -> None:
        if io not in IOS:
            raise OffloadError(f"io={io} is no way of reading; write one of {', '.join(IOS)}.")
        self.file, self.step = file, ALIGN if io == "direct" else 1
        self._faults = Faults()
        try:
            if io == "direct" and (not hasattr(os, "O_DIRECT") or self._faults.strikes("no_direct")):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self._descriptor = os.open(file.path, os.O_RDONLY | (os.O_DIRECT if io == "direct" else 0))
        except OSError as error:
            if io == "direct" and error.errno == errno.EINVAL:
                raise OffloadError(
                    f"the file system of {file.path} has no direct reads (O_DIRECT); use io=page_cache, or move it."
                ) from error
            raise OffloadError(f"{file.path} cannot be read ({error.strerror}); write it with write_slabs.") from error
        try:
            self._check_unchanged()
        except OSError as error:
            self.close()
            raise OffloadError(f"{file.path} cannot be read ({error.strerror}); open it again.") from error

    def close(self) -> None:
        """Let go of the file; no thread reads any more."""
        os.close(self._descriptor)

    def read(self, slab: Slab, target: memoryview, name: str) -> None:
        """Fill ``target`` with a slab; ``name`` is how its expert is called.

        Raises:
            OffloadError: the file changed, the system failed, or the bytes do not match their checksum.
        """
        try:
            self._check_unchanged()
            self._fill(target, self.file.data_begin + slab.offset)
        except OSError as error:
            raise OffloadError(
                f"{name} cannot be read from {self.file.path} ({error.strerror or error}); see whether the disk is "
                "healthy, or write the file anew."
            ) from error
        if zlib.crc32(target) != slab.crc32:
            raise OffloadError(
                f"{name} is damaged: its bytes in {self.file.path} do not match their checksum; write the file anew."
            )

    def _check_unchanged(self) -> None:
        if Identity.of(os.stat(self.file.path)) != self.file.identity:
            raise OSError(errno.ESTALE, "the file was changed after it was opened")

    def _fill(self, target: memoryview, offset: int) -> None:
        """Read until ``target`` is full: the system may give less than it is asked for."""
        if self._faults.strikes("read_slow"):
            time.sleep(self._faults.slow_s)
        if self._faults.strikes("read_error"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done = 0
        if self._faults.strikes("read_short"):
            done = os.preadv(self._descriptor, [target[: len(target) // 2 // self.step * self.step]], offset)
        while done < len(target):
            got = os.preadv(self._descriptor, [target[done:]], offset + done) // self.step * self.step
            if got == 0:
                raise OSError(errno.EIO, "it ends before all of it was read")
            done += got
