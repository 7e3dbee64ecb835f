"""The disk probe of suite ``roofline``: a file read past the page cache, as fast as one thread gets it."""

from __future__ import annotations

import mmap
import os
import random
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from ..contracts import Case, Check, Cost, Facts, MoebenchError
from .models.cache import cache_dir, make_once

BLOCK = 8 * 2**20
"""Bytes of a request; about an expert."""


class Disk:
    """One pass over a file in the cache's folder, by O_DIRECT into one buffer, block after block."""

    state: Literal["none"] = "none"
    steps = 1

    def __init__(self, case: Case) -> None:
        self.size = int(case.backend.params["size"])
        path = make_once(cache_dir() / "probes" / f"{self.size}.bin", self._write)
        if not hasattr(os, "O_DIRECT"):
            raise MoebenchError("reads past the page cache need Linux's O_DIRECT; leave suite.disk_bytes at 0.")
        try:
            self.file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            raise MoebenchError(
                f"the file system of {path} takes no O_DIRECT ({error.strerror}); set MOEBENCH_CACHE elsewhere."
            ) from error
        self.buffer = mmap.mmap(-1, self.size)
        self.view = memoryview(self.buffer)
        self.expected = _checksum(self._blocks())

    def _blocks(self) -> Iterator[bytes]:
        """Yield what the file holds: noise that no disk compresses, with the number of its block at the beginning."""
        noise = random.Random(0).randbytes(BLOCK - 8)
        for number in range(self.size // BLOCK):
            yield number.to_bytes(8, "little") + noise

    def _write(self, path: Path) -> None:
        with path.open("wb") as stream:
            stream.writelines(self._blocks())

    def begin_turn(self) -> None:
        """Empty the buffer."""
        self.view[:] = bytes(self.size)

    def run(self, step: int) -> memoryview:
        """Read the file once."""
        for start in range(0, self.size, BLOCK):
            done = os.preadv(self.file, [self.view[start : start + BLOCK]], start)
            if done != BLOCK:
                raise MoebenchError(
                    f"a read ended after {done} of {BLOCK} bytes; remove the probe's file and try again."
                )
        return self.view

    def verify(self, step: int, output: memoryview) -> Check:
        """Check that every byte is the one that was written."""
        found = _checksum(output[start : start + BLOCK] for start in range(0, self.size, BLOCK))
        ok = found == self.expected
        return Check(
            ok, float(not ok), 0.0, "" if ok else "the file's checksum is another than that of what was written"
        )

    def cost(self, step: int) -> Cost:
        """Return the bytes of the file; nothing is computed."""
        return Cost(0.0, float(self.size))

    def facts(self) -> Facts:
        """Name the rate that the fastest call establishes."""
        return Facts(notes={"rate": "bandwidth_disk", "per": "bytes"})

    def close(self) -> None:
        """Let go of file and buffer."""
        self.view.release()
        self.buffer.close()
        os.close(self.file)


def _checksum(blocks: Iterable[bytes | memoryview]) -> int:
    value = 0
    for block in blocks:
        value = zlib.crc32(block, value)
    return value
