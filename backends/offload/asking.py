"""What the layers of a session share when they ask for experts: the count of steps, hints, and what is owed later.

Imports no torch at module level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...contracts import MoebenchError
from .access import Access, Event, Key, Layout

if TYPE_CHECKING:
    from torch import Tensor


class Served(Protocol):
    """An expert as a store hands it out: dense, quantized, or packed where it is computed where it lies."""

    @property
    def key(self) -> Key:
        """(layer, expert)."""

    @property
    def gate_up(self) -> Any:
        """[2F, H], or [F, H] without a gate."""

    @property
    def down(self) -> Any:
        """[H, F]."""

    @property
    def event(self) -> Event:
        """What the cache did about it."""


class Store(Protocol):
    """Brings experts: from a file (``SlotStore``), or from their packed form in memory (``HostStore``)."""

    @property
    def log(self) -> Sequence[Sequence[Event]]:
        """The events of every access."""

    @property
    def ledger(self) -> Sequence[Any]:
        """What every access cost: ``stall_ns``, ``bytes_read``, ``late``, ``read_ns``."""

    @property
    def close(self) -> Callable[[], object]:
        """Let go of memory, files and threads."""

    def serve(self, access: Access) -> Iterator[Served]:
        """Yield every expert of ``access``: those that are there first; good until the next one is asked for."""

    def resident_bytes(self) -> int:
        """Return the bytes held in memory."""


class Owed(NamedTuple):
    """The weighted output of an expert, to be added one layer later: rows ``out_NH`` of tokens ``token_N`` of T."""

    token_N: Tensor
    out_NH: Tensor
    tokens: int


@dataclass
class Asking:
    """Turns what executors are asked for into accesses, in the order in which they come.

    A step begins when a layer is asked for that is not later than the one before. Hints go with the next access;
    ``on_access`` sees every access before it is served.
    """

    layout: Layout
    store: Store
    on_access: Callable[[Access], None] | None = None

    def __post_init__(self) -> None:
        self._place = {layer: place for place, layer in enumerate(self.layout.layers)}
        self._step, self._last = 0, -1
        self._hints: list[tuple[Key, float]] = []
        self._owed: list[Owed] = []

    def hint(self, layer: int, experts: Iterable[int], priority: float) -> None:
        """Note that experts of ``layer`` are expected; those of layers that are not here are none of ours."""
        if layer in self._place:
            self._hints += [((layer, int(expert)), float(priority)) for expert in experts]

    def serve(self, layer: int, offsets: Sequence[int], weights: Sequence[float]) -> Iterator[Served]:
        """Yield the experts that have assignments; ``offsets`` [E + 1] say which, each with its gate weight.

        A call without any assignment asks for nothing and is no access.
        """
        self._begin(layer)
        spans = [(expert, offsets[expert], offsets[expert + 1]) for expert in range(len(offsets) - 1)]
        used = [(expert, start, stop) for expert, start, stop in spans if stop > start]
        if not used:
            return iter(())
        access = Access(
            self._step,
            layer,
            tuple(expert for expert, _, _ in used),
            tuple(stop - start for _, start, stop in used),
            tuple(math.fsum(weights[start:stop]) for _, start, stop in used),
            tuple(self._hints),
        )
        self._hints = []
        if self.on_access is not None:
            self.on_access(access)
        return self.store.serve(access)

    def _begin(self, layer: int) -> None:
        place = self._place[layer]
        if self._owed and place != self._last + 1:
            late = self.layout.layers[self._last]
            raise MoebenchError(
                f"layer {layer} was called where the layer after {late} must add what that one deferred; call all "
                f"layers in their order, or use execution=fetch."
            )
        if place <= self._last:
            self._step += 1
        self._last = place

    def may_defer(self, layer: int) -> bool:
        """Return whether a layer comes after this one in its step."""
        return self._place[layer] + 1 < len(self.layout.layers)

    def owe(self, owed: Sequence[Owed]) -> None:
        """Keep outputs for the next layer."""
        self._owed = list(owed)

    def settle(self, y_TH: Tensor) -> None:
        """Add to ``y_TH`` what the layer before owes."""
        for owed in self._owed:
            if owed.tokens != len(y_TH):
                raise MoebenchError(
                    f"{owed.tokens} tokens were deferred and this layer has {len(y_TH)}; use execution=fetch where "
                    f"layers have different tokens."
                )
            y_TH.index_add_(0, owed.token_N, owed.out_NH.to(y_TH.dtype))
        self._owed = []
