"""A router's result: one sparse T x E matrix, and the context a router may look at.

Shape letters: T tokens, E expert ids, K slots per token, N assignments, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The sparse gate matrix G, as N entries (token, expert, weight) with at most one entry per pair.

    ``token_N`` and ``expert_N`` are int64; ``weight_N`` is floating and may carry a gradient, be negative, and sum to
    anything. ``shape`` is (T, E). ``logits_TE`` (before the score function) and ``probs_TE`` are there for losses and
    gating residuals. Missing entries are dropped tokens, null experts or a smaller k.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    shape: tuple[int, int]
    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None

    @classmethod
    def topk(
        cls,
        indices_TK: Tensor,
        weights_TK: Tensor,
        num_experts: int,
        logits_TE: Tensor | None = None,
        probs_TE: Tensor | None = None,
    ) -> Routing:
        """Make a Routing from slots; a slot whose index is negative or >= ``num_experts`` is empty."""
        keep_TK = (indices_TK >= 0) & (indices_TK < num_experts)
        token_TK = torch.arange(indices_TK.shape[0], device=indices_TK.device)[:, None].expand_as(indices_TK)
        return cls(
            token_TK[keep_TK],
            indices_TK[keep_TK].long(),
            weights_TK[keep_TK],
            (indices_TK.shape[0], num_experts),
            logits_TE,
            probs_TE,
        )

    @classmethod
    def dense(cls, gate_TE: Tensor, logits_TE: Tensor | None = None, probs_TE: Tensor | None = None) -> Routing:
        """Make a Routing from the non-zero entries of a dense matrix."""
        token_N, expert_N = gate_TE.detach().nonzero(as_tuple=True)
        return cls(
            token_N, expert_N, gate_TE[token_N, expert_N], (gate_TE.shape[0], gate_TE.shape[1]), logits_TE, probs_TE
        )

    @classmethod
    def by_expert(cls, indices_EC: Tensor, weights_EC: Tensor, num_tokens: int) -> Routing:
        """Make a Routing from the tokens that each expert takes; a negative token index is an empty place."""
        keep_EC = indices_EC >= 0
        expert_EC = torch.arange(indices_EC.shape[0], device=indices_EC.device)[:, None].expand_as(indices_EC)
        return cls(
            indices_EC[keep_EC].long(), expert_EC[keep_EC], weights_EC[keep_EC], (num_tokens, indices_EC.shape[0])
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.shape[0]

    @property
    def num_experts(self) -> int:
        """E, with every kind of expert counted."""
        return self.shape[1]

    @cached_property
    def counts_E(self) -> Tensor:
        """Assignments per expert, int64, experts without any included."""
        return torch.bincount(self.expert_N, minlength=self.num_experts)

    @cached_property
    def k_T(self) -> Tensor:
        """Assignments per token, int64."""
        return torch.bincount(self.token_N, minlength=self.num_tokens)

    def to_dense(self) -> Tensor:
        """Return G_TE; the gradient of the weights goes through."""
        gate_TE = self.weight_N.new_zeros(self.shape)
        return gate_TE.index_put((self.token_N, self.expert_N), self.weight_N, accumulate=True)

    def sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (token_N int64, offsets_E1 int32, weight_N float32), sorted by expert, then by token."""
        order_N = torch.argsort(self.expert_N * self.num_tokens + self.token_N)
        offsets_E1 = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=self.token_N.device)
        offsets_E1[1:] = self.counts_E.cumsum(0)
        return self.token_N[order_N], offsets_E1, self.weight_N[order_N].float()

    def padded(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (indices_TK int64, weights_TK float32); empty slots hold index E and weight 0.

        Slots keep the order of the entries of each token. ``k`` may widen the result, never cut it.
        """
        width = max(int(self.k_T.max()) if self.num_tokens else 0, 1)
        if k is not None and k < width:
            raise ValueError(f"k={k} is smaller than the {width} experts of the busiest token; ask for more slots.")
        width = max(width, k or 0)
        order_N = torch.argsort(self.token_N, stable=True)
        token_N = self.token_N[order_N]
        first_T = torch.cumsum(self.k_T, 0) - self.k_T
        slot_N = torch.arange(len(token_N), device=token_N.device) - first_T[token_N]
        indices_TK = token_N.new_full((self.num_tokens, width), self.num_experts)
        indices_TK[token_N, slot_N] = self.expert_N[order_N]
        weights_TK = torch.zeros(self.num_tokens, width, device=token_N.device)
        weights_TK = weights_TK.index_put((token_N, slot_N), self.weight_N[order_N].float())
        return indices_TK, weights_TK

    def keep(self, mask_N: Tensor) -> Routing:
        """Return the Routing with only the entries where ``mask_N`` is true."""
        return replace(
            self, token_N=self.token_N[mask_N], expert_N=self.expert_N[mask_N], weight_N=self.weight_N[mask_N]
        )

    def part(self, start: int, stop: int) -> Routing:
        """Return the Routing of the tokens ``start`` to ``stop`` - 1 alone."""
        cut = self.keep((self.token_N >= start) & (self.token_N < stop))
        logits_TE, probs_TE = (None if rows is None else rows[start:stop] for rows in (self.logits_TE, self.probs_TE))
        shape = (max(0, min(stop, self.num_tokens) - start), self.num_experts)
        return Routing(cut.token_N - start, cut.expert_N, cut.weight_N, shape, logits_TE, probs_TE)

    def relabel(self, new_id_E: Tensor, num_experts: int | None = None) -> Routing:
        """Return the Routing with expert e called ``new_id_E[e]``; logits and probabilities do not follow."""
        shape = (self.num_tokens, num_experts or self.num_experts)
        return Routing(self.token_N, new_id_E[self.expert_N], self.weight_N, shape)

    def concat(self, other: Routing) -> Routing:
        """Return the entries of both; the pairs must not overlap."""
        return Routing(
            torch.cat([self.token_N, other.token_N]),
            torch.cat([self.expert_N, other.expert_N]),
            torch.cat([self.weight_N, other.weight_N]),
            self.shape,
            self.logits_TE,
            self.probs_TE,
        )

    def scaled(self, factor: float | Tensor) -> Routing:
        """Return the Routing with every weight multiplied by ``factor`` (a number or one per entry)."""
        return replace(self, weight_N=self.weight_N * factor)


@dataclass(frozen=True)
class Context:
    """What a router may know besides its input; a router declares in ``needs`` which fields it reads.

    Shapes: ``segment_T`` int64 (sequence ids; order is position), ``valid_T`` bool, ``token_ids_T`` int64, ``task``
    and ``modality_T`` int64, ``features`` free, ``attn`` [B, heads, S, S]. ``prev`` is the Routing of the MoE layer
    before; ``experts`` the ExpertStore; ``plan`` the Routings of a model-scope router by layer; ``ranks`` overrides
    which experts a decoder takes: those at these ranks of the scores, the best that hold a share of the probability
    (a number), or one by chance. ``prompt`` is how many tokens at the start of the call's one sequence are known
    before any other: what looks ahead may look that far and no further (None: at all of them).
    """

    layer: int = 0
    training: bool = False
    progress: float = 1.0
    rng: torch.Generator | None = None
    segment_T: Tensor | None = None
    valid_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    task: Tensor | int | None = None
    modality_T: Tensor | None = None
    features: Tensor | None = None
    prev: Routing | None = None
    attn: Tensor | None = None
    prompt: int | None = None
    experts: Any = None
    ranks: tuple[int, ...] | float | Literal["random"] | None = None
    plan: dict[int, Routing] | None = None
