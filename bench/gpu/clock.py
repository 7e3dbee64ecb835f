"""The clock of a GPU: events of the device around each call, and one wait at the end of a turn.

Nothing here imports torch: a ``Device`` is given, which is ``torch_device.TorchDevice`` on a machine that has a GPU.

What a sample is: the device's time between two events that are recorded right before and right after one call. Where
the residency is cold, a buffer larger than the L2 is overwritten before the first event, so the call finds none of its
weights or inputs there; the host runs ahead meanwhile, so the launches of a call that never waits for the device are
hidden as they are in a busy model. Copies of the weights are not rotated on a GPU: the buffer does what they do on a
CPU, and the footprint stays that of the method. The host waits for the device once, when the turn's calls are all
launched. A call that itself waits for the device (one that reads counts back, for instance) is timed with its waits
and the gaps between its launches: they are part of what it does.

A call that is shorter than its launches can be captured in a CUDA graph: then one launch replays it, with a warm L2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ...contracts import MoebenchError

FLUSH_BYTES = 256 * 2**20
"""The buffer that pushes everything out of the L2 has at least this size, and at least twice the L2's."""


class Event(Protocol):
    """A mark in the device's queue of work."""

    def record(self) -> None:
        """Put the mark behind the work launched so far."""

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds from this mark to ``end``; both must have been reached."""


class Device(Protocol):
    """A GPU as the clock needs it; every method but ``synchronize`` returns before the device has done the work."""

    def event(self) -> Event:
        """Return a new event that keeps the time."""

    def flush(self) -> None:
        """Overwrite a buffer of ``flush_bytes``."""

    def synchronize(self) -> None:
        """Wait for all work launched so far."""

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return (replay, output) of a graph of ``call``; raises RuntimeError where that cannot be one."""

    def facts(self) -> dict[str, Any]:
        """Return what a row tells of it: name, uuid and the versions that torch knows."""


def flush_bytes(l2_bytes: int) -> int:
    """Return the size of the buffer for a device with so much L2."""
    return max(FLUSH_BYTES, 2 * l2_bytes)


class DeviceClock:
    """Times the calls of one trial, in ns on the device's clock. ``read`` returns those since it was last asked."""

    def __init__(self, device: Device, flushes: bool, graphs: bool = False) -> None:
        if flushes and graphs:
            raise MoebenchError("a CUDA graph is timed with a warm L2; use axes.residency=warm.")
        self.device, self.flushes, self.graphs = device, flushes, graphs
        self._pairs: list[tuple[Event, Event]] = []
        self._used = 0
        self._captured: dict[int, tuple[Callable[[], None], Any]] = {}

    def call(self, run: Callable[[int], Any], step: int) -> Any:
        """Launch one call of ``run`` between two events and return its output, which need not be there yet."""
        replay, output = self._graph(run, step) if self.graphs else (None, None)
        start, end = self._events()
        if self.flushes:
            self.device.flush()
        start.record()
        if replay is None:
            output = run(step)
        else:
            replay()
        end.record()
        return output

    def read(self) -> list[int]:
        """Wait for the device once, and return the time of every call since the last reading in ns."""
        self.device.synchronize()
        pairs, self._used = self._pairs[: self._used], 0
        return [round(start.elapsed_time(end) * 1e6) for start, end in pairs]

    def prepare(self, run: Callable[[int], Any], steps: int) -> None:
        """Capture every step, where calls are graphs; nothing of this is timed."""
        if self.graphs:
            for step in range(steps):
                self._graph(run, step)

    def _graph(self, run: Callable[[int], Any], step: int) -> tuple[Callable[[], None], Any]:
        if step not in self._captured:
            try:
                self._captured[step] = self.device.capture(lambda: run(step))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise MoebenchError(f"this call cannot be a CUDA graph ({reason}); leave cuda_graph out.") from error
        return self._captured[step]

    def _events(self) -> tuple[Event, Event]:
        if self._used == len(self._pairs):
            self._pairs.append((self.device.event(), self.device.event()))
        self._used += 1
        return self._pairs[self._used - 1]
