"""Experts in memory that are handed out as a cache decides: the oracle of executions that change the result.

Imported by workers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...backends.offload.access import Access, Event
from ...backends.offload.asking import Asking
from ...backends.offload.cache import Cache
from ...backends.offload.executor import Facts, OffloadExecutor
from ...backends.offload.host import Cost
from ...backends.offload.session import OffloadSession
from ...backends.offload.store import Served
from ...backends.rules import act_bits
from ...contracts import ExecutedPath, LayerSpec
from ...moe.experts import ExpertStore


class InMemory:
    """A store whose experts are all at hand, and come in few bits where the cache says so."""

    def __init__(self, full: Mapping[int, ExpertStore], low: Mapping[int, ExpertStore], cache: Cache) -> None:
        self.full, self.low, self.cache = full, low, cache
        self.log: list[list[Event]] = []
        self.ledger: list[Any] = []

    def serve(self, access: Access) -> Iterator[Served]:
        """Yield every expert of an access."""
        self.log.append(self.cache.access(access))
        self.ledger.append(Cost())  # memory costs nothing
        for event in self.log[-1]:
            if event.kind != "prefetch":
                layer, expert = event.key
                store = (self.low if event.how == "low" else self.full)[layer]
                yield Served(event.key, store.gate_up[expert], store.down[expert], event)

    def deferred(self) -> Iterator[Served]:
        """Yield nothing: no access leaves anything out."""
        return iter(())

    def resident_bytes(self) -> int:
        """Return the bytes of all experts."""
        return sum(store.nbytes for stores in (self.full, self.low) for store in stores.values())

    def close(self) -> None:
        """Nothing to free."""


def session_in_memory(store: InMemory, specs: Mapping[int, LayerSpec]) -> OffloadSession:
    """Return a session whose experts are all in memory."""
    asking = Asking(store.cache.layout, store)
    executors = {}
    for layer, spec in specs.items():
        own = store.full[layer]
        facts = Facts(spec.kinds, own.activation, own.gated, own.sparsity, act_bits(spec))
        executors[layer] = OffloadExecutor(layer, facts, spec, asking)
    return OffloadSession(executors, ExecutedPath("dense"), asking)
