"""A session whose experts lie in a slow tier: one store, one cache and one clock of accesses for all of its layers.

Imports no torch at module level.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...contracts import ExecutedPath
from ..session import Session
from .access import Event
from .asking import Asking
from .executor import OffloadExecutor

COSTS = ("stall_ns", "bytes_read", "late", "read_ns")
"""What a store's ledger says of an access."""


class OffloadSession(Session):
    """Layers that ask one store for their experts."""

    def __init__(
        self, executors: Mapping[int, OffloadExecutor], path: ExecutedPath, asking: Asking, reads_hints: bool = False
    ) -> None:
        super().__init__(executors, path)
        self.asking, self.store, self.reads_hints = asking, asking.store, reads_hints

    def hint(self, layer: int, experts: Any, priority: float) -> None:
        """Note that ``experts`` (ids) of ``layer`` are expected to be asked for; the next access carries it."""
        self.asking.hint(layer, experts, priority)

    def events(self) -> Sequence[Mapping[str, Any]]:
        """Return what the cache did and what it cost, one entry an access."""
        told = zip(self.asking.places, self.store.log, self.store.ledger, strict=False)  # what failed may have no log
        return [
            {"event": "access", "step": step, "layer": layer, **counted(events)}
            | {name: getattr(entry, name) for name in COSTS}
            for (step, layer), events, entry in told
        ]

    def resident_bytes(self) -> int:
        """Return the bytes held in memory: slots and staging buffers, not experts that lie in a file."""
        return self.store.resident_bytes()

    def close(self) -> None:
        """End the readers and let go of the memory; a second call does nothing."""
        super().close()
        self.store.close()


def counted(events: Iterable[Event]) -> dict[str, int]:
    """Return how many events there were of each kind, how many evictions, and what became of misses."""
    events = list(events)
    kinds = Counter(event.kind for event in events)
    how = Counter(event.how for event in events if event.kind == "miss")
    return {
        **{kind: kinds[kind] for kind in ("hit", "covered", "miss", "prefetch")},
        **{name: how[name] for name in ("in_place", "low", "deferred")},
        "evicted": sum(event.evicted is not None for event in events),
    }
