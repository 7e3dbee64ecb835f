"""Quantization ``mixed``: each expert of a layer in as many bits as an allocation gives it.

Shape letters: E experts that own weights, B choices of bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..codecs.rtn import round_to_nearest
from ..experts import ExpertStore
from ..quantization import LOOK_AT_MOMENTS, QuantizationStep, Seen, dense_weights, encoded, encoder
from .allocate import Features, allocate
from .budget import Costs
from .calibration import LayerCalibration
from .mixed_params import Mixed
from .scores import expert_outlier_scores
from .sensitivity import sensitivities


def mixed(params: Mixed) -> QuantizationStep:
    """Return the step that allocates a layer's bits among its experts and encodes each."""

    def step(store: ExpertStore, seen: Seen | None) -> ExpertStore:
        if seen is None:
            raise ValueError("bits are allocated by what experts read; calibrate the layer first.")
        weights = dense_weights(store, params.scheme())
        known = seen.calibration(store, params.codec in LOOK_AT_MOMENTS)
        bits_E = allocated(params, weights, store, seen, known)
        return encoded(store, weights, [encoder(params.at(bits)) for bits in bits_E], known)

    return step


def allocated(
    params: Mixed, weights: tuple[Tensor, Tensor], store: ExpertStore, seen: Seen, known: LayerCalibration
) -> tuple[int, ...]:
    """Return the bits of each expert that owns weights; ``weights`` are those of ``store``, stacked."""
    shapes = [(int(matrices.shape[1]), int(matrices.shape[2])) for matrices in weights]
    costs = Costs.of([params.at(bits).scheme() for bits in params.bits], [shapes] * len(store.ffn_ids))
    return allocate(params.allocation(), costs, _features(params, store, seen, known), seen.seed)


def _features(params: Mixed, store: ExpertStore, seen: Seen, known: LayerCalibration) -> Features:
    """Return what the rule looks at, and nothing else: errors at every choice of bits take a pass over each."""
    errors = params.by in ("pmq", "greedy")
    return Features(
        layer_U=(0,) * len(store.ffn_ids),
        expert_U=tuple(range(len(store.ffn_ids))),
        count_U=_numbers(known.counts_E, store.ffn_ids),
        share_U=_numbers(known.share_E, store.ffn_ids),
        outlier_U=expert_outlier_scores(store) if params.by == "outlier" else None,
        error_UB=_errors(params, store, seen) if errors else None,
    )


def _numbers(values_E: Tensor, ids: Sequence[int]) -> tuple[float, ...]:
    return tuple(float(values_E[expert]) for expert in ids)


def _errors(params: Mixed, store: ExpertStore, seen: Seen) -> tuple[tuple[float, ...], ...]:
    """Return the error of the layer's output with one expert alone rounded to nearest, as MC-MoE measures it."""

    def rounded(weight: Tensor, bits: int) -> Tensor:
        return round_to_nearest(weight, params.at(bits).scheme()).dequantize()

    found_EB = sensitivities(store, seen.router, seen.x_TH, rounded, params.bits, seen.ctx)
    return tuple(tuple(row) for row in found_EB.tolist())
