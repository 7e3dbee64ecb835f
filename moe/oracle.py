"""The check that a row must pass: the same layer in float64, and how far an output may lie from it.

The reference takes what the backend took - the same routing, the same dtype-rounded inputs and the same dequantized
weights - and computes in float64, so every difference is the backend's own rounding or its mistake.

What rounding may do, with u the unit roundoff of the case's dtype (2^-24, 2^-11, 2^-8 for float32, float16, bfloat16):
an FFN expert rounds about eight times on the way (gate, up, activation, product, output, weighting, adding up, and the
weights themselves where they are dequantized). The roundings are independent, each about u/sqrt(3) of the norm of what
it rounds, so their sum is near u * sqrt(8/3) = 1.6 u. Long dot products add 2^-24 * sqrt(H) or sqrt(F) of the norm of
the products, in float32 whatever the dtype: at 16 384 terms 128 * 2^-24 = 7.6e-6. Hence the bounds: float32 2e-5 (which
the dot products decide), float16 5e-3 and bfloat16 2e-2 (10 u and 5 u, which the roundings decide), float64 1e-12. A
wrong weight, a lost token or a neighbour's row are far above all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..contracts import EXPERT_KINDS, Check, MoebenchError
from .channels import DENSE
from .experts import Constants, ExpertStore
from .oracle_near import (
    activate,
    cancellation,
    hidden_activations,
    hidden_error,
    low_rank_part,
    moved_columns,
    near_decisions,
    turned_together,
)
from .routing import Routing
from .token_codes import exact_tokens, near_ties

if TYPE_CHECKING:
    from .layer import SharedExpert

BOUNDS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}
"""Largest error of a row, relative to its scale; see the module's docstring for where the numbers come from."""

TINY_ROW = 1e-3
"""A row's scale is at least this part of the median scale: cancellation may leave almost nothing of a row."""


@dataclass(frozen=True)
class Reference:
    """The expected output of one layer.

    ``y_TH`` float64. ``slack_T`` float64 is the error (absolute, in the norm of a row) that may come from cancellation
    within the one unit of a rank-1 expert, and from sparsity decisions near their threshold; ``near`` counts these.
    Each may add or leave out w * h_j * (column j of down), the columns point all ways, and so their norms add up as
    squares; a top-k turns two at once, which may point alike. ``scale_T`` float64 is the root of the summed squares of
    the norms of a row's terms w * f_e(x): rounding is proportional to it where terms cancel.
    """

    y_TH: Tensor
    slack_T: Tensor
    near: int
    scale_T: Tensor


def joined(first: Reference, later: Reference) -> Reference:
    """Return the reference of the tokens of both, one after the other."""
    rows = [torch.cat([getattr(part, name) for part in (first, later)]) for name in ("y_TH", "slack_T", "scale_T")]
    return Reference(rows[0], rows[1], first.near + later.near, rows[2])


def bound(dtype: torch.dtype) -> float:
    """Return the largest relative error that the oracle forgives an output of ``dtype``."""
    if dtype not in BOUNDS:
        raise MoebenchError(f"no error bound is known for outputs of {dtype}; use float32, bfloat16 or float16.")
    return BOUNDS[dtype]


# --- the reference ---------------------------------------------------------------------------------------------------


def exact_weights(store: ExpertStore, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (gate_up, down) of one FFN expert in float64: dense ones rounded to ``dtype``, quantized ones as coded."""
    gate_up, down = store.weights(slot, torch.float32 if store.quantized else dtype)
    return gate_up.double(), down.double()


def reference(store: ExpertStore, routing: Routing, x_TH: Tensor, shared: SharedExpert | None = None) -> Reference:
    """Return the layer's output for ``x_TH`` in float64; ``x_TH`` is in the case's dtype, [T, H]."""
    if routing.num_experts != store.num_experts:
        raise MoebenchError(
            f"the routing knows {routing.num_experts} experts and the store {store.num_experts}; use the layer's own."
        )
    with torch.no_grad():
        total = _Sum(torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device))
        for expert, mine_N in entries(routing):
            _add_expert(total, store, expert, x_TH, routing.token_N[mine_N], routing.weight_N[mine_N])
        if shared is not None:
            _add_shared(total, shared, x_TH)
    scale_T = torch.maximum(total.squares_T.sqrt(), total.y_TH.norm(dim=1))
    return Reference(total.y_TH, total.flips_T.sqrt(), total.near, scale_T)


def entries(routing: Routing) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that has entries, with their places; sorted once, since there may be a million experts."""
    places = torch.split_with_sizes(routing.expert_N.argsort(stable=True), routing.counts_E.tolist())
    yield from ((expert, mine_N) for expert, mine_N in enumerate(places) if len(mine_N))


class _Sum:
    """The running sum over experts, with the squared norms of its terms and of what may flip."""

    def __init__(self, zeros_TH: Tensor) -> None:
        self.y_TH = zeros_TH
        self.squares_T = zeros_TH.new_zeros(len(zeros_TH))
        self.flips_T = zeros_TH.new_zeros(len(zeros_TH))
        self.near = 0

    def add(self, token_N: Tensor, term_NH: Tensor) -> None:
        """Add one expert's weighted outputs to the rows of its tokens."""
        self.y_TH.index_add_(0, token_N, term_NH)
        self.squares_T.index_add_(0, token_N, term_NH.square().sum(1))

    def scale(self, factor_T1: Tensor) -> None:
        """Multiply each row, and with it what is known of its terms."""
        self.y_TH *= factor_T1
        self.squares_T *= factor_T1.square().squeeze(1)
        self.flips_T *= factor_T1.square().squeeze(1)


def _add_expert(total: _Sum, store: ExpertStore, expert: int, x_TH: Tensor, token_N: Tensor, weight_N: Tensor) -> None:
    kind = store.kinds[expert]
    x_NH, weight_N1 = x_TH[token_N], weight_N.double()[:, None]
    if kind in ("ffn", "gather"):
        term_NH, flips_N, near = _ffn(store, store.slots[expert], x_NH)
        total.add(token_N, weight_N1 * term_NH)
        total.flips_T.index_add_(0, token_N, weight_N.double().square() * flips_N)
        total.near += near
    elif kind == "sequence":
        total.add(token_N, weight_N1 * _attention(store, store.slots[expert], x_TH)[token_N])
    elif kind == "copy":
        total.add(token_N, weight_N1 * x_NH.double())
    elif kind == "constant":
        number = sum(other == "constant" for other in store.kinds[:expert])
        total.add(token_N, weight_N1 * constant_expert(x_NH, store.constants, number))
    elif kind != "zero":
        raise MoebenchError(f"the oracle knows no '{kind}' experts; use one of {', '.join(EXPERT_KINDS)}.")


def constant_expert(x_NH: Tensor, constants: Constants | None, number: int) -> Tensor:
    """Return a1 x + a2 v of constant expert ``number`` in float64, its parameters rounded to the dtype of ``x_NH``."""
    if constants is None:
        raise MoebenchError("the layer names constant experts but has no constants; give its store some.")
    gate_2H = constants.gate_C2H[number].to(x_NH.dtype).double()
    value_H = constants.value_CH[number].to(x_NH.dtype).double()
    share_N2 = torch.softmax(x_NH.double() @ gate_2H.T, dim=-1)
    return share_N2[:, :1] * x_NH.double() + share_N2[:, 1:] * value_H


def _ffn(store: ExpertStore, slot: int, x_NH: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return f_e(x) [N, H], the summed squares [N] of what near-threshold decisions move, and their number."""
    gate_up, down = exact_weights(store, slot, x_NH.dtype)
    sparsity = store.sparsity or DENSE
    kept_NH = sparsity.apply("input", x_NH, slot)
    before = nnf.linear(exact_tokens(kept_NH, store.act_bits), gate_up)
    before = before + low_rank_part(sparsity, "input", x_NH.double() - kept_NH.double(), slot)
    whole_NF, reached_NF = hidden_activations(store, before, slot)
    hidden_NF = sparsity.apply("hidden", reached_NF, slot)
    near_NF = near_decisions(store, before, slot, x_NH.dtype)
    flips_N, near = (near_NF * whole_NF.square()) @ moved_columns(sparsity, down, slot), int(near_NF.sum())
    flips_N = flips_N * turned_together(sparsity)
    if store.width == 1:
        flips_N = flips_N + cancellation(store, gate_up, kept_NH, before, hidden_NF) * down.square().sum()
    if store.act_bits is not None:
        error_NF = hidden_error(store, before, hidden_NF, x_NH.dtype)
        near_NF, step_N1 = near_ties(hidden_NF, store.act_bits, error_NF)
        near += int(near_NF.sum())
        flips_N = flips_N + (near_NF * step_N1.square()) @ down.square().sum(0)
    y_NH = nnf.linear(exact_tokens(hidden_NF, store.act_bits), down)
    return y_NH + low_rank_part(sparsity, "hidden", reached_NF - hidden_NF, slot), flips_N, near


def _attention(store: ExpertStore, slot: int, x_TH: Tensor) -> Tensor:
    """Return what a causal attention says to every token of the one sequence [T, H], by torch's own attention."""
    gate_up, down = exact_weights(store, slot, x_TH.dtype)
    shape = (len(x_TH), 3, store.heads, down.shape[1] // store.heads)
    query_ATD, key_ATD, value_ATD = nnf.linear(x_TH.double(), gate_up).view(shape).permute(1, 2, 0, 3)
    said_ATD = nnf.scaled_dot_product_attention(query_ATD, key_ATD, value_ATD, is_causal=True)
    return nnf.linear(said_ATD.transpose(0, 1).flatten(1), down)


def _add_shared(total: _Sum, shared: SharedExpert, x_TH: Tensor) -> None:
    """Add what is always on; with a mix the routed sum takes its part of the weight first."""
    gate_up, down = (weight.to(x_TH.dtype).double() for weight in (shared.gate_up, shared.down))
    term_TH = nnf.linear(activate(nnf.linear(x_TH.double(), gate_up), shared.activation, shared.gated), down)
    if shared.gate_H is not None:
        term_TH *= torch.sigmoid(x_TH.double() @ shared.gate_H.to(x_TH.dtype).double())[:, None]
    if shared.mix_2H is not None:
        logits_T2 = x_TH.double() @ shared.mix_2H.to(x_TH.dtype).double().T
        share_T1 = torch.sigmoid(logits_T2[:, :1] - logits_T2[:, 1:])
        total.scale(share_T1)
        term_TH *= 1 - share_T1
    total.add(torch.arange(len(x_TH), device=x_TH.device), term_TH)


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(y_TH: Tensor, ref: Reference, dtype: torch.dtype) -> Check:
    """Judge an output: every row must lie within bound(dtype) * its scale + its slack of the reference.

    The Check tells the worst row: its error and what was allowed, both relative to the row's scale.
    """
    reason = mismatch(y_TH, ref.y_TH, dtype)
    if reason:
        return Check(False, bound=bound(dtype), reason=reason, flips=ref.near)
    if y_TH.numel() == 0:
        return Check(True, 0.0, bound(dtype), flips=ref.near)
    scale_T = ref.scale_T.clamp(min=TINY_ROW * float(ref.scale_T.median()))
    error_T = (y_TH.detach().double() - ref.y_TH).norm(dim=1)
    allowed_T = bound(dtype) * scale_T + ref.slack_T
    over_T = torch.where(error_T > 0, error_T / allowed_T, torch.zeros_like(error_T))
    worst = int(over_T.argmax())
    scale = float(scale_T[worst]) or 1.0
    error, allowed = float(error_T[worst]) / scale, float(allowed_T[worst]) / scale
    if float(over_T[worst]) <= 1:
        return Check(True, error, allowed, flips=ref.near)
    wrong = int((over_T > 1).sum())
    reason = f"{wrong} of {len(error_T)} rows are off; row {worst} by {error:.2g} of its norm, allowed {allowed:.2g}"
    return Check(False, error, allowed, reason, ref.near)


def mismatch(actual: object, expected: Tensor, dtype: torch.dtype) -> str:
    """Return why ``actual`` cannot even be compared, or an empty string."""
    if not isinstance(actual, Tensor):
        return f"the output is a {type(actual).__name__}, not a tensor"
    if actual.shape != expected.shape:
        return f"the output has shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if actual.dtype != dtype:
        return f"the output has dtype {actual.dtype} instead of {dtype}"
    bad = int((~torch.isfinite(actual)).sum())
    return f"unwritten or NaN: {bad} of {actual.numel()} values are not finite" if bad else ""
