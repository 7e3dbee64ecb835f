"""An ExpertStore as the Triton kernels read it: dense where it lies, codes as they are stored, or dequantized.

Plans ask before any weight exists, so nothing here imports torch or triton until a store is at hand. Shape letters:
E experts, O outputs of a matrix, I its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..contracts import LayerSpec, MoebenchError, Scheme
from .packing import CODECS
from .session import DenseWeights

if TYPE_CHECKING:
    from torch import Tensor

    from ..kernels.triton.grouped import Experts, Site
    from ..kernels.triton.weights import Matrices
    from ..moe.experts import ExpertStore


def form_of(scheme: Scheme) -> str:
    """Return the form in which kernels read codes of a scheme, or an empty string: they are dequantized."""
    if scheme.act_bits is not None:
        return ""
    if scheme.codec in CODECS and scheme.bits in (4, 8):
        return f"int{int(scheme.bits)}"
    return {"fp8_e4m3": "fp8", "mxfp4": "mxfp4"}.get(scheme.codec, "")


def packed_form(spec: LayerSpec) -> str:
    """Return the form of a layer's codes, or an empty string: experts differ, or no kernel reads them."""
    return form_of(spec.scheme) if spec.scheme is not None and spec.scheme.codec != "none" else ""


def experts_of(store: ExpertStore, spec: LayerSpec, turned: bool) -> Experts:
    """Return the experts of a layer; ``turned`` copies dense weights so that unused channels can be left in memory."""
    from ..kernels.triton.grouped import Experts
    from ..kernels.triton.weights import Matrices

    form = packed_form(spec)
    if form:
        gate_up, down = (_packed(weights, form) for weights in (tuple(store.gate_up), tuple(store.down)))
    else:
        dense = DenseWeights(store, spec)
        make = Matrices.turned if turned else Matrices.dense
        gate_up, down = make(dense.gate_up), make(dense.down)
    sites = {name: _site(rule) for name, rule in (store.sparsity.sites if store.sparsity else {}).items()}
    return Experts(gate_up, down, store.activation, store.gated, **sites)


def _site(rule: Any) -> Site:
    from ..kernels.triton.grouped import Site

    weight: Tensor | None = rule.weight
    return Site(rule.threshold, None if weight is None else weight.float().contiguous())


def _packed(weights: Sequence[Any], form: str) -> Matrices:
    """Return the codes of all experts, stacked, with their scales and zeros [E, O, G]."""
    import torch

    from ..kernels.triton.weights import Matrices

    first = weights[0]
    if any(weight.scheme != first.scheme for weight in weights):
        raise MoebenchError("experts differ from their specification's one scheme; write each into its schemes.")
    scales = torch.stack([weight.scales for weight in weights])
    zeros = getattr(first, "zeros", None)
    return Matrices(
        torch.stack([weight.codes for weight in weights]),
        form,
        first.shape[0],
        first.shape[1],
        scales.reshape(len(weights), first.shape[0], -1).contiguous(),
        None if zeros is None else torch.stack([weight.zeros for weight in weights]).contiguous(),
        first.scheme.group or 0,
    )
