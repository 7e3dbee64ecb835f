"""From a trace to what a cache of experts is asked for, with the hints that belong to it. Imports no torch.

Hints are what a driver of the model expects to be asked for next. They are a trace of their own, with the same columns:
its rows say which experts were expected of ``layer`` at ``step``, with which weight, before that layer was reached,
while the recorded layer before it was served.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ...backends.offload.access import Access, Key, Layout
from ..trace import Trace, TraceError

Place = tuple[int, int]
"""(step, decoder layer)."""

Hint = tuple[Key, float]


def layout_of(trace: Trace, experts: int | None = None) -> Layout:
    """Return the layers of a trace, and how many experts each has: ``experts``, or those up to the largest id."""
    largest = max(entries.most_expert for entries in trace.by_place.values())
    if experts is None:
        return Layout(trace.layers, largest + 1)
    if largest >= experts:
        raise TraceError(f"the trace asks for expert {largest} where a layer has {experts}; give the model's number.")
    return Layout(trace.layers, experts)


def accesses_of(trace: Trace, layers: Collection[int] | None = None, hints: Trace | None = None) -> list[Access]:
    """Return what ``layers`` of a trace (all, where None) ask for: step by step, each layer in its order.

    An access has the distinct experts of its layer, how many tokens each has and the sum of their weights, added in the
    order of tokens. A layer without assignments at a step asks for nothing. ``hints`` go to the access of the layer
    before the one that they speak of, the surest first, equal ones by key; those whose two layers are not both among
    ``layers`` are left out, as are those of the first layer, before which no layer of the same step is served.
    """
    wanted = trace.layers if layers is None else tuple(sorted(layers))
    unknown = sorted(set(wanted) - set(trace.layers))
    if unknown:
        told = ", ".join(map(str, trace.layers))
        raise TraceError(f"the trace has nothing of layer {unknown[0]}; choose among its layers {told}.")
    told_of = {} if hints is None else _hints_by_access(trace, hints, set(wanted))
    return [
        Access(step, layer, experts, tokens, weights, told_of.get((step, layer), ()))
        for (step, layer), experts, tokens, weights in _summed(trace, set(wanted))
    ]


def _summed(
    trace: Trace, layers: set[int]
) -> Iterator[tuple[Place, tuple[int, ...], tuple[int, ...], tuple[float, ...]]]:
    """Yield every place in order with its distinct experts, their tokens and the sums of their weights."""
    import numpy as np

    places = [place for place in sorted(trace.by_place) if place[1] in layers]
    if not places:
        return
    parts = [trace.by_place[place] for place in places]
    place_N = np.repeat(np.arange(len(parts)), [len(part.expert_N) for part in parts])
    expert_N = np.concatenate([part.expert_N for part in parts])
    weight_N = np.concatenate([part.weight_N for part in parts])
    width = int(expert_N.max()) + 1
    pair_U, inverse_N = np.unique(place_N * width + expert_N, return_inverse=True)
    tokens = np.bincount(inverse_N).tolist()
    weights = np.bincount(inverse_N, weights=weight_N).tolist()
    experts = (pair_U % width).tolist()
    ends = np.searchsorted(pair_U, np.arange(1, len(parts) + 1) * width).tolist()
    start = 0
    for place, end in zip(places, ends, strict=True):
        yield place, tuple(experts[start:end]), tuple(tokens[start:end]), tuple(weights[start:end])
        start = end


def _hints_by_access(trace: Trace, hints: Trace, layers: set[int]) -> dict[Place, tuple[Hint, ...]]:
    """Return the hints by the place of the access that carries them."""
    before = dict(zip(trace.layers[1:], trace.layers, strict=False))
    strange = sorted(set(hints.layers) - set(before))
    if hints.steps != trace.steps or strange:
        what = f"speak of layer {strange[0]}" if strange else f"have {hints.steps} steps where it has {trace.steps}"
        raise TraceError(f"these hints are not those of the trace: they {what}; record both again.")
    carried = {}
    for (step, layer), experts, _, weights in _summed(hints, {own for own in layers if before.get(own) in layers}):
        told = [((layer, expert), weight) for expert, weight in zip(experts, weights, strict=True)]
        carried[step, before[layer]] = tuple(sorted(told, key=lambda hint: (-hint[1], hint[0])))
    return carried
