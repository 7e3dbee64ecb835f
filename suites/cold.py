"""Cold weights: how many copies of a layer are rotated, and which cases share them. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import replace

from ..contracts import Case, Choice, LayerSpec, make_key

COLD_FACTOR = 1.2
"""Cold weights are rotated through this many times the last-level cache."""


def rotated(case: Case) -> bool:
    """Whether copies of the weights are rotated for the case; on a GPU its L2 is overwritten before each call."""
    return case.residency == "cold" and case.device == "cpu"


def touched_share(spec: LayerSpec) -> float:
    """Return the least share of a layer's expert weights that a call must read: what one token's experts hold, and of
    that what their sparsity keeps, whether the case's backend skips the rest or not."""
    k = spec.max_k if set(spec.kinds) == {"ffn"} else 1
    return min(1.0, k / max(1, spec.ffn_experts)) * kept_share(spec)


def kept_share(spec: LayerSpec) -> float:
    """Return the share of an expert's weights behind the channels that its sparsity keeps at its level.

    Channels of the input are columns of gate and up, neurons columns of down; those of the gate are rows of up as well.
    """
    if spec.sparsity is None or not spec.sparsity.sites:
        return 1.0
    kept = dict.fromkeys(spec.sparsity.sites, 1.0 - spec.sparsity.level)
    of_input, of_gate = kept.get("input", 1.0), kept.get("gate", 1.0)
    of_down = min(of_gate, kept.get("hidden", 1.0))
    of_up = of_gate if "gate" in kept else of_input
    parts = (of_input, of_up, of_down) if spec.gated else (of_input, of_down)
    return sum(parts) / len(parts)


def copies_key(case: Case, spec: LayerSpec) -> str:
    """Return the identity of the weights that a case's copies hold; activation sparsity is beside the weights."""
    masked = spec.sparsity is not None and spec.sparsity.masked_weights
    return make_key([(case if masked else replace(case, sparsity=Choice("none"))).method_key, case.dtype])


def cold_copies(cache_bytes: float, layer_bytes: float, share: float) -> int:
    """Return how many copies of a layer must be rotated so that no weight is found in the last-level cache.

    Between two calls of one copy the others read ``share`` of each at least, and that must pass the cache.
    """
    return max(2, math.ceil(COLD_FACTOR * cache_bytes / (layer_bytes * share)) + 1)
