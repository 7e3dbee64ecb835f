"""One MoE layer as its mathematics: y_t = sum_e G_te f_e(x_t), plus shared experts.

Shape letters: T tokens, E expert ids, F expert width, S width of the shared expert, H hidden, N assignments,
C constant experts, Q width of an attention's queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..contracts import EXPERT_KINDS, MoebenchError
from .attention_mixture import Attention, attend
from .experts import ACTIVATIONS, Constants, ExpertStore, expert_forward
from .routing import Context, Routing

if TYPE_CHECKING:
    from .router import Router


def ffn_hidden(x_TH: Tensor, gate_up: Tensor, activation: str, gated: bool = True) -> Tensor:
    """Return what ``down`` reads, [T, F]: act(gate x) * up x, or act(W x) where ``gated`` is false.

    ``gate_up`` is [2F, H] (gate rows first) or [F, H], in the dtype of ``x_TH``.
    """
    hidden = nnf.linear(x_TH, gate_up)
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gate_TF, up_TF = hidden.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate_TF) * up_TF


@dataclass(frozen=True)
class SharedExpert:
    """All always-on experts of a layer, fused to one gated FFN of width S.

    ``gate_up`` is [2S, H] (gate rows first), ``down`` [H, S]. With ``gate_H`` [H] the output of each token is
    multiplied by sigmoid(x . gate_H), as in Qwen2-MoE.
    """

    gate_up: Tensor
    down: Tensor
    gate_H: Tensor | None = None
    activation: str = "silu"

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return y_TH in the dtype of ``x_TH``."""
        hidden_TS = ffn_hidden(x_TH, self.gate_up.to(x_TH.dtype), self.activation)
        y_TH = nnf.linear(hidden_TS, self.down.to(x_TH.dtype))
        if self.gate_H is None:
            return y_TH
        return y_TH * torch.sigmoid(x_TH @ self.gate_H.to(x_TH.dtype))[:, None]

    __call__ = forward


@dataclass(frozen=True)
class LayerWeights:
    """What a model source or a structure hands over, in any floating dtype.

    ``gate_up`` is [2F, H] for a dense FFN and [E, 2F, H] for experts (gate rows first, then up rows; [E, F, H] where
    ``gated`` is false); ``down`` is [H, F] or [E, H, F]. ``router_bias_E`` is the selection bias of DeepSeek-V3. With
    ``heads`` experts are attentions: ``gate_up`` [E, 3Q, H] (query, key, value rows) and ``down`` [E, H, Q] (output).
    """

    gate_up: Tensor
    down: Tensor
    router_EH: Tensor | None = None
    router_bias_E: Tensor | None = None
    shared: SharedExpert | None = None
    activation: str = "silu"
    gated: bool = True
    heads: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether this is one FFN and not experts."""
        return self.gate_up.dim() == 2


@dataclass(frozen=True)
class PreparedLayer:
    """The end of a recipe: the experts as stored, the router, and what is always on."""

    store: ExpertStore
    router: Router
    shared: SharedExpert | None = None


def assignments(routing: Routing) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (expert id, token_N, weight_N) of every expert that has tokens, by rising id; gradients go through."""
    order_N = torch.argsort(routing.expert_N, stable=True)
    start = 0
    for expert, count in enumerate(routing.counts_E.tolist()):
        if count:
            part_N = order_N[start : start + count]
            yield expert, routing.token_N[part_N], routing.weight_N[part_N]
        start += count


def constant_forward(x_TH: Tensor, constants: Constants, index: int) -> Tensor:
    """Return a1 x + a2 v of constant expert ``index``, with [a1, a2] = softmax(W_c x) (MoE++, arXiv 2410.07348)."""
    mix_T2 = torch.softmax(nnf.linear(x_TH, constants.gate_C2H[index].to(x_TH.dtype)), dim=-1)
    return mix_T2[:, :1] * x_TH + mix_T2[:, 1:] * constants.value_CH[index].to(x_TH.dtype)


def stored_attention(gate_up: Tensor, down: Tensor, heads: int) -> Attention:
    """Return the attention that a store keeps as ``gate_up`` [3Q, H] and ``down`` [H, Q]."""
    query_QH, key_QH, value_QH = gate_up.chunk(3)
    return Attention(query_QH, key_QH, value_QH, down, heads)


def expert_output(x_TH: Tensor, store: ExpertStore, expert: int) -> Tensor:
    """Return f_e(x) [T, H] of any kind of expert id, in the dtype of ``x_TH``; for an attention it is one sequence."""
    kind = store.kinds[expert]
    if kind in ("ffn", "gather"):
        return expert_forward(x_TH, *store.weights(store.slots[expert], x_TH.dtype), store)
    if kind == "sequence":
        return attend(x_TH, stored_attention(*store.weights(store.slots[expert], x_TH.dtype), store.heads))
    if kind == "copy":
        return x_TH
    if kind == "zero":
        return torch.zeros_like(x_TH)
    if kind == "constant" and store.constants is not None:
        return constant_forward(x_TH, store.constants, store.kinds[:expert].count("constant"))
    raise MoebenchError(f"expert {expert} of kind '{kind}' is unknown here; use one of {', '.join(EXPERT_KINDS)}.")


def assigned_output(x_TH: Tensor, store: ExpertStore, expert: int, token_N: Tensor) -> Tensor:
    """Return f_e(x) [N, H] of an expert's tokens; an attention reads all of ``x_TH``, whoever gets its answers."""
    if store.kinds[expert] == "sequence":
        return expert_output(x_TH, store, expert)[token_N]
    return expert_output(x_TH[token_N], store, expert)


def route(layer: PreparedLayer, x_TH: Tensor, ctx: Context | None = None) -> Routing:
    """Return the layer's own Routing of ``x_TH``."""
    routing: Routing = layer.router(x_TH, Context() if ctx is None else ctx)
    return routing


def moe_forward(
    layer: PreparedLayer, x_TH: Tensor, ctx: Context | None = None, routing: Routing | None = None
) -> Tensor:
    """Return y_TH of the whole layer, shared expert included, in the dtype of ``x_TH``; differentiable.

    Experts compute in the dtype of ``x_TH``; their weighted sum is kept in float32 at least. A given ``routing``
    replaces the router.
    """
    routing = route(layer, x_TH, ctx) if routing is None else routing
    sum_dtype = torch.promote_types(x_TH.dtype, torch.float32)
    y_TH = torch.zeros(x_TH.shape, dtype=sum_dtype, device=x_TH.device)
    for expert, token_N, weight_N in assignments(routing):
        y_NH = assigned_output(x_TH, layer.store, expert, token_N).to(sum_dtype)
        y_TH = y_TH.index_add(0, token_N, y_NH * weight_N.to(sum_dtype)[:, None])
    if layer.shared is not None:
        y_TH = y_TH + layer.shared(x_TH).to(sum_dtype)
    return y_TH.to(x_TH.dtype)
