"""About how long it takes to run a language model over some text: for plans, which no torch is loaded for."""

from __future__ import annotations

from ..moe.shapes import ModelShape

FLOPS = 2e10
"""What a core does a second with matrices of this size."""

STARTED = 20.0
"""Seconds to load a model."""


def model_seconds(shape: ModelShape, tokens: float, passes: float = 1.0) -> float:
    """Return the seconds of ``passes`` forward passes over ``tokens``: two operations for each weight of a token's
    layers, the head left out."""
    active = shape.width * (min(shape.top_k, shape.experts) or 1) + shape.shared_width
    weights = shape.layers * shape.hidden * (4 * shape.hidden + 3 * active)
    return STARTED + passes * tokens * 2 * weights / FLOPS
