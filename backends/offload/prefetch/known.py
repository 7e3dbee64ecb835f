"""Prefetchers that are told who comes: by the model's own gates, by routing decided ahead, or by a recorded run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..access import Access, Key, Moment


def keys_of(accesses: Iterable[Access]) -> list[Key]:
    """Return the keys of accesses in their order, each once; within an access those of the most weight first."""
    keys: dict[Key, None] = {}
    for access in accesses:
        ranked = sorted(zip(access.keys, map(abs, access.weights), strict=True), key=lambda one: (-one[1], one[0]))
        keys.update(dict.fromkeys(key for key, _ in ranked))
    return list(keys)


class Gate:
    """Brings what the driver of the model expects: the next layer's gate, applied to this layer's input.

    mixtral-offloading (arXiv 2312.17238) speculates so: hidden states change little from a layer to the next.
    """

    needs_future = False

    def propose(self, moment: Moment) -> Sequence[Key]:
        """Return the hints of the access, the surest first, each key once."""
        ranked = sorted(moment.access.hints, key=lambda hint: (-hint[1], hint[0]))
        return list(dict.fromkeys(key for key, _ in ranked))


class Pregate:
    """Brings exactly what the next ``layers`` layers of the same step ask for (Read-ME, NeurIPS 2024).

    True only of a model whose routing is decided before its layers run, as by Read-ME's pre-gating router; of any other
    it is a bound.
    """

    needs_future = True

    def __init__(self, layers: int = 1) -> None:
        if layers < 1:
            raise ValueError(f"layers={layers} must be at least 1.")
        self.layers = layers

    def propose(self, moment: Moment) -> Sequence[Key]:
        """Return the keys of the accesses that follow within this step."""
        following = moment.foreseen.after(moment.now, self.layers)
        return keys_of(access for access in following if access.step == moment.access.step)


class Oracle:
    """Brings exactly what the next ``accesses`` accesses ask for: a bound on what any prefetcher can do."""

    needs_future = True

    def __init__(self, accesses: int = 1) -> None:
        if accesses < 1:
            raise ValueError(f"accesses={accesses} must be at least 1.")
        self.accesses = accesses

    def propose(self, moment: Moment) -> Sequence[Key]:
        """Return the keys of the accesses that follow."""
        return keys_of(moment.foreseen.after(moment.now, self.accesses))
