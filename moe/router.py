"""Routers: a Scorer, a Selector and a Weighter in a Pipeline, and the one function that turns logits into top-k.

Shape letters: T tokens, H hidden, E expert ids, K slots per token, N assignments, D width inside an MLP scorer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..contracts import Selection, make_key
from .experts import Constants
from .routing import Context, Routing

if TYPE_CHECKING:
    from .layer import LayerWeights, SharedExpert
    from .shapes import ModelShape

EPSILON = 1e-20
"""Added to a sum of weights before dividing by it, as DeepSeek-V3 does; it is lost in any ordinary float32 sum."""


class Router(nn.Module):
    """From the input of a layer to its Routing.

    ``needs`` names the Context fields that it reads when they are there; ``causal`` promises that later tokens do not
    change the rows of earlier ones; ``scope`` ``"model"`` means one decision for all layers.
    """

    needs: frozenset[str] = frozenset()
    causal: bool = True
    scope: str = "layer"

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``."""
        raise NotImplementedError

    def calibration(self, x_TH: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Return what calibration inputs tell it, by name, to be kept and given to ``adopt``; most learn nothing.

        Asked only where the routing's parameters say ``calibrated``.
        """
        return {}

    def adopt(self, told: Mapping[str, Tensor]) -> None:
        """Route from now on by what ``calibration`` returned, which may have been kept."""

    def update(self, routing: Routing, signal: Any = None) -> None:
        """Change state that lies outside autograd after a training step; most routers have none.

        ``signal`` is what a router learns from beyond its own Routing, such as MixER's losses per environment.
        """


@dataclass(frozen=True)
class RouterBundle:
    """What a routing factory hands over: the router, the kind of every expert id, and the constant experts.

    ``shared`` is what the scheme keeps always on, for a layer that has no shared expert of its own. FFN experts read
    ``input_scale`` times their input, which ``prepare_layer`` makes part of their weights.
    """

    router: Router
    kinds: tuple[str, ...]
    constants: Constants | None = None
    shared: SharedExpert | None = None
    input_scale: float = 1.0


# --- scorers: (x_TH, ctx) -> logits_TE -------------------------------------------------------------------------------


class Linear(nn.Module):
    """z = x W^T (+ b), computed in ``dtype``: float32 unless a model is known to score in less."""

    def __init__(self, weight_EH: Tensor, bias_E: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight_EH = _parameter(weight_EH, dtype)
        self.bias_E = None if bias_E is None else _parameter(bias_E, dtype)

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE."""
        return nnf.linear(x_TH.to(self.weight_EH.dtype), self.weight_EH, self.bias_E)


class MLP(nn.Module):
    """z = tanh(x W_1^T) W_2^T in float32, without biases: the two-layer scorer of the released MoE++ code."""

    def __init__(self, inner_DH: Tensor, outer_ED: Tensor) -> None:
        super().__init__()
        self.inner_DH = _parameter(inner_DH, torch.float32)
        self.outer_ED = _parameter(outer_ED, torch.float32)

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE."""
        return nnf.linear(torch.tanh(nnf.linear(x_TH.float(), self.inner_DH)), self.outer_ED)


class Residual(nn.Module):
    """z = scorer(x) + W_g z_prev, where z_prev are the logits of the MoE layer before, their own residual included.

    The first MoE layer has no layer before it and scores alone (MoE++, arXiv 2410.07348).
    """

    def __init__(self, scorer: nn.Module, map_EE: Tensor) -> None:
        super().__init__()
        self.scorer = scorer
        self.map_EE = _parameter(map_EE, torch.float32)

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE."""
        logits_TE: Tensor = self.scorer(x_TH, ctx)
        if ctx.prev is None:
            return logits_TE
        previous_TE = ctx.prev.logits_TE
        if previous_TE is None or previous_TE.shape != logits_TE.shape:
            found = "none" if previous_TE is None else tuple(previous_TE.shape)
            raise ValueError(f"the gating residual needs logits {tuple(logits_TE.shape)} in ctx.prev, not {found}.")
        return logits_TE + nnf.linear(previous_TE.float(), self.map_EE)


def _parameter(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter of its own: training must not write into weights that a model source has mapped."""
    return nn.Parameter(value.detach().to(dtype, copy=True))


# --- selectors: scores_TE -> indices_TK ------------------------------------------------------------------------------


def top_k(scores_TE: Tensor, k: int, bias_E: Tensor | None = None, groups: tuple[int, int] | None = None) -> Tensor:
    """Return indices_TK int64 of the best ``k`` of score + bias, the best first.

    ``groups`` is (number of equal groups, groups kept): only experts of the kept groups count, and a group is worth
    the sum of its two best (DeepSeek-V3, arXiv 2412.19437).
    """
    experts = scores_TE.shape[1]
    available = experts if groups is None else groups[1] * (experts // groups[0])
    if not 0 < k <= available or (groups is not None and experts % groups[0]):
        raise ValueError(f"k={k} with groups={groups} cannot be drawn from {experts} experts; choose a smaller k.")
    if bias_E is not None:
        scores_TE = scores_TE + bias_E
    if groups is not None:
        scores_TE = _kept_groups(scores_TE, *groups)
    return scores_TE.topk(k, dim=-1).indices


def _kept_groups(scores_TE: Tensor, groups: int, kept: int) -> Tensor:
    """Return the scores with -inf outside the ``kept`` best groups of each token."""
    grouped_TGM = scores_TE.reshape(len(scores_TE), groups, scores_TE.shape[1] // groups)
    worth_TG = grouped_TGM.topk(min(2, grouped_TGM.shape[-1]), dim=-1).values.sum(-1)
    dropped_TG = torch.ones_like(worth_TG, dtype=torch.bool)
    dropped_TG.scatter_(1, worth_TG.topk(kept, dim=-1).indices, False)
    return grouped_TGM.masked_fill(dropped_TG[:, :, None], float("-inf")).flatten(1)


class TopK(nn.Module):
    """The best ``k`` experts of each token. ``bias_E`` is a buffer: it steers the choice and never gets a gradient."""

    bias_E: Tensor | None

    def __init__(self, k: int, bias_E: Tensor | None = None, groups: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.k = k
        self.groups = groups
        self.register_buffer("bias_E", None if bias_E is None else bias_E.detach().to(torch.float32, copy=True))

    def forward(self, scores_TE: Tensor) -> Tensor:
        """Return indices_TK int64."""
        return top_k(scores_TE, self.k, self.bias_E, self.groups)


# --- weighters: logits_TE -> scores_TE, and (scores_TE, indices_TK) -> weights_TK ------------------------------------


@dataclass(frozen=True)
class Weighter:
    """Scores from logits, and weights of the selected experts from scores, all float32.

    With ``renormalize`` the weights of a token sum to ``scale``; otherwise they are its scores times ``scale``.
    """

    renormalize: bool = False
    scale: float = 1.0

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return scores_TE float32: what experts are ranked by."""
        raise NotImplementedError

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """Return probs_TE, non-negative, for losses; rows need not sum to one."""
        return scores_TE

    def __call__(self, scores_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """Return weights_TK float32."""
        weights_TK = self.unscaled(scores_TE.gather(1, indices_TK))
        if self.renormalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + EPSILON)
        return weights_TK if self.scale == 1.0 else weights_TK * self.scale

    def unscaled(self, scores_TK: Tensor) -> Tensor:
        """Return the weights of the selected before they are renormalised and scaled."""
        return scores_TK


@dataclass(frozen=True)
class Softmax(Weighter):
    """Scores are softmax over all experts."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return softmax(z)."""
        return logits_TE.float().softmax(-1)


@dataclass(frozen=True)
class Sigmoid(Weighter):
    """Scores are the sigmoid of each logit."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return sigmoid(z)."""
        return logits_TE.float().sigmoid()


@dataclass(frozen=True)
class One(Weighter):
    """Every selected expert counts the same; experts are ranked by logits."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return z."""
        return logits_TE.float()

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """Return softmax(z)."""
        return scores_TE.softmax(-1)

    def unscaled(self, scores_TK: Tensor) -> Tensor:
        """Return ones: no gradient reaches the scorer through them."""
        return torch.ones_like(scores_TK)


def weighter(selection: Selection) -> Weighter:
    """Return the weighter that a Selection names."""
    kind = {"softmax": Softmax, "sigmoid": Sigmoid, "one": One}[selection.score]
    return kind(selection.renormalize, selection.scale)


def select(logits_TE: Tensor, selection: Selection, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (indices_TK int64, weights_TK float32): the mathematics of boundary ``logits``.

    ``bias_E`` is the selection bias; it must be given where, and only where, ``selection.bias`` says so.
    """
    if selection.bias != (bias_E is not None):
        raise ValueError(f"the selection says bias={selection.bias}; give bias_E where, and only where, it is true.")
    weigh = weighter(selection)
    scores_TE = weigh.scores(logits_TE)
    indices_TK = top_k(scores_TE, selection.k, bias_E, selection.groups)
    return indices_TK, weigh(scores_TE, indices_TK)


class Pipeline(Router):
    """A router in three parts; tokens where ``ctx.valid_T`` is false get no entries."""

    def __init__(self, scorer: nn.Module, selector: TopK, weighter: Weighter) -> None:
        super().__init__()
        self.scorer = scorer
        self.selector = selector
        self.weighter = weighter

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``, with logits and probabilities of all tokens."""
        logits_TE = self.scorer(x_TH, ctx)
        scores_TE = self.weighter.scores(logits_TE)
        indices_TK = self.selector(scores_TE)
        weights_TK = self.weighter(scores_TE, indices_TK)
        experts = logits_TE.shape[1]
        if ctx.valid_T is not None:
            indices_TK = indices_TK.masked_fill(~ctx.valid_T[:, None], experts)
        return Routing.topk(indices_TK, weights_TK, experts, logits_TE, self.weighter.probabilities(scores_TE))


# --- what the factories share ----------------------------------------------------------------------------------------


def seeded_normal(size: Sequence[int], std: float, seed: int, stream: str) -> Tensor:
    """Return float32 N(0, std^2) numbers that depend on ``seed`` and the name of the stream alone."""
    generator = torch.Generator().manual_seed(int(make_key([seed, stream])[:15], 16))
    return torch.randn(tuple(size), generator=generator) * std


def router_rows(weights: LayerWeights, shape: ModelShape, seed: int) -> Tensor:
    """Return the layer's own router_EH, or a seeded one with std 1 / sqrt(H) where the model has none."""
    wanted = (shape.experts, shape.hidden)
    if weights.router_EH is None:
        return seeded_normal(wanted, shape.hidden**-0.5, seed, "router")
    if tuple(weights.router_EH.shape) != wanted:
        raise ValueError(f"the router is {tuple(weights.router_EH.shape)} where the layer's shape says {wanted}.")
    return weights.router_EH


def grown_rows(weights: LayerWeights, shape: ModelShape, seed: int, count: int, stream: str) -> Tensor:
    """Return rows [E + count, H] float32: the layer's own (``router_rows``), then seeded ones for experts beside them.

    The new rows are as long as the old ones on average, so that no kind of expert is chosen for its scale alone.
    """
    own_EH = router_rows(weights, shape, seed).float().cpu()
    size = float(own_EH.detach().square().mean().sqrt())
    return torch.cat([own_EH, seeded_normal((count, shape.hidden), size, seed, stream)])


def selection_bias(weights: LayerWeights, shape: ModelShape) -> Tensor:
    """Return the layer's own selection bias [E], or zeros, where aux-free balancing starts."""
    if weights.router_bias_E is None:
        return torch.zeros(shape.experts)
    if tuple(weights.router_bias_E.shape) != (shape.experts,):
        raise ValueError(f"the router bias is {tuple(weights.router_bias_E.shape)} for {shape.experts} experts.")
    return weights.router_bias_E
