"""The memory of slots: where a read lands, how its bytes come to the slot, and when they may be used or overwritten."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .errors import OffloadError


class Memory(Protocol):
    """Slots of one size. Reader threads call ``landing``; the thread that computes calls everything else."""

    nbytes: int

    def landing(self, slot: int) -> AbstractContextManager[memoryview]:
        """Give memory for a read, at a multiple of 4096; its bytes go on to the slot once the block ends."""

    def ready(self, slot: int) -> Tensor:
        """Return the slot as uint8, for work that begins after what was read into it arrived."""

    def used(self, slot: int) -> None:
        """Note that all work begun so far may read the slot, and that no later work does before it is filled anew."""


class HostMemory:
    """Slots in one piece of page-aligned memory; reads land in them."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slot_bytes, self.nbytes = slot_bytes, slots * slot_bytes
        try:
            memory = mmap.mmap(-1, self.nbytes)
        except (OSError, ValueError, OverflowError) as error:
            raise OffloadError(
                f"{self.nbytes / 2**30:.1f} GiB for {slots} slots are not to be had ({error}); lower the capacity."
            ) from error
        self._view = memoryview(memory)
        self._all = torch.frombuffer(memory, dtype=torch.uint8)

    @contextmanager
    def landing(self, slot: int) -> Iterator[memoryview]:
        """Give the slot itself."""
        begin = slot * self.slot_bytes
        yield self._view[begin : begin + self.slot_bytes]

    def ready(self, slot: int) -> Tensor:
        """Return the slot: what was read is there."""
        begin = slot * self.slot_bytes
        return self._all[begin : begin + self.slot_bytes]

    def used(self, slot: int) -> None:
        """Do nothing: work on the host is done when its call returns."""
