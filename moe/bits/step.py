"""Quantization ``mixed``: each expert of a layer in as many bits as an allocation gives it."""

from __future__ import annotations

from dataclasses import replace

from ..experts import ExpertStore
from ..quantization import LOOK_AT_MOMENTS, QuantizationStep, Seen, dense_weights, encoded, encoder
from ..routing import Context
from .mixed_params import Mixed
from .plan import plan_of
from .shared import Always, store_of
from .survey import survey


def mixed(params: Mixed) -> QuantizationStep:
    """Return the step that encodes each expert of a layer in its own bits: those of the plan over several layers, or
    what the rule gives it within the layer."""

    def step(store: ExpertStore, seen: Seen | None) -> ExpertStore:
        if seen is None:
            raise ValueError("bits are allocated by what experts read; calibrate the layer first.")
        if seen.bits is None and params.scope == "model":
            raise ValueError("scope=model spends one budget over layers; give the layer the bits of their plan.")
        weights = dense_weights(store, params.scheme())
        bits_E = _of_layer(params, store, seen) if seen.bits is None else seen.bits.experts
        known = seen.calibration(store, params.codec in LOOK_AT_MOMENTS)
        return encoded(store, weights, [encoder(params.at(bits)) for bits in bits_E], known)

    return step


def _of_layer(params: Mixed, store: ExpertStore, seen: Seen) -> tuple[int, ...]:
    """Return the bits of each expert within the layer's own budget; experts protected elsewhere are not its concern."""
    own = replace(params, protected=tuple(pair for pair in params.protected if pair[0] == seen.layer))
    return plan_of(own, [survey(own, store, seen)], seen.seed).layers[seen.layer].experts


def shared_step(params: Mixed, seen: Seen, bits: int) -> ExpertStore:
    """Return the bytes of the layer's shared expert in ``bits`` bits, calibrated on all tokens that it reads."""
    if seen.shared is None:
        raise ValueError(f"layer {seen.layer} has no shared expert; give shared=false.")
    store = store_of(seen.shared)
    known = replace(seen, router=Always(seen.shared), ctx=Context()).calibration(store, params.codec in LOOK_AT_MOMENTS)
    return encoded(store, dense_weights(store, params.scheme()), [encoder(params.at(bits))], known)
