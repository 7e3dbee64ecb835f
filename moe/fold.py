"""Zero, copy and constant experts taken out of a layer, for backends that know FFN experts alone, and added back.

Shape letters: T tokens, H hidden, E expert ids of every kind, N_F FFN experts, P other experts, K slots, N assignments.
A zero expert adds nothing; a copy expert adds w x; a constant expert adds w (a1 x + a2 v) with
[a1, a2] = softmax(W_c x) (MoE++, arXiv 2410.07348).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..contracts import Executor, MoebenchError
from .experts import ExpertStore
from .placement import device_of

FOLDABLE = ("ffn", "zero", "copy", "constant")


def fold_store(store: ExpertStore) -> ExpertStore:
    """Return the store of the N_F FFN experts alone: what a backend loads when a layer is folded."""
    return replace(store, kinds=("ffn",) * len(store.ffn_ids), constants=None)


@dataclass(frozen=True)
class Split:
    """Boundary inputs over the FFN experts alone, and the weights of the others: ``other_TP`` in the order of ids."""

    inputs: tuple[Tensor, ...]
    other_TP: Tensor


class Fold:
    """What folding one layer needs to know of its expert ids."""

    def __init__(self, store: ExpertStore) -> None:
        foreign = set(store.kinds) - set(FOLDABLE)
        if foreign:
            raise MoebenchError(f"'{min(foreign)}' experts cannot be folded; use a backend that runs them.")
        if "constant" in store.kinds and store.constants is None:
            raise MoebenchError("the layer names constant experts but has no constants; give its store some.")
        self.store = store
        self.device = device_of(store)
        self.ffn = torch.tensor(store.ffn_ids, dtype=torch.long, device=self.device)
        self.other = [expert for expert, kind in enumerate(store.kinds) if kind != "ffn"]
        self.kinds = [store.kinds[expert] for expert in self.other]

    @cached_property
    def new_id_E1(self) -> Tensor:
        """The FFN expert that each id (and the sentinel E) becomes; N_F where it is none."""
        ids_E1 = torch.full((self.store.num_experts + 1,), len(self.ffn), device=self.device)
        ids_E1[self.ffn] = torch.arange(len(self.ffn), device=self.device)
        return ids_E1

    @cached_property
    def column_E1(self) -> Tensor:
        """The column of ``other_TP`` that each id belongs to; P where it is an FFN expert or the sentinel."""
        columns_E1 = torch.full((self.store.num_experts + 1,), len(self.other), device=self.device)
        other_P = torch.tensor(self.other, dtype=torch.long, device=self.device)
        columns_E1[other_P] = torch.arange(len(self.other), device=self.device)
        return columns_E1

    def split(self, inputs: Sequence[Any], num_tokens: int) -> Split:
        """Split boundary inputs: (indices_TK, weights_TK), or (token_N, offsets_E1, weight_N)."""
        if len(inputs) == 3:
            token_N, offsets_E1, weight_N = inputs
            return self._split_sorted(token_N, offsets_E1, weight_N, num_tokens)
        if len(inputs) == 2 and not inputs[0].is_floating_point():
            return self._split_topk(*inputs)
        raise MoebenchError("a folded layer takes boundary topk or sorted; logits are selected by the router itself.")

    def _split_topk(self, indices_TK: Tensor, weights_TK: Tensor) -> Split:
        folded_TK = self.new_id_E1[indices_TK]
        kept_TK = weights_TK.masked_fill(folded_TK == len(self.ffn), 0.0)
        other_TP1 = weights_TK.new_zeros(len(weights_TK), len(self.other) + 1)
        other_TP1 = other_TP1.scatter_add(1, self.column_E1[indices_TK], weights_TK)
        return Split((folded_TK, kept_TK), other_TP1[:, :-1])

    def _split_sorted(self, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor, num_tokens: int) -> Split:
        counts_E = offsets_E1.diff().long()
        expert_N = torch.repeat_interleave(torch.arange(len(counts_E), device=counts_E.device), counts_E)
        column_N = self.column_E1[expert_N]
        ffn_N = column_N == len(self.other)
        folded_E1 = offsets_E1.new_zeros(len(self.ffn) + 1)
        folded_E1[1:] = counts_E[self.ffn].cumsum(0)
        other_TP = weight_N.new_zeros(num_tokens, len(self.other))
        other_TP = other_TP.index_put((token_N[~ffn_N], column_N[~ffn_N]), weight_N[~ffn_N], accumulate=True)
        return Split((token_N[ffn_N], folded_E1, weight_N[ffn_N]), other_TP)

    def contribution(self, x_TH: Tensor, other_TP: Tensor) -> Tensor:
        """Return what the other experts add, [T, H] float32 (float64 for such inputs), by elementwise products only.

        A backend may be watched for matrix products that would betray a fallback; folding shows none.
        """
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        x, share_T, values_TH = x_TH.to(dtype), x_TH.new_zeros(len(x_TH), dtype=dtype), None
        constants, number = self.store.constants, 0
        for column, kind in enumerate(self.kinds):
            weight_T = other_TP[:, column].to(dtype)
            if kind == "copy":
                share_T = share_T + weight_T
            elif kind == "constant" and constants is not None:
                gate_2H = constants.gate_C2H[number].to(x_TH.dtype).to(dtype)
                value_H = constants.value_CH[number].to(x_TH.dtype).to(dtype)
                a_T2 = torch.stack([(x * gate_H).sum(-1) for gate_H in gate_2H], dim=-1).softmax(-1)
                share_T = share_T + weight_T * a_T2[:, 0]
                term_TH = (weight_T * a_T2[:, 1])[:, None] * value_H
                values_TH = term_TH if values_TH is None else values_TH + term_TH
                number += 1
        y_TH = share_T[:, None] * x
        return y_TH if values_TH is None else y_TH + values_TH


def fold_kinds(store: ExpertStore, inputs: Sequence[Any], x_TH: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return (boundary inputs over the N_F FFN experts, what the other experts add [T, H])."""
    fold = Fold(store)
    split = fold.split(inputs, len(x_TH))
    return split.inputs, fold.contribution(x_TH, split.other_TP)


class Folded:
    """An executor for all kinds, made of ``inner``, which runs ``fold_store(store)``; folding is part of each call."""

    def __init__(self, inner: Executor, store: ExpertStore) -> None:
        self.inner = inner
        self.fold = Fold(store)

    def __call__(self, x_TH: Tensor, *inputs: Any, out_TH: Tensor | None = None) -> Tensor:
        """Return y_TH, in ``out_TH`` where one is given."""
        split = self.fold.split(inputs, len(x_TH))
        y_TH: Tensor = self.inner(x_TH, *split.inputs, out_TH=out_TH)
        if out_TH is None:
            return (y_TH + self.fold.contribution(x_TH, split.other_TP)).to(x_TH.dtype)
        with torch.no_grad():
            return out_TH.add_(self.fold.contribution(x_TH, split.other_TP))
