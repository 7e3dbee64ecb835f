"""What routers share that look beyond their input: fields of the Context, maps per context, one decision per model.

Shape letters: T tokens, H hidden, E expert ids, G contexts (tasks, modalities), S segments (sequences, samples).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .router import Pipeline, Router, TopK, Weighter, router_rows, seeded_normal
from .routing import Context, Routing

if TYPE_CHECKING:
    from .layer import LayerWeights
    from .shapes import ModelShape

# --- fields of the Context -------------------------------------------------------------------------------------------


def needed(ctx: Context, field: str) -> Any:
    """Return a field of ``ctx``; ValueError names it where it is absent."""
    value = getattr(ctx, field)
    if value is None:
        raise ValueError(f"this router cannot decide without the Context's '{field}'; give it.")
    return value


def per_token(ctx: Context, field: str, tokens: int) -> Tensor:
    """Return a field as one value per token, [T]; one number stands for all tokens."""
    value_T = torch.as_tensor(needed(ctx, field))
    if value_T.dim() == 0:
        value_T = value_T.expand(tokens)
    if value_T.shape != (tokens,):
        raise ValueError(f"the Context's '{field}' is {tuple(value_T.shape)} for {tokens} tokens; give one per token.")
    return value_T


def ids_per_token(ctx: Context, field: str, tokens: int, limit: int) -> Tensor:
    """Return a field as ids_T int64 in [0, ``limit``)."""
    ids_T = per_token(ctx, field, tokens).long()
    if tokens and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < limit:
        raise ValueError(f"the Context's '{field}' must lie in [0, {limit}); this router was built for no other ids.")
    return ids_T


def features_per_token(ctx: Context, tokens: int) -> tuple[Tensor, Tensor]:
    """Return (``ctx.features`` [S, ..], segment_T): row s of the features belongs to segment id s."""
    features = needed(ctx, "features")
    return features, ids_per_token(ctx, "segment_T", tokens, len(features))


def number_segments(ctx: Context, tokens: int) -> tuple[Tensor, int]:
    """Return (segment_T numbered from 0 without gaps, number of segments S)."""
    ids_S, number_T = torch.unique(per_token(ctx, "segment_T", tokens), return_inverse=True)
    return number_T, len(ids_S)


def visible_tokens(ctx: Context, tokens: int, causal: bool) -> Tensor:
    """Return bool [T, T]: whether token i may look at token j.

    It may where both are of one segment, j is valid and, with ``causal``, not later; always at itself.
    """
    segment_T = per_token(ctx, "segment_T", tokens)
    seen_TT = segment_T[:, None] == segment_T
    if causal:
        seen_TT = seen_TT.tril()
    if ctx.valid_T is not None:
        seen_TT = seen_TT & ctx.valid_T
    return seen_TT | torch.eye(tokens, dtype=torch.bool, device=segment_T.device)


# --- routers ---------------------------------------------------------------------------------------------------------


class ContextPipeline(Pipeline):
    """A pipeline that says which fields of the Context its parts read, and whether its scores look ahead."""

    def __init__(
        self, scorer: nn.Module, selector: TopK, weighter: Weighter, needs: Iterable[str], causal: bool = True
    ) -> None:
        super().__init__(scorer, selector, weighter)
        self.needs = frozenset(needs)
        self.causal = causal


class OncePerModel(Router):
    """A router whose one decision serves all layers: made by ``plan`` before the first, it travels in ``ctx.plan``."""

    scope = "model"

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        self.needs = router.needs
        self.causal = router.causal

    def plan(self, x_TH: Tensor, ctx: Context, layers: Sequence[int]) -> dict[int, Routing]:
        """Return one and the same Routing for every layer."""
        return dict.fromkeys(layers, self.router(x_TH, ctx))

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing planned for ``ctx.layer``, or decide here where no plan was made."""
        if ctx.plan is None:
            routing: Routing = self.router(x_TH, ctx)
            return routing
        if ctx.layer not in ctx.plan:
            raise ValueError(f"layer {ctx.layer} is not in the Context's 'plan'; plan for all MoE layers.")
        return ctx.plan[ctx.layer]


# --- a map per context -----------------------------------------------------------------------------------------------


class PerContext(nn.Module):
    """z = x W_g^T with one linear map per task or modality g, which ``field`` of the Context names for each token.

    Experts that are not ``visible_GE`` to a context score -inf: softmax gives them 0, and top-k leaves them out.
    """

    hidden_GE: Tensor

    def __init__(self, field: str, weight_GEH: Tensor, visible_GE: Tensor) -> None:
        super().__init__()
        self.field = field
        self.weight_GEH = nn.Parameter(weight_GEH.float().clone())
        self.register_buffer("hidden_GE", ~visible_GE)

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE float32."""
        contexts, experts, _ = self.weight_GEH.shape
        context_T = ids_per_token(ctx, self.field, len(x_TH), contexts).to(x_TH.device)
        logits_TE = torch.zeros(len(x_TH), experts, device=x_TH.device)
        for context, weight_EH in enumerate(self.weight_GEH):
            token_N = (context_T == context).nonzero().flatten()
            logits_TE = logits_TE.index_copy(0, token_N, nnf.linear(x_TH[token_N].float(), weight_EH))
        return logits_TE.masked_fill(self.hidden_GE[context_T], float("-inf"))


def rows_per_context(weights: LayerWeights, shape: ModelShape, seed: int, contexts: int) -> Tensor:
    """Return weight_GEH: the layer's own router for every context, or seeded ones that differ where it has none."""
    if weights.router_EH is not None:
        return torch.stack([router_rows(weights, shape, seed)] * contexts)
    size, std = (shape.experts, shape.hidden), shape.hidden**-0.5
    return torch.stack([seeded_normal(size, std, seed, f"router.{context}") for context in range(contexts)])


def visible_experts(experts: int, ids: Sequence[range]) -> Tensor:
    """Return visible_GE bool from the expert ids that each context may use."""
    visible_GE = torch.zeros(len(ids), experts, dtype=torch.bool)
    for context, allowed in enumerate(ids):
        visible_GE[context, allowed.start : allowed.stop] = True
    return visible_GE
