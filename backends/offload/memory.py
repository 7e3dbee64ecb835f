"""The memory of slots: where a read lands, how its bytes come to the slot, and when they may be used or overwritten."""

from __future__ import annotations

import mmap
import queue
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import OffloadError
from .header import ALIGN


class Memory(Protocol):
    """Slots of one size. Reader threads call ``landing``; the thread that computes calls everything else."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""

    def landing(self, slot: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """Give ``nbytes`` for a read, at a multiple of 4096; they go on to the slot once the block ends well."""

    def ready(self, slot: int) -> Tensor:
        """Return the slot as uint8, for work that begins after what was read into it arrived."""

    def used(self, slot: int) -> None:
        """Note that all work begun so far may read the slot, and that no later work does before it is filled anew."""

    def close(self) -> None:
        """Let nothing be under way any more, and let go of all slots: what was handed out of them stays as it is."""


class HostMemory:
    """Slots in one piece of page-aligned memory; reads land in them."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slot_bytes, self.nbytes = slot_bytes, slots * slot_bytes
        try:
            memory = mmap.mmap(-1, self.nbytes)
        except (OSError, ValueError, OverflowError) as error:
            raise OffloadError(_too_much(slots, self.nbytes, error)) from error
        self._view = memoryview(memory)
        self._all = torch.frombuffer(memory, dtype=torch.uint8)

    @contextmanager
    def landing(self, slot: int, nbytes: int) -> Iterator[memoryview]:
        """Give the slot itself."""
        begin = slot * self.slot_bytes
        yield self._view[begin : begin + nbytes]

    def ready(self, slot: int) -> Tensor:
        """Return the slot: what was read is there."""
        begin = slot * self.slot_bytes
        return self._all[begin : begin + self.slot_bytes]

    def used(self, slot: int) -> None:
        """Do nothing: work on the host is done when its call returns."""

    def close(self) -> None:
        """Let go of the memory, which goes with its last view."""
        self._view, self._all, self.nbytes = memoryview(b""), torch.empty(0, dtype=torch.uint8), 0


class Link(Protocol):
    """The way between host and device: a stream of copies beside that of the work, and marks in both."""

    def pinned(self, nbytes: int) -> Tensor:
        """Return host memory (uint8, at a multiple of 4096) that the device reads by itself."""

    def empty(self, nbytes: int) -> Tensor:
        """Return memory of the device (uint8)."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Begin a copy to the device once mark ``after`` is reached; return the mark of its end. Any thread calls."""

    def mark(self) -> Any:
        """Return a mark behind all work given to the device by this thread so far."""

    def follow(self, mark: Any) -> None:
        """Let work given to the device from now on begin after ``mark``."""

    def finish(self, mark: Any) -> None:
        """Wait, on the host, until ``mark`` is reached."""


class DeviceMemory:
    """Slots on a device. Reads land in pinned memory, and a copy beside the device's work brings them to the slot.

    A pinned buffer is read into again when its copy has ended, and a slot is overwritten when the work that may read
    it has. ``landings`` is the number of pinned buffers: one for each reader, and one whose copy is under way.
    """

    def __init__(self, link: Link, slots: int, slot_bytes: int, landings: int) -> None:
        self.link, self.slot_bytes, self.nbytes = link, slot_bytes, slots * slot_bytes
        try:
            self._all = link.empty(self.nbytes)
            pinned = [link.pinned(slot_bytes) for _ in range(landings)]
        except RuntimeError as error:
            raise OffloadError(_too_much(slots, self.nbytes, str(error).partition("\n")[0])) from error
        begun = link.mark()
        self._used = [begun] * slots
        self._arrived = [begun] * slots
        self._landings: queue.SimpleQueue[tuple[Tensor, Any]] = queue.SimpleQueue()
        for buffer in pinned:
            self._landings.put((buffer, None))

    @contextmanager
    def landing(self, slot: int, nbytes: int) -> Iterator[memoryview]:
        """Give a pinned buffer; the one whose copy began first."""
        buffer, leaving = self._landings.get()
        try:
            if leaving is not None:
                self.link.finish(leaving)
            yield buffer.numpy().data[:nbytes]
            leaving = self.link.copy(self._slot(slot)[:nbytes], buffer[:nbytes], self._used[slot])
            self._arrived[slot] = leaving
        finally:
            self._landings.put((buffer, leaving))

    def ready(self, slot: int) -> Tensor:
        """Return the slot; the device's work waits for the copy, the host does not."""
        self.link.follow(self._arrived[slot])
        return self._slot(slot)

    def used(self, slot: int) -> None:
        """Mark the end of the work so far."""
        self._used[slot] = self.link.mark()

    def close(self) -> None:
        """Wait for the copies, which the memory must outlive, and let go of it."""
        for mark in self._arrived:
            self.link.finish(mark)
        self._all, self.nbytes = torch.empty(0, dtype=torch.uint8), 0
        while not self._landings.empty():
            self._landings.get()

    def _slot(self, slot: int) -> Tensor:
        begin = slot * self.slot_bytes
        return self._all[begin : begin + self.slot_bytes]


class CudaLink:
    """The link of a CUDA (or ROCm) device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._cuda: Any = torch.cuda  # parts of it have no types
        self.side = self._cuda.Stream(self.device)

    def pinned(self, nbytes: int) -> Tensor:
        """Return a part of page-locked memory that begins at a multiple of 4096."""
        memory = torch.empty(nbytes + ALIGN, dtype=torch.uint8, pin_memory=True)
        skip = -memory.data_ptr() % ALIGN
        return memory[skip : skip + nbytes]

    def empty(self, nbytes: int) -> Tensor:
        """Return memory of the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Begin a copy on the side stream."""
        end = self._cuda.Event(blocking=True)
        with self._cuda.stream(self.side):
            self.side.wait_event(after)
            target.copy_(source, non_blocking=True)
            end.record(self.side)
        return end

    def mark(self) -> Any:
        """Return an event of this thread's stream."""
        mark = self._cuda.Event(blocking=True)
        mark.record(self._cuda.current_stream(self.device))
        return mark

    def follow(self, mark: Any) -> None:
        """Let this thread's stream wait for the event."""
        self._cuda.current_stream(self.device).wait_event(mark)

    def finish(self, mark: Any) -> None:
        """Wait for the event."""
        mark.synchronize()


def memory_on(device: str | Link, slots: int, slot_bytes: int, readers: int) -> Memory:
    """Return slots on ``cpu``, on a CUDA device, or behind any other link."""
    if device == "cpu":
        return HostMemory(slots, slot_bytes)
    if isinstance(device, str):
        if not (device.startswith("cuda") and torch.cuda.is_available()):
            raise OffloadError(f"there are no slots on device {device} here; use cpu, or cuda where there is a GPU.")
        device = CudaLink(device)
    return DeviceMemory(device, slots, slot_bytes, readers + 1)


def _too_much(slots: int, nbytes: int, why: object) -> str:
    return f"{nbytes / 2**30:.2f} GiB for {slots} slots are not to be had ({why}); lower the capacity."
