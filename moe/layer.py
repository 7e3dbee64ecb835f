"""One MoE layer as its mathematics: y_t = sum_e G_te f_e(x_t), plus shared experts.

Shape letters: T tokens, E expert ids, F expert width, S width of the shared expert, H hidden, N assignments,
C constant experts, Q width of an attention's queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..contracts import EXPERT_KINDS, MoebenchError
from .attention_mixture import Attention, attend
from .experts import ACTIVATIONS, Constants, ExpertStore, QTensor, Stored, expert_forward
from .routing import Context, Routing

if TYPE_CHECKING:
    from .bits.params import LayerBits
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
    """All always-on experts of a layer, fused to one FFN of width S, and how a layer adds them to its routed experts.

    ``gate_up`` is [2S, H] (gate rows first; [S, H] where ``gated`` is false), ``down`` [H, S]. With ``gate_H`` [H] the
    output of each token is multiplied by sigmoid(x . gate_H), as in Qwen2-MoE. With ``mix_2H`` [2, H] instead, the
    routed sum is multiplied by the first and the output by the second of softmax(mix_2H x), as in the residual MoE of
    DeepSpeed (arXiv 2201.05596), whose linear map has a bias besides.
    """

    gate_up: Tensor
    down: Tensor
    gate_H: Tensor | None = None
    activation: str = "silu"
    mix_2H: Tensor | None = None
    gated: bool = True

    def __post_init__(self) -> None:
        if self.gate_H is not None and self.mix_2H is not None:
            raise ValueError("a shared expert is gated by gate_H or mixed in by mix_2H; give one of them.")

    def to(self, dtype: torch.dtype) -> SharedExpert:
        """Return the same with its tensors in ``dtype``."""
        gate_H = None if self.gate_H is None else self.gate_H.to(dtype)
        mix_2H = None if self.mix_2H is None else self.mix_2H.to(dtype)
        return replace(self, gate_up=self.gate_up.to(dtype), down=self.down.to(dtype), gate_H=gate_H, mix_2H=mix_2H)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return what is added to the routed sum, y_TH in the dtype of ``x_TH``."""
        return self._output(x_TH, self.factors(x_TH)[1])

    __call__ = forward

    def added_to(self, routed_TH: Tensor, x_TH: Tensor) -> Tensor:
        """Return the layer's output from the sum of its routed experts, in the wider of both dtypes."""
        routed_T1, own_T1 = self.factors(x_TH)
        return (routed_TH if routed_T1 is None else routed_TH * routed_T1) + self._output(x_TH, own_T1)

    def add_to_(self, routed_TH: Tensor, x_TH: Tensor) -> None:
        """Turn the sum of the routed experts into the layer's output, in place and in its dtype."""
        routed_T1, own_T1 = self.factors(x_TH)
        if routed_T1 is not None:
            routed_TH *= routed_T1
        routed_TH += self._output(x_TH, own_T1)

    def _output(self, x_TH: Tensor, factor_T1: Tensor | None) -> Tensor:
        hidden_TS = ffn_hidden(x_TH, self.gate_up.to(x_TH.dtype), self.activation, self.gated)
        y_TH = nnf.linear(hidden_TS, self.down.to(x_TH.dtype))
        return y_TH if factor_T1 is None else y_TH * factor_T1.to(x_TH.dtype)

    def factors(self, x_TH: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return what the routed sum and the own output are multiplied by, [T, 1] each; None stands for 1."""
        if self.mix_2H is not None:
            wide = torch.promote_types(x_TH.dtype, torch.float32)  # two close logits must not be rounded to one
            mix_T2 = nnf.linear(x_TH.to(wide), self.mix_2H.to(x_TH.dtype).to(wide)).softmax(-1)
            return mix_T2[:, :1], mix_T2[:, 1:]
        if self.gate_H is not None:
            return None, torch.sigmoid(x_TH @ self.gate_H.to(x_TH.dtype))[:, None]
        return None, None


@dataclass(frozen=True)
class LayerWeights:
    """What a model source or a structure hands over, in any floating dtype.

    ``gate_up`` is [2F, H] for a dense FFN and [E, 2F, H] for experts (gate rows first, then up rows; [E, F, H] where
    ``gated`` is false); ``down`` is [H, F] or [E, H, F]. ``router_bias_E`` is the selection bias of DeepSeek-V3. With
    ``heads`` experts are attentions: ``gate_up`` [E, 3Q, H] (query, key, value rows) and ``down`` [E, H, Q] (output).
    With ``input_scale_H`` all experts, the shared one included, read the layer's input times it; the router reads the
    input itself.
    ``stored`` are the matrices of which ``gate_up`` and ``down`` are the values, as the model's file has them.
    """

    gate_up: Tensor
    down: Tensor
    router_EH: Tensor | None = None
    router_bias_E: Tensor | None = None
    shared: SharedExpert | None = None
    activation: str = "silu"
    gated: bool = True
    heads: int = 0
    input_scale_H: Tensor | None = None
    stored: Stored | None = None

    @property
    def is_dense(self) -> bool:
        """Whether this is one FFN and not experts."""
        return self.gate_up.dim() == 2


@dataclass(frozen=True, eq=False)
class RoundedGate:
    """What a layer whose gate was rounded knows of it: the packed weight, and the router before it was rounded."""

    code: QTensor
    exact: Router


@dataclass(frozen=True)
class PreparedLayer:
    """The end of a recipe: the experts as stored, the router, and what is always on.

    Experts, the shared one included, read the layer's input times ``input_scale_H`` [H] (see ``reads``), a factor that
    the gain of the norm before the layer would take; the router reads the input itself, and has the factor in its
    weights where these were rounded. ``short_experts`` counts those that balanced calibration could not give their
    share of tokens; None where it was not asked for.
    Where the shared expert is quantized, ``shared_store`` has its bytes and ``shared`` what these dequantize to;
    ``bits`` is what a plan over several layers gave the layer.
    """

    store: ExpertStore
    router: Router
    shared: SharedExpert | None = None
    input_scale_H: Tensor | None = None
    gate: RoundedGate | None = None
    short_experts: int | None = None
    shared_store: ExpertStore | None = None
    bits: LayerBits | None = None

    def reads(self, x_TH: Tensor) -> Tensor:
        """Return what the experts read where the layer's input is ``x_TH``, in its dtype, rounded once."""
        return scaled_input(x_TH, self.input_scale_H)

    @property
    def exact_router(self) -> Router:
        """The router with the gate as it was before any rounding."""
        return self.router if self.gate is None else self.gate.exact

    @property
    def router_nbytes(self) -> int:
        """Bytes of the router's parameters, those of a rounded gate as they are packed."""
        sizes = [(tuple(parameter.shape), parameter.nbytes) for parameter in self.router.parameters()]
        if self.gate is not None:
            rows = next(place for place, (shape, _) in enumerate(sizes) if shape == tuple(self.gate.code.shape))
            sizes[rows] = (self.gate.code.shape, self.gate.code.nbytes)
        return sum(nbytes for _, nbytes in sizes)


def scaled_input(x_TH: Tensor, scale_H: Tensor | None) -> Tensor:
    """Return ``x_TH`` times ``scale_H`` (None = 1), in the dtype of ``x_TH``."""
    return x_TH if scale_H is None else (x_TH.to(scale_H.dtype) * scale_H).to(x_TH.dtype)


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
        slot = store.slots[expert]
        return expert_forward(x_TH, *store.weights(slot, x_TH.dtype), store, slot)
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


def routed_sum(store: ExpertStore, x_TH: Tensor, routing: Routing) -> Tensor:
    """Return the weighted sum of the routed experts [T, H], in float32 at least; differentiable."""
    sum_dtype = torch.promote_types(x_TH.dtype, torch.float32)
    y_TH = torch.zeros(x_TH.shape, dtype=sum_dtype, device=x_TH.device)
    for expert, token_N, weight_N in assignments(routing):
        y_NH = assigned_output(x_TH, store, expert, token_N).to(sum_dtype)
        y_TH = y_TH.index_add(0, token_N, y_NH * weight_N.to(sum_dtype)[:, None])
    return y_TH


def moe_forward(
    layer: PreparedLayer, x_TH: Tensor, ctx: Context | None = None, routing: Routing | None = None
) -> Tensor:
    """Return y_TH of the whole layer, shared expert included, in the dtype of ``x_TH``; differentiable.

    Experts compute in the dtype of ``x_TH``; their weighted sum is kept in float32 at least. A given ``routing``
    replaces the router.
    """
    routing = route(layer, x_TH, ctx) if routing is None else routing
    x_TH = layer.reads(x_TH)
    y_TH = routed_sum(layer.store, x_TH, routing)
    if layer.shared is not None:
        y_TH = layer.shared.added_to(y_TH, x_TH)
    return y_TH.to(x_TH.dtype)
