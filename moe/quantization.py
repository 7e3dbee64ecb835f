"""Quantization of a layer's experts by rounding to nearest in 8, 4 or 2 bits. Codecs are in ``codecs``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..contracts import Scheme
from .codecs.grid import check_group
from .codecs.integer import IntTensor
from .codecs.packing import pack_codes
from .codecs.rtn import round_to_nearest
from .experts import ExpertStore, QTensor

__all__ = ["IntTensor", "keep", "pack_codes", "quantize", "rtn", "stack", "unstack"]


def quantize(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> IntTensor:
    """Return ``weight`` [out, in] rounded to nearest under ``scheme`` (8, 4 or 2 bits; ``codecs.rtn`` has the others).

    ``codecs.rtn.round_to_nearest`` says how large the error can be, and what ``scale_dtype`` does.
    """
    if scheme.bits not in (2, 4, 8):
        raise ValueError(f"{scheme.bits:g} bits cannot be packed; use 2, 4 or 8 here, or codec rtn for 1 to 8.")
    return round_to_nearest(weight, scheme, scale_dtype)


def keep(params: Any) -> Callable[[ExpertStore], ExpertStore]:
    """Quantization ``none``: the store as it is."""
    return lambda store: store


def rtn(params: Any) -> Callable[[ExpertStore], ExpertStore]:
    """Quantization ``int8``, ``int4`` and ``int2``: every FFN expert rounded to nearest under ``params.scheme()``."""
    scheme: Scheme = params.scheme()

    def quantized(store: ExpertStore) -> ExpertStore:
        if not isinstance(store.gate_up, Tensor) or not isinstance(store.down, Tensor):
            raise ValueError("the experts are quantized already; quantize once, from dense weights.")
        check_group(scheme.group, store.gate_up.shape[2], store.down.shape[2])
        return replace(
            store,
            gate_up=tuple(quantize(weight, scheme) for weight in store.gate_up),
            down=tuple(quantize(weight, scheme) for weight in store.down),
        )

    return quantized


def stack(weights: Sequence[QTensor]) -> dict[str, Tensor] | None:
    """Return codes, scales and zeros of equal IntTensors stacked over experts; None for anything else."""
    ints = [weight for weight in weights if isinstance(weight, IntTensor)]
    if not ints or len(ints) < len(weights) or len({(weight.scheme, weight.shape) for weight in ints}) > 1:
        return None
    parts = [weight.parts() for weight in ints]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def unstack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> tuple[IntTensor, ...]:
    """Return the IntTensors that ``stack`` took apart."""
    slots = range(len(tensors["codes"]))
    return tuple(IntTensor.of({name: t[slot] for name, t in tensors.items()}, scheme, shape) for slot in slots)
