"""The real second tier: a cache's decisions carried out with a slab file, slots of memory and reader threads."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ...moe.experts import Weight
from .access import Access, Event, Key
from .cache import Cache
from .errors import OffloadError
from .file import SlabFile
from .memory import Link, Memory, memory_on
from .reader import DEADLINE_S, Entry, Readers, Ticket
from .source import IO


class Served(NamedTuple):
    """One expert of an access; its weights are None where it is computed where it lies (``event.how`` in_place)."""

    key: Key
    gate_up: Weight | None
    down: Weight | None
    event: Event


@dataclass(eq=False)
class _Copy:
    """An expert's bytes, or the read that brings them. It holds its slot while it is ``resident`` or ``wanted``.

    ``weights`` are the views on its slot, made when it is first used.
    """

    key: Key
    form: str
    entry: Entry
    resident: bool
    wanted: bool
    ticket: Ticket | None = None
    weights: tuple[Weight, Weight] | None = None


class SlotStore:
    """Experts of ``file`` in slots, by the decisions of ``cache``: every event is done, and nothing else.

    There are ``cache.capacity`` slots and ``staging`` more, through which goes what is not kept, and what was dropped
    while it is still to be computed. ``io`` and ``readers`` are of the reading threads; a read that takes longer than
    ``deadline_s`` ends the store. With ``carry`` deferred experts are handed out by ``deferred``, but for those of the
    last layer. ``log`` has the events of each access, ``ledger`` what each cost, ``first`` what it
    cost to bring what is in the cache from the start.

    Raises:
        OffloadError: cache and file are of different models, a setting makes no sense, or a read failed.
    """

    def __init__(
        self,
        file: SlabFile,
        cache: Cache,
        *,
        io: IO = "direct",
        readers: int = 1,
        staging: int = 2,
        device: str | Link = "cpu",
        carry: bool = False,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        if cache.layout != file.layout or cache.now >= 0:
            raise OffloadError(
                f"the cache is of another model than {file.path}, or in use already; make a new one with its layout."
            )
        if staging < 1:
            raise OffloadError(f"staging={staging} leaves no slot for what is not kept; give at least one.")
        self.file, self.cache, self.carry = file, cache, carry
        self.log: list[list[Event]] = []
        self.ledger: list[Entry] = []
        self.first = Entry()
        slots = cache.capacity + staging
        slot_bytes = max(file.slab_bytes(form) for form in file.forms)
        self.memory: Memory = memory_on(device, slots, slot_bytes, readers)
        self._free = deque(range(slots))
        self._pending: deque[_Copy] = deque()
        self._draining: deque[Ticket] = deque()
        self._held: dict[Key, _Copy] = {}
        self._carried: deque[tuple[Event, _Copy]] = deque()
        self._serving = False
        self._readers = Readers(file, self.memory.landing, io, readers, deadline_s)
        self._end = weakref.finalize(self, _close, self._readers, self.memory)
        try:
            self._bring_first()
        except OffloadError:
            self.close()
            raise

    def serve(self, access: Access) -> Iterator[Served]:
        """Yield the experts of an access: those that are there, then the missing ones in the order of the events.

        What is yielded stays as it is until the next one is asked for. All reads that find a slot are begun before the
        first is yielded, those ahead of time last. Reads of what is carried over are begun after all others.

        Raises:
            OffloadError: a read failed, now or before, or the access before was not iterated to its end.
        """
        self._readers.check()
        if self._carried:
            raise OffloadError("experts of the access before are deferred; take them before the next access.")
        if self._serving or self.cache.now + 1 != len(self.log):
            raise OffloadError("the access before is still served, or the cache was used elsewhere; take turns.")
        for key in access.keys:
            self.file.slab(key)
        self._serving = True
        events, entry = self.cache.access(access), Entry()
        self.log.append(events)
        self.ledger.append(entry)
        order: list[tuple[Event, _Copy | None]] = []
        try:
            for event in events:
                order += self._apply(event, entry)
            if self.carry and access.layer != self.file.layout.layers[-1]:
                order = self._put_off(order)
            self._pump()
            for event, copy in order:
                yield self._served(event, copy, entry)
                if copy is not None:
                    self._settle(copy)
                    self._pump()
        except OffloadError as error:
            self._readers.fail(error)  # the cache has gone on, and its slots have not: nothing can be served any more
            raise
        finally:
            for _, copy in order:
                if copy is not None and copy.wanted:
                    self._settle(copy)
            self._serving = False

    def deferred(self) -> Iterator[Served]:
        """Yield what the access before carried over, as ``serve`` does; what waiting costs is that access's.

        Raises:
            OffloadError: a read failed, or the access before was not iterated to its end.
        """
        if self._carried and self._serving:
            raise OffloadError("the access before is still served; take all its experts first.")
        self._readers.check()
        self._pump()
        try:
            while self._carried:
                event, copy = self._carried[0]
                yield self._served(event, copy, self.ledger[-1])
                self._carried.popleft()
                self._settle(copy)
                self._pump()
        except OffloadError as error:
            self._readers.fail(error)
            raise

    def resident_bytes(self) -> int:
        """Return the bytes of all slots, in the memory in which experts are computed."""
        return self.memory.nbytes

    def close(self) -> None:
        """End the reader threads and let go of the slots. What was yielded stays readable; nothing more is served."""
        self._end()
        self._held.clear()

    def __enter__(self) -> SlotStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _bring_first(self) -> None:
        copies = [_Copy(key, "full", self.first, resident=True, wanted=False) for key in self.cache.resident]
        self._held = {copy.key: copy for copy in copies}
        self._pending.extend(copies)
        self._pump()
        for copy in copies:
            self._arrived(copy)

    def _apply(self, event: Event, entry: Entry) -> list[tuple[Event, _Copy | None]]:
        """Do what an event says, but for reading; return what is to be yielded for it."""
        if event.evicted is not None:
            gone = self._held.pop(event.evicted)
            gone.resident = False
            self._let_go(gone)
        if event.kind in ("hit", "covered"):
            copy = self._held[event.key]
            copy.wanted = True
            return [(event, copy)]
        if event.how == "in_place":
            return [(event, None)]
        form, wanted = ("low" if event.how == "low" else "full"), event.kind != "prefetch"
        self.file.slab(event.key, form)
        copy = _Copy(event.key, form, entry, resident=event.kept, wanted=wanted)
        if event.kept:
            self._held[event.key] = copy
        self._pending.append(copy)
        return [(event, copy)] if wanted else []

    def _put_off(self, order: list[tuple[Event, _Copy | None]]) -> list[tuple[Event, _Copy | None]]:
        """Carry the deferred ones of ``order`` over, their reads behind all others; return the rest.

        They keep the slots that they get. Since they are taken before the next access, each finds one: only those
        deferred before it may hold a slot besides what is in the cache, and these are let go one by one.
        """
        deferred = [(event, copy) for event, copy in order if copy is not None and event.how == "deferred"]
        self._carried.extend(deferred)
        for _, copy in deferred:
            self._pending.remove(copy)
            self._pending.append(copy)
        return [pair for pair in order if pair[0].how != "deferred"]

    def _served(self, event: Event, copy: _Copy | None, entry: Entry) -> Served:
        self._readers.check()
        if copy is None:
            return Served(event.key, None, None, event)
        ticket = copy.ticket
        if ticket is None or ticket.state != "done":
            began = time.perf_counter_ns()
            ticket = self._arrived(copy)
            entry.stall_ns += time.perf_counter_ns() - began
            entry.late += event.kind != "miss"
        buffer = self.memory.ready(ticket.slot)
        if copy.weights is None:
            copy.weights = self.file.weights(copy.key, copy.form, buffer)
        return Served(event.key, *copy.weights, event)

    def _arrived(self, copy: _Copy) -> Ticket:
        """Wait until a copy is read, and return its ticket.

        It finds a slot: what is before it in the queue has one, or waits here too.
        """
        while copy.ticket is None:
            self._readers.wait(self._draining[0])
            self._pump()
        self._readers.hurry(copy.ticket)
        self._readers.wait(copy.ticket)
        return copy.ticket

    def _settle(self, copy: _Copy) -> None:
        """Note that a copy was used in this access."""
        copy.wanted = False
        if copy.ticket is not None:
            self.memory.used(copy.ticket.slot)
        self._let_go(copy)

    def _let_go(self, copy: _Copy) -> None:
        """Give back the slot of a copy that nobody needs, at once or when the read into it ends."""
        if copy.resident or copy.wanted:
            return
        if copy.ticket is None:
            self._pending.remove(copy)
            copy.entry.cancelled += 1
        elif self._readers.cancel(copy.ticket):
            self._free.append(copy.ticket.slot)
        else:
            self._draining.append(copy.ticket)

    def _pump(self) -> None:
        """Begin the reads that wait for a slot, in order, as far as there are slots."""
        for ticket in [ticket for ticket in self._draining if ticket.state == "done"]:
            self._draining.remove(ticket)
            self._free.append(ticket.slot)
        while self._pending and self._free:
            copy = self._pending.popleft()
            copy.ticket = self._readers.submit(copy.key, copy.form, self._free.popleft(), copy.wanted, copy.entry)


def _close(readers: Readers, memory: Memory) -> None:
    readers.close()
    memory.close()
