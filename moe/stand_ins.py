"""Fields of a Context for a layer that stands alone, with no text, task or image around it: made up from a seed.

Sequences are of equal length; tokens follow a power law; the first quarter of each sequence is vision (modality 1), the
rest language (0); tasks alternate from sequence to sequence; images, context vectors and the scores of the layer before
are gaussian; an attention is causal with gaussian logits. Nothing in the hidden states depends on these labels.
Shape letters: T tokens, E expert ids, B sequences of L tokens, V token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..contracts import MoebenchError, make_key
from .experts import ExpertStore
from .router import Router, seeded_normal
from .routing import Context, Routing

SEQUENCE = 64
"""Tokens of a sequence where a suite says nothing; all tokens are one sequence where this does not divide them."""

VOCABULARY = 1000
"""Token ids that occur (fewer where a routing's ``vocabulary`` is), id v about 1 / (v + 1) times as often as id 0."""

TASKS = 2
"""Tasks that alternate, where a routing's parameters name no other number as ``tasks``."""

IMAGE = (3, 32, 32)
"""The features of a sequence for a router whose parameters name no size of a vector as ``features``."""

HEADS = 4


class StandIns:
    """The made-up fields for ``tokens`` tokens and a routing's ``params``; what is large is made only if asked for."""

    def __init__(self, tokens: int, experts: int, params: Any, seed: int, sequence: int = SEQUENCE) -> None:
        self.tokens, self.experts, self.params, self.seed = tokens, experts, params, seed
        self.length = sequence if tokens and tokens % sequence == 0 else max(1, tokens)
        place_T = torch.arange(tokens)
        self.segment_T = place_T // self.length
        self.modality_T = (place_T % self.length < self.length // 4).long()
        self.task_T = self.segment_T % getattr(params, "tasks", TASKS)

    def fill(self, ctx: Context, router: Router, leave: Set[str] = frozenset()) -> Context:
        """Return ``ctx`` with what ``router`` needs and ``ctx`` lacks, except the fields in ``leave``.

        A generator is given where the router draws. MoebenchError where a field cannot be made up.
        """
        makers: dict[str, Callable[[], Any]] = {
            "rng": self.generator,
            "segment_T": lambda: self.segment_T,
            "modality_T": lambda: self.modality_T,
            "task": lambda: self.task_T,
            "token_ids_T": self._token_ids,
            "features": self._features,
            "prev": self._previous,
            "attn": self._attention,
        }
        names = [name for name in sorted(router.needs - leave) if getattr(ctx, name) is None]
        absent = [name for name in names if name not in makers]
        if absent:
            raise MoebenchError(
                f"the Context's '{absent[0]}' cannot be made up for a layer alone; use another routing."
            )
        return replace(ctx, **{name: makers[name]() for name in names})

    def generator(self) -> torch.Generator:
        """Return a generator in its first state."""
        return torch.Generator().manual_seed(self._number("rng"))

    def _number(self, name: str) -> int:
        return int(make_key([self.seed, name])[:15], 16)

    def _normal(self, name: str, *size: int) -> Tensor:
        return seeded_normal(size, 1.0, self.seed, name)

    def _token_ids(self) -> Tensor:
        rng = torch.Generator().manual_seed(self._number("token_ids"))
        power_T = torch.rand(self.tokens, generator=rng, dtype=torch.float64)
        ids = min(VOCABULARY, getattr(self.params, "vocabulary", VOCABULARY))
        return (float(ids + 1) ** power_T).long().clamp(max=ids) - 1

    def _features(self) -> Tensor:
        size = getattr(self.params, "features", None)
        return self._normal("features", self.tokens // self.length, *(IMAGE if size is None else (size,)))

    def _previous(self) -> Routing:
        """Return a top-1 Routing of the layer before, with the logits that it came from."""
        logits_TE = self._normal("prev", self.tokens, self.experts)
        probs_TE = logits_TE.softmax(-1)
        best = probs_TE.max(-1, keepdim=True)
        return Routing.topk(best.indices, best.values, self.experts, logits_TE, probs_TE)

    def _attention(self) -> Tensor:
        """Return attn float32 [B, HEADS, L, L], causal, rows summing to one."""
        logits = self._normal("attn", self.tokens // self.length, HEADS, self.length, self.length)
        later_LL = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        return logits.masked_fill(later_LL, -torch.inf).softmax(-1)


def alone(fields: StandIns, router: Router, layer: int, store: ExpertStore) -> Context:
    """Return the Context of a router whose layer stands alone: nothing lies before it, whatever its index."""
    return fields.fill(Context(layer=layer, experts=store), router, leave=frozenset({"prev"}))
