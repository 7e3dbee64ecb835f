"""What a router is asked in suite ``routing``: hidden states, and the fields of a Context that it reads.

A layer that stands alone has no text, task or image around it, so these are made up, from the seed alone: sequences of
equal length; tokens by a power law; the first quarter of each sequence is vision (modality 1), the rest language (0);
tasks alternate from sequence to sequence; images, context vectors and the scores of the layer before are gaussian; an
attention is causal with gaussian logits. Nothing in the hidden states depends on these labels.
Shape letters: T tokens, E expert ids, B sequences of L tokens, V token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..contracts import Case, MoebenchError, Registry
from ..moe.router import Router
from ..moe.routing import Context, Routing
from .models import substream
from .subject import DTYPES, Subject

VOCABULARY = 1000
"""Token ids that occur (fewer where a routing's ``vocabulary`` is), id v about 1 / (v + 1) times as often as id 0."""

TASKS = 2
"""Tasks that alternate, where a routing's parameters name no other number as ``tasks``."""

IMAGE = (3, 32, 32)
"""The features of a sequence for a router whose parameters name no size of a vector as ``features``."""

HEADS = 4


@dataclass(frozen=True)
class Question:
    """The input of one step. Segments and ``labels`` (ids_T by name) are there whether the router reads them or not."""

    x_TH: Tensor
    ctx: Context
    segment_T: Tensor
    labels: Mapping[str, Tensor]
    rng_seed: int

    def context(self) -> Context:
        """Return the Context with a generator in its first state: a router that draws draws the same again."""
        return replace(self.ctx, rng=torch.Generator().manual_seed(self.rng_seed))


def make_question(case: Case, registry: Registry, subject: Subject, number: int) -> Question:
    """Return the input of step ``number``: the traffic's hidden states in the case's dtype, and what goes with them."""
    traffic = registry.get("traffic", case.traffic.name).create(case.traffic.params)
    x_TH = traffic.hidden(subject.source, case.layers[0], case.tokens, number, case.seed).to(DTYPES[case.dtype])
    return question_of(case, registry, subject, x_TH, number)


def question_of(case: Case, registry: Registry, subject: Subject, x_TH: Tensor, number: int) -> Question:
    """Return ``x_TH`` as an input of the case's router."""
    params = registry.params("routing", case.routing)
    seed = substream(case.seed, "routing", number)
    fields = _Fields(len(x_TH), int(case.workload["sequence"]), subject.spec.experts, params, seed)
    ctx = Context(layer=case.layers[0], experts=subject.layer.store)
    ctx = replace(ctx, **fields.wanted(subject.layer.router, ctx))
    labels = {"modality": fields.modality_T, "task": fields.task_T}
    rng_seed = substream(seed, "rng", case.layers[0])  # all else is the same at every layer; a draw is not
    return Question(x_TH, ctx, fields.segment_T, labels, rng_seed)


class _Fields:
    """The made-up fields of a Context; what is large is made only if it is asked for."""

    def __init__(self, tokens: int, sequence: int, experts: int, params: Any, seed: int) -> None:
        self.tokens, self.experts, self.params, self.seed = tokens, experts, params, seed
        self.length = sequence if tokens % sequence == 0 else tokens
        place_T = torch.arange(tokens)
        self.segment_T = place_T // self.length
        self.modality_T = (place_T % self.length < self.length // 4).long()
        self.task_T = self.segment_T % getattr(params, "tasks", TASKS)

    def wanted(self, router: Router, ctx: Context) -> dict[str, Any]:
        """Return the fields that the router needs and ``ctx`` lacks; a generator comes with each call."""
        makers: dict[str, Callable[[], Any]] = {
            "segment_T": lambda: self.segment_T,
            "modality_T": lambda: self.modality_T,
            "task": lambda: self.task_T,
            "token_ids_T": self._token_ids,
            "features": self._features,
            "prev": self._previous,
            "attn": self._attention,
        }
        names = [name for name in sorted(router.needs) if name != "rng" and getattr(ctx, name) is None]
        absent = [name for name in names if name not in makers]
        if absent:
            raise MoebenchError(f"suite routing cannot make up the Context's '{absent[0]}'; leave this routing out.")
        return {name: makers[name]() for name in names}

    def _normal(self, name: str, *size: int) -> Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(substream(self.seed, name)))

    def _token_ids(self) -> Tensor:
        rng = torch.Generator().manual_seed(substream(self.seed, "token_ids"))
        power_T = torch.rand(self.tokens, generator=rng, dtype=torch.float64)
        ids = min(VOCABULARY, getattr(self.params, "vocabulary", VOCABULARY))
        return (float(ids) ** power_T).long() - 1

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
