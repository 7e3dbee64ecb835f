"""What things cost here, measured before anything is predicted: a step with all experts at hand, and bringing one.

Imported by workers only.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...backends.offload.access import Access, How, Key, Moment
from ...backends.offload.cache import Cache
from ...backends.offload.file import SlabFile
from ...backends.offload.names import make_policy
from ...backends.offload.reader import IO
from ...backends.offload.store import SlotStore
from ...contracts import LayerSpec
from ...moe.experts import ExpertStore
from .in_memory import InMemory, session_in_memory
from .recording import Recording
from .stacks import Stack

STEPS = 12
"""Steps whose median is the time of a step; the first is not timed."""

LOADS = 24
"""Experts whose median is the time to bring one."""


@dataclass(frozen=True)
class Probes:
    """Seconds: of a step with every expert at hand, and of bringing one, by form."""

    step_s: float
    load_s: Mapping[str, float]


def step_seconds(
    stack: Stack, recording: Recording, specs: Mapping[int, LayerSpec], stores: Mapping[int, ExpertStore]
) -> float:
    """Return the median time of a step in which no expert is missing, the bookkeeping of a cache included."""
    cache = Cache(make_policy("lru"), recording.layout.size, recording.layout)
    session = session_in_memory(InMemory(stores, {}, cache), specs)
    stack.layers.serve_by(session)
    stack.layers.hint = None
    stack.begin()
    times = []
    for step in range(min(STEPS, recording.steps)):
        began = time.perf_counter()
        stack.step(step)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)


class _Low:
    """Has every missing expert brought in few bits."""

    def decide(self, missing: Sequence[Key], moment: Moment) -> dict[Key, How]:
        """Say so of all."""
        return dict.fromkeys(missing, "low")


def load_seconds(file: SlabFile, io: IO, readers: int, form: str) -> float:
    """Return the median time that the computing thread waits for one expert that is missing, in ``form``."""
    keys = file.layout.keys()
    chosen = random.Random(0).sample(keys, min(LOADS, len(keys)))
    cache = Cache(make_policy("lru"), 1, file.layout, execution=_Low() if form == "low" else None)
    with SlotStore(file, cache, io=io, readers=readers) as store:
        return statistics.median(_load(store, place, key) for place, key in enumerate(chosen))


def _load(store: SlotStore, place: int, key: Key) -> float:
    layer, expert = key
    began = time.perf_counter()
    for _ in store.serve(Access(place, layer, (expert,), (1,), (1.0,))):
        pass
    return time.perf_counter() - began
