"""The codecs of this package by name: what encodes a weight, and what rebuilds it from its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...contracts import MoebenchError, Scheme, unknown
from ..channel_stats import ChannelStats
from . import codebook, gguf, microscaling, ternary
from .tensor import BlockTensor

Encoder = Callable[[Tensor, Scheme, ChannelStats | None], BlockTensor]

CODECS: Mapping[str, tuple[Encoder, type[BlockTensor]]] = {
    "nf4": (codebook.encode, codebook.CodebookTensor),
    "fp4": (codebook.encode, codebook.CodebookTensor),
    "mxfp4": (microscaling.encode_mxfp4, microscaling.Mxfp4Tensor),
    "nvfp4": (microscaling.encode_nvfp4, microscaling.Nvfp4Tensor),
    "fp8_e4m3": (microscaling.encode_fp8, microscaling.Fp8Tensor),
    "fp8_e5m2": (microscaling.encode_fp8, microscaling.Fp8Tensor),
    "ternary": (ternary.encode_ternary, ternary.TernaryTensor),
    "binary": (ternary.encode_binary, ternary.BinaryTensor),
}
"""Every codec but the GGUF types, whose names begin with ``gguf_``."""


def _codec(name: str) -> tuple[Encoder, type[BlockTensor]]:
    if name.startswith("gguf_"):
        return gguf.encode, gguf.GgufTensor
    if name not in CODECS:
        raise MoebenchError(unknown("block codec", name, CODECS))
    return CODECS[name]


def encode(weight: Tensor, scheme: Scheme, stats: ChannelStats | None = None) -> BlockTensor:
    """Return ``weight`` [out, in] in the codec that ``scheme`` names; raises what its encoder raises."""
    return _codec(scheme.codec)[0](weight, scheme, stats)


def is_own(weight: Any) -> bool:
    """Whether ``tensor_of`` makes this matrix again of its parts."""
    codec = weight.scheme.codec
    return (codec in CODECS or codec.startswith("gguf_")) and type(weight) is _codec(codec)[1]


def tensor_of(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> BlockTensor:
    """Return the matrix whose ``parts()`` these are."""
    return _codec(scheme.codec)[1].of(parts, scheme, shape)
