"""Claims of routers that give a token as many experts as its scores say: BlockFFN, ReMoE and top-p.

Shape letters: T tokens, E expert ids.
"""

from __future__ import annotations

import torch

from ...moe.balance.registry import LOSSES
from ...moe.balance.rows import given
from ...moe.router import Router
from ...moe.routing import Context, Routing
from ...moe.routing_metrics.chunks import chunk_experts
from .base import Claim, Outcome, Scene, layer_shape


@torch.no_grad()
def blockffn_cls(scene: Scene) -> Outcome:
    """Compare the CLS loss with the share of experts that chunks of 64 tokens touch in 100 draws from its weights."""
    routing = scene.router("blockffn", layer_shape(experts=40)).router(scene.normal(1024, 32), Context())
    loss = float(LOSSES["cls"].function(routing, length=64))
    weight_TE, rng = routing.to_dense(), scene.rng()
    share_TE = weight_TE / weight_TE.sum(1, keepdim=True)
    union = 0.0
    for _ in range(100):
        drawn_TE = torch.rand(share_TE.shape, generator=rng) < share_TE
        union += float(chunk_experts(Routing.dense(drawn_TE.float()), 64).double().mean()) / 40
    return Outcome(loss, union / 100, 0.1 < loss < 0.99, "every chunk touches all experts or none")


def largest_jump(router: Router, scene: Scene, steps: int = 2000) -> tuple[float, int]:
    """Return the largest change of a weight between neighbours on a straight line of inputs, and the sets seen."""
    ends_2H = scene.normal(2, 32, name="ends")
    share_T1 = torch.linspace(0, 1, steps)[:, None]
    gate_TE = router(ends_2H[:1] * (1 - share_T1) + ends_2H[1:] * share_T1, Context()).to_dense()
    return float(gate_TE.diff(dim=0).abs().max()), len((gate_TE > 0).unique(dim=0))


@torch.no_grad()
def remoe_continuous(scene: Scene) -> Outcome:
    """Compare the largest jump of ReMoE's weights along a line with that of top-2, which swaps experts."""
    found = [largest_jump(scene.router(name, layer_shape()).router, scene) for name in ("remoe", "mixtral")]
    (jump, sets), (other, other_sets) = found
    return Outcome(jump, other, min(sets, other_sets) > 1, "the experts never change on this line")


@torch.no_grad()
def top_p_share(scene: Scene) -> Outcome:
    """Count tokens whose experts do not hold the share p, or would still hold it without their least."""
    violations = 0
    for p in (0.2, 0.4, 0.7, 0.9):
        router = scene.router("top_p", layer_shape(), params={"p": p}).router
        routing = router(2 * scene.normal(2000, 32), Context())
        kept_TE, probs_TE = routing.to_dense() > 0, given(routing.probs_TE, "probs_TE").double()
        held_T = (probs_TE * kept_TE).sum(1)
        least_T = probs_TE.masked_fill(~kept_TE, 2.0).amin(1)
        violations += int(((held_T < p - 1e-6) | (held_T - least_T >= p + 1e-6)).sum())
    return Outcome(float(violations), 0.0, len(routing.k_T.unique()) > 1, "every token has the same number")


@torch.no_grad()
def top_p_harder(scene: Scene) -> Outcome:
    """Compare the experts of the half of the tokens whose probabilities are least certain with those of the other."""
    router = scene.router("top_p", layer_shape()).router
    routing = router(1.5 * scene.normal(8000, 32), Context())
    entropy_T = torch.special.entr(given(routing.probs_TE, "probs_TE")).sum(1)
    hard_T = entropy_T > entropy_T.median()
    hard, easy = (float(routing.k_T[chosen_T].double().mean()) for chosen_T in (hard_T, ~hard_T))
    return Outcome(hard, easy, len(routing.k_T.unique()) > 1, "every token has the same number")


CLAIMS: dict[str, Claim] = {
    "blockffn-cls": blockffn_cls,
    "remoe-continuous": remoe_continuous,
    "top-p-share": top_p_share,
    "top-p-harder": top_p_harder,
}
