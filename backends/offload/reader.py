"""Threads that read slabs: what is waited for before what may be wanted, each checked against its checksum.

Imports no torch. A read that fails, is slow beyond the deadline, or brings other bytes than were written ends the
store: whoever waits is woken and told, and so is everybody after.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .access import Key
from .errors import OffloadError, named
from .header import Slab
from .source import IO, Source

if TYPE_CHECKING:
    from .file import SlabFile

DEADLINE_S = 30.0
CLOSE_S = 5.0

Landing = Callable[[int, int], AbstractContextManager[memoryview]]
"""Of a slot and a number of bytes: memory for a read; its bytes go on to the slot once the block ends well."""


@dataclass
class Entry:
    """What one access cost. The clock is that of the host.

    ``stall_ns``: how long the computing thread waited for reads; for copies to a device the device waits, and that is
    in no figure here. ``bytes_read``, ``reads`` and ``read_ns`` are of the reads that this access began, prefetches
    included, whenever they end; ``cancelled`` were given up before they began. ``late``: experts brought ahead that had
    to be waited for nevertheless.
    """

    stall_ns: int = 0
    bytes_read: int = 0
    reads: int = 0
    read_ns: int = 0
    late: int = 0
    cancelled: int = 0


@dataclass(eq=False)
class Ticket:
    """One read: which slab, into which slot, and how far it is."""

    key: Key
    form: str
    slab: Slab
    slot: int
    entry: Entry
    urgent: bool
    state: Literal["queued", "running", "done", "failed", "cancelled"] = "queued"
    began_ns: int = 0

    @property
    def name(self) -> str:
        """How it is called in messages."""
        return named(self.key, self.form)


class Readers:
    """``threads`` threads that read slabs of ``file`` into slots; ``landing`` says where a slot's bytes arrive."""

    def __init__(
        self, file: SlabFile, landing: Landing, io: IO = "direct", threads: int = 1, deadline_s: float = DEADLINE_S
    ) -> None:
        if threads < 1:
            raise OffloadError(f"readers={threads} threads read nothing; give at least one.")
        self.file, self.deadline_s = file, deadline_s
        self._landing, self._source = landing, Source(file, io)
        self._failure: OffloadError | None = None
        self._closing = False
        self._queue: list[tuple[bool, int, Ticket]] = []
        self._count = 0
        self._running: set[Ticket] = set()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name=f"slabs-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    # What the computing thread calls

    def submit(self, key: Key, form: str, slot: int, urgent: bool, entry: Entry) -> Ticket:
        """Queue a read; an urgent one goes before all that are not."""
        ticket = Ticket(key, form, self.file.slab(key, form), slot, entry, urgent)
        with self._changed:
            self._push(ticket)
        return ticket

    def hurry(self, ticket: Ticket) -> None:
        """Make a queued read urgent."""
        with self._changed:
            if ticket.state == "queued" and not ticket.urgent:
                ticket.urgent = True
                self._push(ticket)  # its other place in the queue is skipped later

    def cancel(self, ticket: Ticket) -> bool:
        """Give up a read that has not begun; return whether nothing is or will be written to its slot."""
        with self._changed:
            if ticket.state == "queued":
                ticket.state = "cancelled"
                ticket.entry.cancelled += 1
            return ticket.state != "running"

    def wait(self, ticket: Ticket) -> None:
        """Return when a read is done.

        Raises:
            OffloadError: this one or any other failed, or is not done by the deadline.
        """
        with self._changed:
            while True:
                self._raise_failure()
                if ticket.state == "done":
                    return
                if self._closing:
                    raise OffloadError(f"{ticket.name} was waited for in a closed store; open another.")
                self._changed.wait(self._patience())

    def check(self) -> None:
        """Raise the OffloadError that ended this store, if any."""
        with self._changed:
            if self._closing:
                raise OffloadError(f"the store of {self.file.path} is closed; open another.")
            self._raise_failure()

    def fail(self, failure: OffloadError) -> None:
        """End the store: from now on every wait and every check raises this."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def close(self) -> None:
        """End all threads; reads that have not begun are given up."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(CLOSE_S)
        if not any(thread.is_alive() for thread in self._threads):  # one that hangs in a read still needs it
            self._source.close()

    # Under the lock

    def _push(self, ticket: Ticket) -> None:
        self._count += 1
        heapq.heappush(self._queue, (not ticket.urgent, self._count, ticket))
        self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise OffloadError(str(self._failure)) from self._failure

    def _patience(self) -> float:
        """Return how long the oldest running read may still take; end the store where it took too long."""
        oldest = min(self._running, key=lambda ticket: ticket.began_ns, default=None)
        if oldest is None:
            return self.deadline_s  # one may begin, and hang, meanwhile
        left = self.deadline_s - (time.perf_counter_ns() - oldest.began_ns) / 1e9
        if left <= 0:
            self._failure = OffloadError(
                f"reading {oldest.name} from {self.file.path} takes longer than {self.deadline_s:g} s; see whether the "
                "disk is healthy, or give the store a longer deadline."
            )
            self._raise_failure()
        return left

    # In a reader thread

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            failure: OffloadError | None = None
            try:
                self._read(ticket)
            except OffloadError as error:
                failure = error
            except Exception as error:  # whatever it is, the one who waits is told instead of hanging
                failure = OffloadError(f"reading {ticket.name} failed ({type(error).__name__}: {error}); report this.")
                failure.__cause__ = error
            self._end(ticket, failure)

    def _next(self) -> Ticket | None:
        with self._changed:
            while not self._closing:
                if self._failure is None and self._queue:
                    ticket = heapq.heappop(self._queue)[2]
                    if ticket.state != "queued":
                        continue
                    ticket.state, ticket.began_ns = "running", time.perf_counter_ns()
                    self._running.add(ticket)
                    return ticket
                self._changed.wait()
            return None

    def _end(self, ticket: Ticket, failure: OffloadError | None) -> None:
        with self._changed:
            self._running.discard(ticket)
            ticket.state = "failed" if failure else "done"
            self._failure = self._failure or failure
            if failure is None:
                ticket.entry.read_ns += time.perf_counter_ns() - ticket.began_ns
                ticket.entry.bytes_read += ticket.slab.nbytes
                ticket.entry.reads += 1
            self._changed.notify_all()

    def _read(self, ticket: Ticket) -> None:
        with self._landing(ticket.slot, ticket.slab.nbytes) as target:
            self._source.read(ticket.slab, target, ticket.name)
