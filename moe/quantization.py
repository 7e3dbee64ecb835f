"""Quantization of a layer's experts as a step of a recipe: a codec for all of them, or one number of bits for each.

Codecs are in ``codecs`` (integers with scales) and ``blocks`` (floats, codebooks, blocks); ``bits`` allocates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..contracts import MoebenchError, Scheme
from .bits.calibration import LayerCalibration, calibrate
from .bits.params import LayerBits
from .blocks import codecs as blocks
from .blocks.tensor import BlockTensor
from .channel_stats import ChannelStats
from .codecs import awq, gptq, hqq, rtn
from .codecs.awq import AwqTensor
from .codecs.grid import check_group
from .codecs.integer import IntTensor
from .experts import ExpertStore, QTensor
from .layer import SharedExpert
from .router import Router
from .routing import Context

Encoder = Callable[[Tensor, ChannelStats | None], QTensor]
"""From a weight [out, in] and the statistics of what it reads to its packed bytes."""

INTEGER: Mapping[str, Callable[[Tensor, Any, ChannelStats | None], QTensor]] = {
    "rtn": lambda weight, how, stats: rtn.round_to_nearest(weight, how.scheme()),
    "gptq": gptq.encode,
    "awq": awq.encode,
    "hqq": hqq.encode,
}
"""Codecs of integers with scales, by what encodes a weight with the codec's parameters."""

LOOK_AT_MOMENTS = ("gptq", "awq")
"""Codecs that read the second moments of what a matrix multiplies; others of our own leave statistics alone."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer reads in calibration, given to quantizations whose parameters say ``calibrated``.

    ``x_TH`` are float32 inputs rounded to the case's dtype, ``ctx`` what the router reads beside them, ``seed`` is of
    this layer alone. ``layer`` is its decoder index, ``shared`` its shared expert; ``bits`` is what a plan over several
    layers gave it.
    """

    router: Router
    x_TH: Tensor
    ctx: Context
    seed: int
    layer: int = 0
    shared: SharedExpert | None = None
    bits: LayerBits | None = None

    def calibration(self, store: ExpertStore, moments: bool = True) -> LayerCalibration:
        """Return the statistics of every expert, with second moments or without."""
        return calibrate(store, self.router, self.x_TH, self.ctx, moments)


QuantizationStep = Callable[[ExpertStore, Seen | None], ExpertStore]
"""From a layer's dense experts, and what they read where that is asked for, to their packed bytes."""


def keep(params: Any) -> QuantizationStep:
    """Quantization ``none``: the store as it is."""
    return lambda store, seen: store


def as_stored(params: Any) -> QuantizationStep:
    """Quantization ``file``: the bytes of the model's own file, neither decoded nor encoded again."""

    def step(store: ExpertStore, seen: Seen | None) -> ExpertStore:
        if store.stored is None:
            raise MoebenchError(
                "these experts are not the matrices of a model's file as they lie there; use model=gguf, a structure "
                "and a routing that leave its blocks whole, or quantization=none."
            )
        return replace(store, gate_up=store.stored.gate_up, down=store.stored.down, stored=None)

    return step


def coded(params: Any) -> QuantizationStep:
    """Every FFN expert in the codec and under the scheme of ``params``."""

    def step(store: ExpertStore, seen: Seen | None) -> ExpertStore:
        weights = dense_weights(store, params.scheme())
        known = None if seen is None else seen.calibration(store, params.scheme().codec in LOOK_AT_MOMENTS)
        return encoded(store, weights, [encoder(params)] * len(store.ffn_ids), known)

    return step


def dense_weights(store: ExpertStore, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return (gate_up, down) of all experts, stacked.

    Raises:
        ValueError: they are quantized already, or the groups of ``scheme`` do not divide both of their widths.
    """
    if not isinstance(store.gate_up, Tensor) or not isinstance(store.down, Tensor):
        raise ValueError("the experts are quantized already; quantize once, from dense weights.")
    check_group(scheme.group, store.gate_up.shape[2], store.down.shape[2])
    return store.gate_up, store.down


def encoder(params: Any) -> Encoder:
    """Return what encodes one matrix; ``params`` has ``scheme()``, whose codec is looked up."""
    scheme: Scheme = params.scheme()
    if scheme.codec in INTEGER:
        encode = INTEGER[scheme.codec]
        return lambda weight, stats: encode(weight, params, stats)
    return lambda weight, stats: blocks.encode(weight, scheme, stats)


def encoded(
    store: ExpertStore, weights: tuple[Tensor, Tensor], encoders: Sequence[Encoder], known: LayerCalibration | None
) -> ExpertStore:
    """Return ``store`` with (gate_up, down) of each expert in the bytes that its encoder makes of ``weights``."""
    untold: tuple[None, ...] = (None,) * len(encoders)
    told = (untold, untold) if known is None else (known.gate_up, known.down)
    gate_up, down = (
        tuple(encode(weight, stats) for encode, weight, stats in zip(encoders, matrices, matrix_stats, strict=True))
        for matrices, matrix_stats in zip(weights, told, strict=True)
    )
    return replace(store, gate_up=gate_up, down=down)


def tensor_of(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    """Return the matrix whose ``parts()`` these are."""
    if scheme.codec not in INTEGER:
        return blocks.tensor_of(parts, scheme, shape)
    return _integer_type(scheme.codec).of(parts, scheme, shape)


def parts_of(weight: QTensor) -> dict[str, Tensor] | None:
    """Return what ``tensor_of`` makes this matrix of again; None of a plug-in's own codes, or codec."""
    codec = weight.scheme.codec
    own = type(weight) is _integer_type(codec) if codec in INTEGER else blocks.is_own(weight)
    return weight.parts() if own and isinstance(weight, IntTensor | AwqTensor | BlockTensor) else None


def _integer_type(codec: str) -> type[IntTensor] | type[AwqTensor]:
    return AwqTensor if codec == "awq" else IntTensor
