"""The tier in RAM: experts lie there packed, and a slot holds one of them dequantized.

What is fetched is dequantized into a slot; what is computed in place multiplies the packed codes. The cache is the one
that decides about files, so the same events come about. Imports no torch at module level.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future as Coming
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ...contracts import MoebenchError
from .access import Access, Event, Key
from .cache import Cache

if TYPE_CHECKING:
    from torch import Tensor

    from ..packing import PackedMatrix

Pair = tuple["Tensor", "Tensor"]


@dataclass(frozen=True)
class HostExpert:
    """One expert as it lies in RAM: ``dense()`` gives (gate_up, down) for a slot, ``packed`` multiplies where it is.

    ``packed`` is None where nothing is ever computed in place. ``read_bytes`` are what is read to fill a slot,
    ``nbytes`` what all forms take.
    """

    dense: Callable[[], Pair]
    packed: tuple[PackedMatrix, PackedMatrix] | None
    read_bytes: int
    nbytes: int


class HostServed(NamedTuple):
    """An expert handed out: dense matrices, or packed ones where ``event.how`` is ``in_place``."""

    key: Key
    gate_up: Any
    down: Any
    event: Event


@dataclass
class Cost:
    """What an access cost: time that the computing thread waited or dequantized, and what was read."""

    stall_ns: int = 0
    bytes_read: int = 0
    late: int = 0
    read_ns: int = 0


class HostStore:
    """Experts in RAM, ``cache.capacity`` of them dequantized; those of an access are handed out in its events' order.

    What is prefetched is dequantized by ``readers`` threads once its access has been served.
    """

    def __init__(self, experts: Mapping[Key, HostExpert], cache: Cache, readers: int = 1) -> None:
        self.experts, self.cache = dict(experts), cache
        self.log: list[list[Event]] = []
        self.ledger: list[Cost] = []
        self._slots: dict[Key, Pair | Coming[Pair]] = {key: experts[key].dense() for key in cache.resident}
        self._carried: deque[tuple[Event, Coming[Pair]]] = deque()
        self._pool = ThreadPoolExecutor(readers, "moebench-offload")
        self._whole = True

    def serve(self, access: Access) -> Iterator[HostServed]:
        """Yield every expert of ``access`` but those that are deferred, and of the last layer these too.

        A store whose last access was not taken to its end serves no other.
        """
        carry = access.layer != self.cache.layout.layers[-1]
        self._check(bool(self._carried))
        self._whole = False
        cost = Cost()
        events = self.cache.access(access)
        self.log.append(events)
        self.ledger.append(cost)
        for event in events:
            if event.kind == "prefetch":
                self._slots[event.key] = self._pool.submit(self.experts[event.key].dense)
                cost.bytes_read += self.experts[event.key].read_bytes
            elif carry and event.how == "deferred":
                self._put_off(event, cost)
            else:
                yield HostServed(event.key, *self._weights(event, cost), event)
            if event.evicted is not None:
                del self._slots[event.evicted]
        self._whole = True

    def deferred(self) -> Iterator[HostServed]:
        """Yield the experts that the access before deferred; what waiting costs is that access's."""
        self._check()
        while self._carried:
            event, coming = self._carried[0]
            begun = time.perf_counter_ns()
            pair = coming.result()
            self.ledger[-1].stall_ns += time.perf_counter_ns() - begun
            yield HostServed(event.key, *pair, event)
            self._carried.popleft()

    def _check(self, owing: bool = False) -> None:
        if owing or not self._whole:
            raise MoebenchError("this session was closed, or an access of it broken off; open a new one.")

    def _put_off(self, event: Event, cost: Cost) -> None:
        """Dequantize an expert in another thread, for ``deferred``."""
        coming = self._pool.submit(self.experts[event.key].dense)
        cost.bytes_read += self.experts[event.key].read_bytes
        if event.kept:
            self._slots[event.key] = coming
        self._carried.append((event, coming))

    def _weights(self, event: Event, cost: Cost) -> tuple[Any, Any]:
        expert = self.experts[event.key]
        if event.how == "in_place":
            if expert.packed is None:
                raise MoebenchError("no expert was packed to be computed in place; use execution=fetch.")
            return expert.packed
        begun = time.perf_counter_ns()
        if event.kind == "miss":
            pair = expert.dense()
            cost.bytes_read += expert.read_bytes
            cost.read_ns += time.perf_counter_ns() - begun
            if event.kept:
                self._slots[event.key] = pair
        else:
            pair = self._there(event.key, cost)
        cost.stall_ns += time.perf_counter_ns() - begun
        return pair

    def _there(self, key: Key, cost: Cost) -> Pair:
        """Return what is in a slot, or comes into it."""
        slot = self._slots[key]
        if isinstance(slot, Coming):
            cost.late += not slot.done()
            slot = self._slots[key] = slot.result()
        return slot

    def resident_bytes(self) -> int:
        """Return the bytes of all experts' packed forms and of the slots that are filled."""
        slots = [slot for slot in self._slots.values() if not isinstance(slot, Coming)]
        return sum(one.nbytes for one in self.experts.values()) + sum(a.nbytes + b.nbytes for a, b in slots)

    def close(self) -> None:
        """End the threads and let go of all weights."""
        self._whole = False
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._slots.clear()
        self._carried.clear()
        self.experts.clear()
