"""What things cost here, measured before anything is predicted: a step, an expert at hand, bringing one.

Imported by workers only. Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...backends.offload.access import Access, How, Key, Moment
from ...backends.offload.cache import Cache
from ...backends.offload.costs import Curve, ExpertCosts
from ...backends.offload.file import SlabFile
from ...backends.offload.names import make_policy
from ...backends.offload.session import OffloadSession
from ...backends.offload.source import IO
from ...backends.offload.store import SlotStore
from ...backends.offload.timeline import TierCosts
from ...contracts import LayerSpec
from ...moe.experts import ExpertStore
from ..subject import DTYPES
from .in_memory import InMemory, session_in_memory
from .recording import Recording
from .stacks import Stack

STEPS = 12
"""Steps whose median is the time of a step; the first is not timed."""

SAMPLES = 24
"""Experts whose median is the time to compute or to bring one."""


@dataclass(frozen=True)
class Probes:
    """Seconds: of a step with every expert at hand, of an expert over its tokens, and of bringing one, by form.

    ``host`` are the costs of a tier in RAM, None for one on a disk.
    """

    step_s: float
    expert: Curve
    load_s: Mapping[str, float]
    host: ExpertCosts | None = None

    def tiers(self, recording: Recording, slab_bytes: Mapping[str, int], readers: int, staging: int) -> TierCosts:
        """Return the costs of the two-tier model; what a step takes beside its experts is the same in all layers."""
        decoded = recording.accesses[recording.prompt_accesses :]
        layers = len(recording.layout.layers)
        experts = sum(self.expert(tokens) for access in decoded for tokens in access.tokens) / recording.steps
        full, low = slab_bytes["full"], slab_bytes.get("low", 0)
        points = {low: self.load_s.get("low", 0.0), full: self.load_s["full"]} if low else {full: self.load_s["full"]}
        return TierCosts(
            other=max(0.0, self.step_s - experts) / layers,
            fast=self.expert,
            load=Curve(tuple(sorted(points.items()))),
            slab_bytes=full,
            readers=readers,
            staging=staging,
            in_place=None if self.host is None else self.host.in_place,
            low=self.expert,
            low_bytes=low,
        )


def all_at_hand(
    recording: Recording, specs: Mapping[int, LayerSpec], stores: Mapping[int, ExpertStore]
) -> OffloadSession:
    """Return a session whose cache holds every expert."""
    cache = Cache(make_policy("lru"), recording.layout.size, recording.layout)
    return session_in_memory(InMemory(stores, {}, cache), specs)


def step_seconds(stack: Stack, recording: Recording, session: OffloadSession, hints: bool) -> float:
    """Return the median time of a step of a session in which no expert is missing, with hints given or not."""
    stack.layers.serve_by(session)
    stack.layers.hint = session.hint if hints else None
    stack.begin()
    return _median([partial(stack.step, step) for step in range(min(STEPS, recording.steps))])


def expert_seconds(recording: Recording, spec: LayerSpec, session: OffloadSession) -> Curve:
    """Return the median time of one expert that is at hand, over its tokens."""
    most = max(max(access.tokens) for access in recording.accesses)
    numbers = sorted({min(2**power, most) for power in range(most.bit_length() + 1)})
    x_TH = torch.randn(most, spec.hidden, generator=torch.Generator().manual_seed(0)).to(DTYPES[spec.dtype])
    some = _some(recording.layout.keys())

    def seconds(number: int) -> float:
        return _median([_one_expert(session.layer(layer), expert, x_TH[:number]) for layer, expert in some])

    return Curve(tuple((number, seconds(number)) for number in numbers))


def _one_expert(executor: Callable[..., object], expert: int, x_TH: torch.Tensor) -> Callable[[], object]:
    indices_T1 = torch.full((len(x_TH), 1), expert)
    return lambda: executor(x_TH, indices_T1, torch.ones(len(x_TH), 1), out_TH=None)


class _Low:
    """Has every missing expert brought in few bits."""

    def decide(self, missing: Sequence[Key], moment: Moment) -> dict[Key, How]:
        """Say so of all."""
        return dict.fromkeys(missing, "low")


def load_seconds(file: SlabFile, io: IO, readers: int, form: str) -> float:
    """Return the median time that the computing thread waits for one expert that is missing, in ``form``."""
    cache = Cache(make_policy("lru"), 1, file.layout, execution=_Low() if form == "low" else None)

    def load(place: int, key: Key) -> None:
        for _ in store.serve(Access(place, key[0], (key[1],), (1,), (1.0,))):
            pass

    with SlotStore(file, cache, io=io, readers=readers) as store:
        return _median([partial(load, *one) for one in enumerate(_some(file.layout.keys()))])


def _some(keys: Sequence[Key]) -> list[Key]:
    return random.Random(0).sample(keys, min(SAMPLES, len(keys)))


def _median(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time of the calls; the first is not timed where there are others."""
    times = []
    for call in calls:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)
