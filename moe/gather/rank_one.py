"""Rank-1 experts f_e(x) = act(v_e . x) u_e by the thousands: two rows of two tables each, read by a gather.

Shape letters: T tokens, E experts, H hidden, N assignments, L found rows of one token (heads times k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...contracts import Metric
from ..experts import ACTIVATIONS
from ..routing import Routing


class RankOneBank(nn.Module):
    """E experts, with ``inner_EH`` (v) and ``outer_EH`` (u) as tables (PEER, arXiv 2407.04153)."""

    def __init__(self, inner_EH: Tensor, outer_EH: Tensor, activation: str = "gelu") -> None:
        super().__init__()
        if inner_EH.shape != outer_EH.shape:
            raise ValueError(f"inner is {tuple(inner_EH.shape)}, outer {tuple(outer_EH.shape)}; give one row of each.")
        self.inner_EH = nn.Parameter(inner_EH.detach().clone())
        self.outer_EH = nn.Parameter(outer_EH.detach().clone())
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Return sum_e G_te f_e(x_t) [T, H] in the bank's dtype; only the rows of the routing's experts are read."""
        x_TH = x_TH.to(self.inner_EH.dtype)
        order_N = torch.argsort(routing.token_N, stable=True)
        token_N, expert_N = routing.token_N[order_N], routing.expert_N[order_N]
        if len(token_N) == 0:
            return torch.zeros_like(x_TH)
        hidden_N = self.activation((x_TH[token_N] * self.inner_EH[expert_N]).sum(-1))
        weight_N = routing.weight_N[order_N].to(hidden_N.dtype) * hidden_N
        first_T = routing.k_T.cumsum(0) - routing.k_T
        return nnf.embedding_bag(expert_N, self.outer_EH, first_T, mode="sum", per_sample_weights=weight_N)

    def dense(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Return the same through all E experts and the dense matrix G: the reference of the gather."""
        hidden_TE = self.activation(x_TH @ self.inner_EH.T)
        return (hidden_TE * routing.to_dense().to(hidden_TE.dtype)) @ self.outer_EH


def merged_routing(rows_TL: Tensor, weights_TL: Tensor, experts: int, valid_T: Tensor | None = None) -> Routing:
    """Return the Routing of rows found by several heads: where two heads found the same row, its weights add up.

    Entries are sorted by token, then by row; tokens where ``valid_T`` is false have none.
    """
    tokens, found = rows_TL.shape
    token_N = torch.arange(tokens, device=rows_TL.device).repeat_interleave(found)
    pairs, place_N = torch.unique(token_N * experts + rows_TL.flatten(), return_inverse=True)
    weight = weights_TL.new_zeros(len(pairs)).index_add(0, place_N, weights_TL.flatten())
    routing = Routing(torch.div(pairs, experts, rounding_mode="floor"), pairs % experts, weight, (tokens, experts))
    return routing if valid_T is None else routing.keep(valid_T[routing.token_N])


def gather_metrics(routing: Routing, row_values: int, element_size: int) -> list[Metric]:
    """Return what a gather reads: bytes per token, which do not depend on E, and distinct rows of the whole batch.

    ``row_values`` is how many numbers one expert owns: 2 H for a rank-1 expert, vdim + pre_vdim for UltraMem.
    """
    entries, tokens = len(routing.expert_N), routing.num_tokens
    per_token = entries * row_values * element_size / tokens if tokens else None
    distinct = int((routing.counts_E > 0).sum())
    return [
        Metric("gather_bytes_per_token", per_token, "bytes", n=tokens),
        Metric("gather_distinct_rows", float(distinct), "experts", n=entries),
    ]
