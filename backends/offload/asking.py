"""What the layers of a session share when they ask for experts: the count of steps, hints, and what is owed later.

Imports no torch at module level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        """Yield every expert of ``access``: those that are there first; good until the next one is asked for.

        It may leave out deferred ones, but for those of the last layer: ``deferred`` then yields them.
        """

    def deferred(self) -> Iterator[Served]:
        """Yield what the access before left out; asked for before the next access, and only if something was."""

    def resident_bytes(self) -> int:
        """Return the bytes held in memory."""


class Owed(NamedTuple):
    """What a deferred expert adds one layer later to the rows ``token_N`` of ``tokens``.

    That is ``out_NH``, or where the store left the expert out, ``output(served)`` once it is there.
    """

    token_N: Tensor
    tokens: int
    out_NH: Tensor | None = None
    output: Callable[[Served], Tensor] | None = None


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
        self._owed: dict[Key, Owed] = {}
        self.places: list[tuple[int, int]] = []
        """(step, layer) of every access."""

    def hint(self, layer: int, experts: Iterable[int], priority: float) -> None:
        """Note that experts of ``layer`` are expected; layers and experts that are not here are none of ours."""
        if layer in self._place:
            ids = [int(expert) for expert in experts]
            self._hints += [((layer, one), float(priority)) for one in ids if 0 <= one < self.layout.experts]

    def begin(self, layer: int, y_TH: Tensor) -> None:
        """Note that ``layer`` is called, and add to its output what the layer before it deferred."""
        place = self._place[layer]
        if self._owed:
            self._settle(layer, place, y_TH)
        if place <= self._last:
            self._step += 1
        self._last = place

    def serve(self, layer: int, offsets: Sequence[int], weights: Sequence[float]) -> Iterator[Served]:
        """Yield the experts that have assignments; ``offsets`` [E + 1] say which, each with its gate weight.

        A call without any assignment asks for nothing and is no access. Nothing is deferred by a step's last layer.
        """
        spans = [(expert, offsets[expert], offsets[expert + 1]) for expert in range(len(offsets) - 1)]
        used = [(expert, start, stop) for expert, start, stop in spans if stop > start]
        if not used:
            return
        access = Access(
            self._step,
            layer,
            tuple(expert for expert, _, _ in used),
            tuple(stop - start for _, start, stop in used),
            tuple(math.fsum(weights[start:stop]) for _, start, stop in used),
            tuple(self._hints),
        )
        self._hints = []
        self.places.append((self._step, layer))
        if self.on_access is not None:
            self.on_access(access)
        yield from self.store.serve(access)

    def may_defer(self, layer: int) -> bool:
        """Return whether a layer comes after this one in its step."""
        return self._place[layer] + 1 < len(self.layout.layers)

    def owe(self, layer: int, owed: Mapping[int, Owed]) -> None:
        """Keep what the experts of ``layer`` will add to the next one."""
        self._owed = {(layer, expert): one for expert, one in owed.items()}

    def _settle(self, layer: int, place: int, y_TH: Tensor) -> None:
        late, tokens = self.layout.layers[self._last], next(iter(self._owed.values())).tokens
        if place != self._last + 1:
            raise MoebenchError(
                f"layer {layer} was called where the layer after {late} must add what that one deferred; call all "
                f"layers in their order, or use execution=fetch."
            )
        if tokens != len(y_TH):
            raise MoebenchError(
                f"layer {late} deferred experts of {tokens} tokens and layer {layer} has {len(y_TH)}; use "
                f"execution=fetch where layers have different tokens."
            )
        for token_N, out_NH in self._outputs():
            y_TH.index_add_(0, token_N, out_NH.to(y_TH.dtype))
        self._owed = {}

    def _outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (token_N, out_NH) of what is owed, first that of experts that were handed out at once."""
        for owed in self._owed.values():
            if owed.out_NH is not None:
                yield owed.token_N, owed.out_NH
        if any(owed.out_NH is None for owed in self._owed.values()):
            for served in self.store.deferred():
                owed = self._owed[served.key]
                if owed.output is None:
                    raise MoebenchError("an expert was handed out twice in one access; open a new session.")
                yield owed.token_N, owed.output(served)
