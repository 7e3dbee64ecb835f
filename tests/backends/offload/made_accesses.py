"""Accesses for tests of caching: hypothesis strategies, and traces of a known distribution."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import strategies as st

from moebench.backends.offload.access import Access, Layout


@st.composite
def traces(draw, layers=3, experts=5, accesses=24):
    """Return (accesses, layout): layers in turns ask for any experts; each access follows from a number."""
    layout = Layout(tuple(range(1, 1 + draw(st.integers(1, layers)))), draw(st.integers(1, experts)))
    numbers = draw(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=accesses))
    return [_numbered(place, number, layout) for place, number in enumerate(numbers)], layout


def _numbered(place, number, layout):
    """Return an access whose low bits say which experts are asked for."""
    step, layer = divmod(place, len(layout.layers))
    chosen = tuple(expert for expert in range(layout.experts) if number >> expert & 1) or (number % layout.experts,)
    tokens = tuple(1 + (number >> 5 + expert) % 4 for expert in chosen)
    weights = tuple((0.0, 0.25, 0.5, 1.0)[(number >> 7 + expert) % 4] for expert in chosen)
    keys = layout.keys()
    hints = ((keys[number // 3 % len(keys)], 0.5), (keys[number // 7 % len(keys)], 1.0))
    return Access(step, layout.layers[layer], chosen, tokens, weights, hints)


def independent(layout, k, alpha, steps, seed):
    """Return accesses of ``k`` distinct experts each, drawn anew at every step by Zipf's law of exponent ``alpha``."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, layout.experts + 1) ** alpha
    orders = {layer: generator.permutation(layout.experts) for layer in layout.layers}
    accesses = []
    for step in range(steps):
        for layer in layout.layers:
            drawn = generator.choice(layout.experts, k, replace=False, p=weights / weights.sum())
            accesses.append(_plain(step, layer, orders[layer][drawn]))
    return accesses


def switching(layout, k, steps, seed, stay=0.4, switch=0.05, domains=4):
    """Return accesses of a text whose subject switches: each has its own popular experts, and experts stay a while."""
    rng = random.Random(seed)
    orders = [
        {layer: rng.sample(range(layout.experts), layout.experts) for layer in layout.layers} for _ in range(domains)
    ]
    now: dict[int, list[int]] = {layer: [] for layer in layout.layers}
    domain, accesses = 0, []
    for step in range(steps):
        if rng.random() < switch:
            domain = rng.randrange(domains)
        for layer in layout.layers:
            chosen = {expert for expert in now[layer] if rng.random() < stay}
            while len(chosen) < k:
                rank = int(rng.paretovariate(0.5)) - 1
                chosen |= {orders[domain][layer][rank]} if rank < layout.experts else set()
            now[layer] = sorted(chosen)
            accesses.append(_plain(step, layer, now[layer]))
    return accesses


def subjects(layout, k, steps, seed, wide, length, number=6):
    """Return accesses of subjects that each use ``wide`` experts of a layer only, a new one every ``length`` steps."""
    rng = random.Random(seed)
    own = [{layer: rng.sample(range(layout.experts), wide) for layer in layout.layers} for _ in range(number)]
    now = [rng.randrange(number) for _ in range(steps // length + 1)]
    return [
        _plain(step, layer, rng.sample(own[now[step // length]][layer], k))
        for step in range(steps)
        for layer in layout.layers
    ]


def _plain(step, layer, experts):
    chosen = tuple(sorted(int(expert) for expert in experts))
    return Access(step, layer, chosen, (1,) * len(chosen), (1.0,) * len(chosen))
