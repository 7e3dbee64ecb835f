"""Equal slices of one MLP as experts: Union of Experts (tokens or sequences choose slices) and MoHD (units choose).

A slice owns C = F / E channels of an MLP; all slices with weight 1 are the MLP, exactly. UoE (arXiv 2503.02495) weights
what a slice puts out, so its slices are plain FFN experts for any backend. MoHD (arXiv 2412.05644) weights what enters
the activation: in a gated MLP, or with relu, that is a weight on the output too; ``mohd_forward`` runs every other MLP.

Shape letters: T tokens, H hidden, F channels of the whole MLP, E slices, C channels of one slice, N assignments,
Q sequences, S tokens of one sequence, G = 2 matrices (gate, up) of a gated MLP or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .experts import ACTIVATIONS
from .layer import LayerWeights, assignments
from .router import Linear, Router
from .routing import Context, Routing


def sliced(weights: LayerWeights, slices: int) -> LayerWeights:
    """Return a dense MLP as ``slices`` experts, cut as its channels lie; router and shared expert stay as they are."""
    width = weights.down.shape[-1]
    if not weights.is_dense or width % slices:
        raise ValueError(f"slices={slices} must divide the {width} channels of one dense MLP.")
    down_EHC = weights.down.reshape(len(weights.down), slices, -1).transpose(0, 1)
    parts_GECH = weights.gate_up.reshape(2 if weights.gated else 1, slices, width // slices, -1)
    gate_up = parts_GECH.transpose(0, 1).flatten(1, 2)
    return replace(weights, gate_up=gate_up, down=down_EHC)


# --- Union of Experts ------------------------------------------------------------------------------------------------


def sequences(tokens: int, ctx: Context, device: torch.device | None = None) -> Iterator[Tensor]:
    """Yield token_S of every sequence of ``ctx.segment_T`` (all tokens are one where it is None), padding left out."""
    token_T = torch.arange(tokens, device=device)
    valid_T = torch.ones_like(token_T, dtype=torch.bool) if ctx.valid_T is None else ctx.valid_T
    if ctx.segment_T is None:
        yield token_T[valid_T]
        return
    for segment in torch.unique(ctx.segment_T):
        yield token_T[valid_T & (ctx.segment_T == segment)]


class DataSelection(Router):
    """UoME_DS: every slice takes the share ``keep`` of each sequence's tokens, rounded down, that it likes best.

    The gate is softmax of a linear map with all but the ``k`` best slices of a token set to zero. The released code
    adds the outputs up without the gate, so that no gradient of the task reaches it; ``weighted=False`` does that, and
    then a slice also takes tokens of gate zero where it has room. ``batch_norm_epsilon`` turns on the released
    division of the gate by its sum over all sequences at the same position, times ``capacity`` * Q (rounded down): a
    single sequence then has the same gate everywhere, so it is off by default. It wants sequences of one length.
    """

    needs = frozenset({"segment_T"})
    causal = False

    def __init__(
        self,
        gate_EH: Tensor,
        k: int,
        keep: float = 0.5,
        weighted: bool = True,
        batch_norm_epsilon: float | None = None,
        capacity: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < k <= len(gate_EH) or not 0 < keep <= 1:
            raise ValueError(f"k={k} must lie between 1 and the {len(gate_EH)} slices, and keep={keep} in (0, 1].")
        self.scorer = Linear(gate_EH)
        self.k, self.keep, self.weighted = k, keep, weighted
        self.batch_norm_epsilon, self.capacity = batch_norm_epsilon, capacity

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``."""
        logits_TE: Tensor = self.scorer(x_TH, ctx)
        probs_TE = logits_TE.softmax(-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(self.k, dim=-1).indices, 1.0)
        gate_TE = probs_TE * chosen_TE
        if self.batch_norm_epsilon is not None:
            gate_TE = self._over_batch(_without_padding(gate_TE, ctx), ctx, self.batch_norm_epsilon)
        kept_TE = torch.zeros_like(gate_TE, dtype=torch.bool)
        for token_S in sequences(len(x_TH), ctx, x_TH.device):
            room = math.floor(self.keep * len(token_S) + 1e-9)
            taken_CE = gate_TE[token_S].topk(room, dim=0).indices
            kept_TE[token_S] = torch.zeros_like(kept_TE[token_S]).scatter(0, taken_CE, True)
        if self.weighted:
            return Routing.dense(gate_TE.masked_fill(~kept_TE, 0.0), logits_TE, probs_TE)
        return Routing.dense(kept_TE.to(gate_TE.dtype), logits_TE, probs_TE)

    def _over_batch(self, gate_TE: Tensor, ctx: Context, epsilon: float) -> Tensor:
        """Return the gate divided by its sum over the sequences, position by position."""
        rows_QS = _equal_length(gate_TE, ctx)
        total_SE = gate_TE[rows_QS].sum(0) + epsilon
        shares_QSE = gate_TE[rows_QS] / total_SE * int(self.capacity * len(rows_QS))
        return torch.zeros_like(gate_TE).index_copy(0, rows_QS.flatten(), shares_QSE.flatten(0, 1))


class ExpertSelection(Router):
    """UoME_ES: a gate reads a whole sequence, flattened, and sends all its tokens to the same ``k`` slices.

    ``gate_EX`` has X = S * H columns, so every sequence must have S tokens; those that are padding are read as zeros
    and get no slices. Weights are softmax over all slices, or 1
    with ``weighted=False`` (released).
    """

    needs = frozenset({"segment_T"})
    causal = False

    def __init__(self, gate_EX: Tensor, k: int, weighted: bool = True) -> None:
        super().__init__()
        if not 0 < k <= len(gate_EX):
            raise ValueError(f"k={k} must lie between 1 and the {len(gate_EX)} slices.")
        self.gate_EX = nn.Parameter(gate_EX.detach().float().clone())
        self.k, self.weighted = k, weighted

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``; the tokens of a sequence share one row."""
        if len(x_TH) == 0:
            nothing_TE = self.gate_EX.new_zeros(0, len(self.gate_EX))
            return Routing.dense(nothing_TE, nothing_TE, nothing_TE)
        rows_QS = _equal_length(x_TH, ctx)
        if rows_QS.shape[1] * x_TH.shape[1] != self.gate_EX.shape[1]:
            wanted = self.gate_EX.shape[1] / x_TH.shape[1]
            raise ValueError(f"the gate reads sequences of {wanted:g} tokens, not {rows_QS.shape[1]}; cut or pad them.")
        logits_QE = nnf.linear(_without_padding(x_TH, ctx)[rows_QS].flatten(1).float(), self.gate_EX)
        probs_QE = logits_QE.softmax(-1)
        chosen_QE = torch.zeros_like(probs_QE).scatter(1, probs_QE.topk(self.k, dim=-1).indices, 1.0)
        gate_QE = probs_QE * chosen_QE if self.weighted else chosen_QE
        gate_TE, logits_TE, probs_TE = (
            self._over_tokens(value_QE, rows_QS, len(x_TH)) for value_QE in (gate_QE, logits_QE, probs_QE)
        )
        return Routing.dense(_without_padding(gate_TE, ctx), logits_TE, probs_TE)

    @staticmethod
    def _over_tokens(value_QE: Tensor, rows_QS: Tensor, tokens: int) -> Tensor:
        """Return the row of each token's sequence, [T, E]."""
        token = rows_QS.flatten()
        spread = value_QE.repeat_interleave(rows_QS.shape[1], dim=0)
        return value_QE.new_zeros(tokens, value_QE.shape[1]).index_copy(0, token, spread)


def _equal_length(value_TX: Tensor, ctx: Context) -> Tensor:
    """Return rows_QS of the sequences, padding included, which must all be of one length."""
    groups = list(sequences(len(value_TX), replace(ctx, valid_T=None), value_TX.device))
    if len({len(token_S) for token_S in groups}) > 1:
        raise ValueError("this gate reads sequences of one length; pad or cut them to the same number of tokens.")
    return torch.stack(groups) if groups else torch.zeros(0, 0, dtype=torch.int64, device=value_TX.device)


def _without_padding(value_TX: Tensor, ctx: Context) -> Tensor:
    """Return the values with zeros at tokens that are padding."""
    return value_TX if ctx.valid_T is None else value_TX.masked_fill(~ctx.valid_T[:, None], 0.0)


# --- MoHD ------------------------------------------------------------------------------------------------------------


class HiddenGroups(Router):
    """MoHD: the first ``shared`` groups of hidden units are always on, and ``k`` of the others by softmax(x phi^T).

    The weight of group e is alpha s_e with alpha = E * (sum of s over the active groups), the activation scaling that
    makes up for what is left out: with all groups on and equal scores every weight is 1. The paper recommends that
    three quarters of the active groups be shared.
    """

    def __init__(self, gate_EH: Tensor, k: int, shared: int) -> None:
        super().__init__()
        if shared < 0 or k < 0 or not 0 < shared + k <= len(gate_EH):
            raise ValueError(f"shared={shared} and k={k} must name between 1 and {len(gate_EH)} groups together.")
        self.scorer = Linear(gate_EH)
        self.k, self.shared = k, shared

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH`` over the groups, the shared ones first."""
        logits_TE: Tensor = self.scorer(x_TH, ctx)
        probs_TE = logits_TE.softmax(-1)
        always_TS = torch.arange(self.shared, device=x_TH.device).expand(len(x_TH), -1)
        chosen_TK = probs_TE[:, self.shared :].topk(self.k, dim=-1).indices + self.shared
        indices_TA = torch.cat([always_TS, chosen_TK], dim=1)
        active_TA = probs_TE.gather(1, indices_TA)
        groups = logits_TE.shape[1]
        weights_TA = active_TA * (groups * active_TA.sum(-1, keepdim=True))
        if ctx.valid_T is not None:
            indices_TA = indices_TA.masked_fill(~ctx.valid_T[:, None], groups)
        return Routing.topk(indices_TA, weights_TA, groups, logits_TE, probs_TE)


def mohd_forward(x_TH: Tensor, slices: LayerWeights, routing: Routing, fusion_ECC: Tensor | None = None) -> Tensor:
    """Return y_TH = sum_e down_e act(B_e (w_te up_e x_t)) over the slices of ``sliced``, only the active ones computed.

    In a gated MLP the weight multiplies ``up`` alone. ``fusion_ECC`` is the grouped fusion, one matrix per group before
    the activation; None leaves it out. The paper speaks of a Monarch matrix, which would also mix groups; the one
    implementation that can be read is block-diagonal, as here.
    """
    y_TH = torch.zeros_like(x_TH)
    for expert, token_N, weight_N in assignments(routing):
        product = nnf.linear(x_TH[token_N], slices.gate_up[expert].to(x_TH.dtype))
        fusion_CC = None if fusion_ECC is None else fusion_ECC[expert].to(x_TH.dtype)
        hidden_NC = _weighted_hidden(product, weight_N.to(x_TH.dtype)[:, None], slices, fusion_CC)
        y_TH = y_TH.index_add(0, token_N, nnf.linear(hidden_NC, slices.down[expert].to(x_TH.dtype)))
    return y_TH


def mohd_masked(x_TH: Tensor, dense: LayerWeights, routing: Routing) -> Tensor:
    """Return the same without fusion from the whole MLP, with groups of weight zero masked: the reference."""
    weight_TF = routing.to_dense().to(x_TH.dtype).repeat_interleave(dense.down.shape[1] // routing.num_experts, dim=1)
    hidden_TF = _weighted_hidden(nnf.linear(x_TH, dense.gate_up.to(x_TH.dtype)), weight_TF, dense, None)
    return nnf.linear(hidden_TF, dense.down.to(x_TH.dtype))


def _weighted_hidden(product: Tensor, weight: Tensor, weights: LayerWeights, fusion_CC: Tensor | None) -> Tensor:
    """Return what ``down`` reads, from the product with ``gate_up``."""
    act = ACTIVATIONS[weights.activation]
    gate, up = product.chunk(2, dim=-1) if weights.gated else (None, product)
    up = up * weight
    if fusion_CC is not None:
        up = nnf.linear(up, fusion_CC)
    return act(up) if gate is None else act(gate) * up
