"""Self-contrast decoding of an MoE model, SCMoE (arXiv 2405.14507): what a weaker routing would say is held against it.

Each step runs the model twice, with its own routing (strong) and with other experts (weak), each with a cache of its
own, and scores the tokens V that the strong pass finds at least alpha times as likely as its favourite:
z = (1 + beta) z_strong / T_strong - beta z_weak / T_weak. beta = 0, weak = strong, or alpha = 1 is plain decoding.

Shape letters: B sequences, S tokens so far, V vocabulary, T tokens of a call, H hidden, E experts, K ranks.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..contracts import Backend, MoebenchError, Registry
from ..moe.layer import LayerWeights
from ..moe.router import EPSILON, Pipeline, Router, RouterBundle
from ..moe.router_context import needed
from ..moe.router_parts import masked_routing
from ..moe.routers.nucleus import nucleus
from ..moe.routing import Context, Routing
from ..moe.shapes import ModelShape
from .models.reroute import Rerouted, RouterFactory, reroute

Taken = tuple[int, ...] | float | Literal["random"]
"""Which experts a pass takes: see ``SelfContrast``."""


@dataclass(frozen=True)
class SelfContrast:
    """Parameters of SCMoE.

    ``weak`` are the experts of the weak pass: ranks, 0 the best ((0,) is top-1, and the default is that of the authors'
    example, which reads "rank-3 routing"); ``"random"``, one by chance for each token and layer; or a number, as many
    of the best as hold this share of the probability (dynamic routing, 0.6 in the paper). ``strong`` are those of the
    strong pass, None the model's own rule. A pass draws by chance from ``seed``; both draw the same.
    The released code never emits the end-of-sequence token unless asked to (``early_stop``): ``never_end``, which here
    leaves it out before looking for likely tokens, so that one remains.
    """

    weak: Taken = (2,)
    strong: Taken | None = None
    beta: float = 0.5
    alpha: float = 0.1
    strong_temperature: float = 1.0
    weak_temperature: float = 1.0
    sample: bool = False
    never_end: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.beta < 0:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1], and beta={self.beta} must not be negative.")
        if min(self.strong_temperature, self.weak_temperature) <= 0:
            raise ValueError("temperatures must be positive.")
        for taken in (self.weak, self.strong):
            if isinstance(taken, str) and taken != "random":
                raise ValueError(
                    f"'{taken}' names no experts; give ranks such as (2,), 'random', or a share such as 0.6."
                )
            if isinstance(taken, (int, float)) and not 0 < taken <= 1:
                raise ValueError(f"a share of {taken} must lie in (0, 1]; a rank is written (2,).")


@dataclass(frozen=True)
class Decoded:
    """The sequences, prompt included, [B, S] int64, and what each pass had at the last step.

    ``changed_B`` counts the steps at which a sequence's token is not the strong pass' favourite. For each pass there
    are the most experts that a token had in any layer of any step, and the bytes of the distinct experts of all layers
    at each step, of which the first computes the prompt.
    """

    ids_BS: Tensor
    changed_B: Tensor
    strong_experts: int
    weak_experts: int
    strong_bytes: tuple[int, ...]
    weak_bytes: tuple[int, ...]


# --- the rank override -----------------------------------------------------------------------------------------------


class Ranked(Router):
    """A pipeline that takes the experts in ``ctx.ranks`` instead of the best k, where a decoder gives some.

    Weights follow the model's own rule over the experts taken: one expert, renormalised, has weight 1.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        if pipeline.selector.groups is not None and pipeline.selector.groups[0] != pipeline.selector.groups[1]:
            raise ValueError("ranks are over all experts, and this model keeps a few groups; use one without groups.")
        self.pipeline = pipeline
        self.needs = pipeline.needs | {"ranks", "rng"}
        self.causal = pipeline.causal

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the pipeline's own Routing, or that of the experts in ``ctx.ranks``."""
        if ctx.ranks is None:
            own: Routing = self.pipeline(x_TH, ctx)
            return own
        logits_TE = self.pipeline.scorer(x_TH, ctx)
        weigh = self.pipeline.weighter
        scores_TE = weigh.scores(logits_TE)
        probs_TE = weigh.probabilities(scores_TE)
        keep_TE = self._kept(scores_TE, probs_TE, ctx)
        gate_TE = weigh.unscaled(scores_TE) * keep_TE
        if weigh.renormalize:
            gate_TE = gate_TE / (gate_TE.sum(-1, keepdim=True) + EPSILON)
        return masked_routing(gate_TE * weigh.scale, keep_TE, ctx, logits_TE, probs_TE)

    def _kept(self, scores_TE: Tensor, probs_TE: Tensor, ctx: Context) -> Tensor:
        """Return keep_TE bool, true for the experts that ``ctx.ranks`` names."""
        if isinstance(ctx.ranks, float | int):
            return nucleus(probs_TE / probs_TE.sum(-1, keepdim=True), ctx.ranks)
        if ctx.ranks == "random":
            indices_TK = by_chance(scores_TE, needed(ctx, "rng"))
        else:
            indices_TK = at_ranks(scores_TE, ctx.ranks or (), self.pipeline.selector.bias_E)
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, indices_TK, True)


def at_ranks(scores_TE: Tensor, ranks: tuple[int, ...], bias_E: Tensor | None = None) -> Tensor:
    """Return indices_TK int64 of the experts at ``ranks`` of score + bias, 0 the best; equal scores by rising id."""
    if not ranks or len(set(ranks)) != len(ranks) or not set(ranks) <= set(range(scores_TE.shape[1])):
        raise ValueError(f"ranks={ranks} must be distinct and lie below {scores_TE.shape[1]}, the number of experts.")
    ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
    return ranked_TE.argsort(dim=-1, descending=True, stable=True)[:, list(ranks)]


def by_chance(scores_TE: Tensor, rng: torch.Generator) -> Tensor:
    """Return indices_T1 int64: one of all experts for each token, every one as likely as another."""
    size = (len(scores_TE), 1)
    return torch.randint(scores_TE.shape[1], size, generator=rng, device=rng.device).to(scores_TE.device)


def ranked() -> RouterFactory:
    """Return the factory of the model's own top-k router with the rank override."""
    own: RouterFactory = Registry.load().get("routing", "topk").create()

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        bundle = own(weights, shape, seed)
        if not isinstance(bundle.router, Pipeline):
            raise MoebenchError("routing 'topk' is no pipeline here, so it has no ranks; pass a factory of your own.")
        return replace(bundle, router=Ranked(bundle.router))

    return factory


# --- decoding --------------------------------------------------------------------------------------------------------


def contrast(strong_BV: Tensor, weak_BV: Tensor, params: SelfContrast) -> Tensor:
    """Return scores_BV: the contrast, and -inf outside the tokens that the strong pass finds likely enough."""
    strong_BV = strong_BV / params.strong_temperature
    weak_BV = weak_BV / params.weak_temperature
    scores_BV = (1 + params.beta) * strong_BV - params.beta * weak_BV
    if params.alpha == 0:
        return scores_BV
    cutoff_B1 = strong_BV.max(dim=-1, keepdim=True).values + math.log(params.alpha)
    return scores_BV.masked_fill(strong_BV < cutoff_B1, float("-inf"))


@torch.no_grad()
def decode(
    model: Any,
    ids_BS: Tensor,
    params: SelfContrast,
    new_tokens: int,
    end: int | None = None,
    rng: torch.Generator | None = None,
    backend: str | Backend | None = None,
    factory: RouterFactory | None = None,
) -> Decoded:
    """Return ``ids_BS`` (prompts of one length, no padding) with up to ``new_tokens`` more tokens.

    A sequence that has emitted ``end`` goes on with ``end``; decoding stops when all have. ``rng`` is what samples are
    drawn with. ``factory`` makes routers that read ``Context.ranks``; by default ``ranked`` does.
    """
    changed_B = ids_BS.new_zeros(len(ids_BS))
    ended_B = torch.zeros_like(changed_B, dtype=torch.bool)
    with reroute(model, ranked() if factory is None else factory, backend) as routers:
        strong, weak = (_Pass(routers, taken, params.seed) for taken in (params.strong, params.weak))
        for _ in range(new_tokens):
            strong_BV, weak_BV = strong.next_logits(ids_BS), weak.next_logits(ids_BS)
            if params.never_end and end is not None:
                strong_BV[:, end] = float("-inf")
            token_B = _choose(contrast(strong_BV, weak_BV, params), params.sample, rng)
            changed_B += (token_B != strong_BV.argmax(-1)) & ~ended_B
            if end is not None:
                token_B = token_B.masked_fill(ended_B, end)
                ended_B = ended_B | (token_B == end)
            ids_BS = torch.cat([ids_BS, token_B[:, None]], dim=1)
            if bool(ended_B.all()):
                break
        return Decoded(
            ids_BS, changed_B, strong.most_experts, weak.most_experts, tuple(strong.bytes), tuple(weak.bytes)
        )


class _Pass:
    """One of the two passes, with the cache of its own that its routing requires, and chance of its own."""

    def __init__(self, routers: Rerouted, taken: Taken | None, seed: int) -> None:
        from transformers import DynamicCache

        self.routers, self.taken = routers, taken
        self.rng = torch.Generator().manual_seed(seed)
        self.cache = DynamicCache(config=routers.model.config)
        self.seen = 0
        self.most_experts = 0
        self.bytes: list[int] = []

    def next_logits(self, ids_BS: Tensor) -> Tensor:
        """Return logits_BV of the token that follows, float32; only tokens not yet in the cache are computed."""
        model: Any = self.routers.model
        self.routers.context = replace(self.routers.context, ranks=self.taken, rng=self.rng)
        output = model(ids_BS[:, self.seen :], use_cache=True, **{cache_name(model): self.cache})
        self.seen = ids_BS.shape[1]
        self._count()
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV

    def _count(self) -> None:
        """Count experts per token, and the bytes of the distinct experts, of the call that has just ended."""
        self.bytes.append(0)
        for index, routing in self.routers.routings.items():
            store = self.routers.layers[index].store
            self.most_experts = max(self.most_experts, int(routing.k_T.max()))
            self.bytes[-1] += int((routing.counts_E > 0).sum()) * (store.nbytes // len(store.ffn_ids))


def cache_name(model: Any) -> str:
    """Return what the model's forward calls its cache; transformers 5 has renamed it on the way."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _choose(scores_BV: Tensor, sample: bool, rng: torch.Generator | None) -> Tensor:
    """Return token_B: the best, or one drawn from softmax(scores)."""
    if not sample:
        return scores_BV.argmax(-1)
    return torch.multinomial(scores_BV.softmax(-1), 1, generator=rng)[:, 0]
