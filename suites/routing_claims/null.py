"""Claims about experts that do nothing, or next to nothing: AdaMoE and MoE++; and AdaMoE-VLA's scale adapter.

Shape letters: T tokens, E expert ids, K slots per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...moe.balance.registry import LOSSES
from ...moe.capacity import CapacityRule, limit
from ...moe.routing import Context, Routing
from ..moepp_trials import balanced_routing
from .base import Claim, Outcome, Scene, layer_shape


@torch.no_grad()
def adamoe_share(scene: Scene) -> Outcome:
    """Compare the mean number of true experts, probabilities even, with K n / (n + m) for n = 16, m = 5 and K = 3."""
    true, null, k = 16, 5, 3
    router = scene.router("adamoe", layer_shape(true, true + null), params={"k": k, "null": null}).router
    router.get_parameter("scorer.weight_EH").copy_(torch.eye(true + null))
    routing = router(scene.normal(40_000, true + null), Context())
    figures = {"k_min": float(routing.k_T.min()), "k_max": float(routing.k_T.max())}
    varied = len(routing.k_T.unique()) > 1
    mean = float(routing.k_T.double().mean())
    return Outcome(mean, k * true / (true + null), varied, "every token has the same number", figures)


@torch.no_grad()
def adamoe_bucket(scene: Scene) -> Outcome:
    """Compare the bucketed loss of null load spread over 4 nulls with that of the same load on one of them."""
    switch = LOSSES["switch"].function
    spread, single = (with_nulls(scene, split) for split in ((24, 24, 24, 24), (96, 0, 0, 0)))
    bucketed = [float(switch(routing, bucket=range(8, 12))) for routing in (spread, single)]
    figures = {"plain_spread": float(switch(spread)), "plain_single": float(switch(single))}
    sound = figures["plain_single"] > 1.5 * figures["plain_spread"]
    return Outcome(bucketed[0], bucketed[1], sound, "the plain loss does not see the split either", figures)


def with_nulls(scene: Scene, split: Sequence[int], true: int = 8) -> Routing:
    """Return two true experts and one null per token; load and probability of the nulls are ``split`` over them."""
    tokens = sum(split)
    true_TK = scene.normal(tokens, true, name="choice").topk(2).indices
    null_T1 = torch.repeat_interleave(torch.arange(len(split)), torch.tensor(split))[:, None] + true
    real_TE = scene.normal(tokens, true, name="probability").softmax(-1) * 0.6
    null_TE = (torch.tensor(split) / tokens * 0.4).expand(tokens, -1)
    probs_TE = torch.cat([real_TE, null_TE], dim=1)
    return Routing.topk(torch.cat([true_TK, null_T1], dim=1), torch.ones(tokens, 3), true + len(split), None, probs_TE)


@torch.no_grad()
def moepp_capacity(scene: Scene) -> Outcome:
    """Return the share of assignments that the printed capacities drop where the load is at the loss's optimum."""
    kinds, tau, k = ("ffn",) * 8 + ("constant",) * 2 + ("copy", "zero"), 0.75, 2
    routing = balanced_routing(kinds, tau, 4096, k, scene.rng())
    dropped = [
        1 - len(limit(routing, kinds, CapacityRule(1.1, slots, tau=tau)).token_N) / len(routing.token_N)
        for slots in (1, k)
    ]
    return Outcome(dropped[0], 0.0, dropped[1] == 0, "even K T slots drop something", {"dropped_with_k_t": dropped[1]})


def adamoe_vla_decoupled(scene: Scene) -> Outcome:
    """Return the largest gradient of the balance loss with respect to the scale adapter."""
    router = scene.router("adamoe_vla", layer_shape(8), params={"k": 2}).router
    loss = LOSSES["switch"].function(router(scene.normal(256, 32), Context()))
    rows = [router.get_parameter(f"{part}.weight_EH") for part in ("adapter", "scorer")]
    adapter, scorer = torch.autograd.grad(loss, rows, allow_unused=True)
    reached = scorer is not None and float(scorer.abs().max()) > 1e-5
    size = 0.0 if adapter is None else float(adapter.abs().max())
    return Outcome(size, 0.0, reached, "the balance loss does not reach the router either")


CLAIMS: dict[str, Claim] = {
    "adamoe-share": adamoe_share,
    "adamoe-bucket": adamoe_bucket,
    "moepp-capacity": moepp_capacity,
    "adamoe-vla-decoupled": adamoe_vla_decoupled,
}
