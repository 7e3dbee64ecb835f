"""PEER: a million rank-1 experts behind product keys (He 2024, arXiv 2407.04153).

A query of 2 D numbers per head meets S keys on each of two sides; the k best of the S^2 sums are this head's experts,
weighted by softmax over the k. The PyTorch implementation that most people run (PEER-pytorch) defaults to one expert
per head, weighted by ReLU of its score ("non-competing"): ``score="relu"`` with ``k=1`` here. The paper normalises
queries by batch statistics while training; neither that implementation nor this one does.

Shape letters: T tokens, H hidden, A heads, S keys on one side, D width of half a query, K experts per head, E = S^2.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..router import Router, seeded_normal
from ..routing import Context, Routing
from .rank_one import RankOneBank, merged_routing
from .retrieval import exhaustive_topk, product_grid, product_key_topk


class ProductKeyRouter(Router):
    """Up to A K of S^2 experts for each token, found exactly; an expert that two heads find has the sum of weights.

    ``query_QH`` maps a token to Q = A * 2 * D numbers, ``keys_A2SD`` are the keys. ``score`` turns the scores of a
    head's K experts into weights. With fewer ``experts`` than places of the grid, place i is expert i modulo their
    number, so that a few have two keys (as UltraMem's released code does with its rows). The Routing carries no logits:
    there would be S^2 for every token.
    """

    def __init__(
        self,
        query_QH: Tensor,
        keys_A2SD: Tensor,
        k: int,
        score: Literal["softmax", "relu"] = "softmax",
        experts: int | None = None,
    ) -> None:
        super().__init__()
        heads, _, self.side, width = keys_A2SD.shape
        if len(query_QH) != heads * 2 * width:
            raise ValueError(f"{heads} heads of 2 x {width} need {heads * 2 * width} query rows, not {len(query_QH)}.")
        self.query_QH = nn.Parameter(query_QH.detach().float().clone())
        self.keys_A2SD = nn.Parameter(keys_A2SD.detach().float().clone())
        self.k = k
        self.score = score
        self.experts = self.side**2 if experts is None else experts

    @classmethod
    def seeded(
        cls,
        hidden: int,
        side: int,
        heads: int,
        k: int,
        key_width: int,
        seed: int,
        score: Literal["softmax", "relu"] = "softmax",
        experts: int | None = None,
    ) -> ProductKeyRouter:
        """Return a router of normal queries and keys of unit fan-in."""
        query_QH = seeded_normal((heads * 2 * key_width, hidden), hidden**-0.5, seed, "peer.query")
        keys_A2SD = seeded_normal((heads, 2, side, key_width), key_width**-0.5, seed, "peer.keys")
        return cls(query_QH, keys_A2SD, k, score, experts)

    def side_scores(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the keys of each side, two of [T, A, S] float32."""
        heads, _, _, width = self.keys_A2SD.shape
        query_TA2D = nnf.linear(x_TH.to(self.query_QH.dtype), self.query_QH).view(len(x_TH), heads, 2, width)
        first_TAS, second_TAS = torch.einsum("tapd,apsd->ptas", query_TA2D, self.keys_A2SD)
        return first_TAS, second_TAS

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH`` over E experts."""
        return self._routing(*product_key_topk(*self.side_scores(x_TH), self.k), ctx)

    def exhaustive(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the same by scoring all E experts: the reference of the search."""
        return self._routing(*exhaustive_topk(product_grid(*self.side_scores(x_TH)), self.k), ctx)

    def _routing(self, scores_TAK: Tensor, rows_TAK: Tensor, ctx: Context) -> Routing:
        weights_TAK = scores_TAK.softmax(-1) if self.score == "softmax" else scores_TAK.relu()
        return merged_routing(rows_TAK.flatten(1) % self.experts, weights_TAK.flatten(1), self.experts, ctx.valid_T)


class PEER(nn.Module):
    """The whole layer: y_t = sum over heads and their experts of w act(v_e . x_t) u_e."""

    def __init__(self, router: ProductKeyRouter, bank: RankOneBank) -> None:
        super().__init__()
        if len(bank.inner_EH) != router.experts:
            raise ValueError(f"the keys name {router.experts} experts and the bank has {len(bank.inner_EH)}.")
        self.router = router
        self.bank = bank

    @classmethod
    def seeded(
        cls,
        hidden: int,
        side: int = 1000,
        heads: int = 8,
        k: int = 16,
        key_width: int = 128,
        seed: int = 0,
        score: Literal["softmax", "relu"] = "softmax",
    ) -> PEER:
        """Return a layer of ``side`` squared experts, normal weights of unit fan-in; by default the paper's sizes."""
        router = ProductKeyRouter.seeded(hidden, side, heads, k, key_width, seed, score)
        inner_EH = seeded_normal((side**2, hidden), hidden**-0.5, seed, "peer.inner")
        outer_EH = seeded_normal((side**2, hidden), hidden**-0.5, seed, "peer.outer")
        return cls(router, RankOneBank(inner_EH, outer_EH))

    def forward(self, x_TH: Tensor, ctx: Context | None = None) -> Tensor:
        """Return y_TH in the dtype of the bank."""
        y_TH: Tensor = self.bank(x_TH, self.router(x_TH, Context() if ctx is None else ctx))
        return y_TH

    def reference(self, x_TH: Tensor, ctx: Context | None = None) -> Tensor:
        """Return y_TH with every expert scored and computed."""
        return self.bank.dense(x_TH, self.router.exhaustive(x_TH, Context() if ctx is None else ctx))
