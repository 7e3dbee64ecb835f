"""How much a layer's output changes when one expert alone is stored in fewer bits.

Shape letters: T tokens, H hidden, N assignments of an expert, E experts that own weights, B choices of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..experts import ExpertStore, expert_forward
from ..router import Router
from ..routing import Context, Routing

Encode = Callable[[Tensor, int], Tensor]
"""From (weight [out, in], bits) to what the codec makes of it, dequantized."""


def sensitivities(
    store: ExpertStore,
    router: Router,
    x_TH: Tensor,
    encode: Encode,
    bits: Sequence[int],
    ctx: Context | None = None,
) -> Tensor:
    """Return epsilon_eb = ||Z - Z^(e->b)||_F, [E, B] float64, of MC-MoE (arXiv 2410.06270).

    Z is the layer's output for ``x_TH``, Z^(e->b) that with expert e alone at ``bits[b]``. The router, the other
    experts and a shared expert say the same in both, so the difference is expert e's own, at its routing weights, and
    no other expert is run. (Where a shared expert is mixed in by softmax, ``mix_2H``, Z is that of the routed experts.)
    Computed in the dtype of ``x_TH``. The paper adds up norms over batches: so may the caller.
    """
    with torch.no_grad():
        return routed_sensitivities(store, router(x_TH, Context() if ctx is None else ctx), x_TH, encode, bits)


def routed_sensitivities(
    store: ExpertStore, routing: Routing, x_TH: Tensor, encode: Encode, bits: Sequence[int]
) -> Tensor:
    """Return epsilon_eb [E, B] for inputs that are routed already."""
    if "sequence" in store.kinds:
        raise ValueError("sensitivities are those of FFN experts; attention experts have none here.")
    error_EB = torch.zeros(len(store.ffn_ids), len(bits), dtype=torch.float64)
    for slot, expert in enumerate(store.ffn_ids):
        mine_N = routing.expert_N == expert
        if not bool(mine_N.any()):
            continue
        x_NH, weight_N1 = x_TH[routing.token_N[mine_N]], routing.weight_N[mine_N].to(x_TH.dtype)[:, None]
        gate_up, down = store.weights(slot, x_TH.dtype)
        y_NH = expert_forward(x_NH, gate_up, down, store, slot)
        for place, width in enumerate(bits):
            coded = [encode(weight, width).to(x_TH.dtype) for weight in (gate_up, down)]
            off_NH = weight_N1 * (y_NH - expert_forward(x_NH, coded[0], coded[1], store, slot))
            error_EB[slot, place] = float(off_NH.double().norm())
    return error_EB
