"""Claims of the top-k family: Switch, GShard, Mixtral, X-MoE, DeepSeek-V3, and layers upcycled from a dense FFN.

Shape letters: T tokens, H hidden, E expert ids, K slots per token, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...moe.balance.registry import LOSSES
from ...moe.capacity import CapacityRule, choices, limit
from ...moe.experts import ExpertStore
from ...moe.layer import LayerWeights, PreparedLayer, ffn_hidden, moe_forward
from ...moe.routing import Context, Routing
from ...moe.routing_metrics.agreement import kept_entries
from ...moe.transforms.upcycle import upcycle
from .base import Claim, Outcome, Scene, gap, imbalance, largest, layer_shape, logits_of


@torch.no_grad()
def mixtral_renormalised(scene: Scene) -> Outcome:
    """Compare Mixtral's gate with softmax over the two largest logits."""
    routing = scene.router("mixtral", layer_shape(experts=8)).router(scene.normal(512, 32), Context())
    indices_TK, weights_TK = routing.padded()
    best = logits_of(routing).topk(2)
    same = torch.equal(indices_TK, best.indices)
    return Outcome(largest(weights_TK, best.values.softmax(-1)), 0.0, same, "the two gates choose other experts")


@torch.no_grad()
def moe_llava_upcycled(scene: Scene) -> Outcome:
    """Compare copies of one FFN behind each router whose weights sum to one with the FFN itself."""
    hidden, width, experts = 32, 64, 4
    dense = LayerWeights(
        scene.normal(2 * width, hidden, std=hidden**-0.5, name="gate_up"),
        scene.normal(hidden, width, std=width**-0.5, name="down"),
    )
    copies, x_TH = upcycle(dense, experts, scene.seed), scene.normal(256, hidden)
    store = ExpertStore(copies.gate_up, copies.down, ("ffn",) * experts)
    wanted_TH = ffn_hidden(x_TH, dense.gate_up, dense.activation) @ dense.down.T
    gaps = {}
    for name in ("moe_llava", "mixtral", "uni_moe", "gshard", "dit_moe"):
        router = scene.router(name, layer_shape(experts, hidden, width), copies.router_EH).router
        gaps[name] = gap(moe_forward(PreparedLayer(store, router), x_TH), wanted_TH)
    plain = gaps.pop("dit_moe")
    return Outcome(max(gaps.values()), 0.0, plain > 0.05, "weights that do not sum to one made no difference", gaps)


@torch.no_grad()
def switch_even(scene: Scene) -> Outcome:
    """Compare the least balance loss over random loads with that of even load, where shares are probabilities."""
    experts, switch = 16, LOSSES["switch"].function
    losses = []
    for sharpness in (0.1, 1.0, 10.0):
        logits_NE = sharpness * scene.normal(200, experts, name=f"load.{sharpness}")
        losses += [float(switch(_certain((1600 * row_E.softmax(-1)).round().long()))) for row_E in logits_NE]
    even = float(switch(_certain(torch.full((experts,), 100))))
    return Outcome(min(losses), even, max(losses) > 2 * even, "no load was uneven", {"largest": max(losses)})


def _certain(load_E: Tensor) -> Routing:
    """Return top-1 with probability one, so that f = P = load / T."""
    expert_T = torch.repeat_interleave(torch.arange(len(load_E)), load_E)
    probs_TE = torch.nn.functional.one_hot(expert_T, len(load_E)).float()
    return Routing.topk(expert_T[:, None], torch.ones(len(expert_T), 1), len(load_E), None, probs_TE)


@torch.no_grad()
def gshard_priority(scene: Scene) -> Outcome:
    """Count second choices that an expert keeps although it drops a first choice, at half the capacity of k T / E."""
    bundle = scene.router("gshard", layer_shape())
    routing = bundle.router(scene.normal(2048, 32), Context())
    kept_N = kept_entries(routing, limit(routing, bundle.kinds, CapacityRule(0.5, k=2, first_choices=True)))
    second_N = choices(routing) == 1
    lost_first_E = torch.zeros(routing.num_experts, dtype=torch.bool)
    lost_first_E[routing.expert_N[~kept_N & ~second_N]] = True
    wrong = int((kept_N & second_N & lost_first_E[routing.expert_N]).sum())
    in_order = kept_entries(routing, limit(routing, bundle.kinds, CapacityRule(0.5, k=2)))
    figures = {"first_choices_lost": float((~kept_N & ~second_N).sum())}
    sound = bool(lost_first_E.any()) and not torch.equal(in_order, kept_N)
    return Outcome(float(wrong), 0.0, sound, "no first choice was dropped, so nothing was tested", figures)


@torch.no_grad()
def gshard_second(scene: Scene) -> Outcome:
    """Compare the share of second experts dispatched in training with the mean of min(1, 2 g_2)."""
    router, x_TH = scene.router("gshard", layer_shape()).router, scene.normal(20_000, 32)
    certain = router(x_TH, Context())
    drawn = router(x_TH, Context(training=True, rng=scene.rng()))
    wanted = float((2 * certain.padded()[1][:, 1]).clamp(max=1).mean())
    return Outcome(float((drawn.k_T == 2).double().mean()), wanted, 0 < wanted < 1, "the second was certain")


@torch.no_grad()
def xmoe_length(scene: Scene) -> Outcome:
    """Compare X-MoE's logits of x and of 5 x."""
    router, x_TH = scene.router("xmoe", layer_shape()).router, scene.normal(512, 32)
    linear = scene.router("mixtral", layer_shape()).router
    cosine, plain = (
        largest(*(logits_of(one(factor * x_TH, Context())) for factor in (5.0, 1.0))) for one in (router, linear)
    )
    return Outcome(cosine, 0.0, plain > 1, "lengths make no difference to a linear gate either")


@torch.no_grad()
def deepseek_bias(scene: Scene) -> Outcome:
    """Return the largest over the mean load after 400 updates of the bias, on tokens that it has not seen."""
    hidden = 32
    rows_EH = scene.normal(16, hidden, std=hidden**-0.5, name="rows")
    rows_EH[:, 0] = torch.linspace(-2, 2, 16)
    params = {"k": 2, "groups": 1, "groups_kept": 1, "update_rate": 0.005}
    router = scene.router("deepseek_v3", layer_shape(), rows_EH, params).router

    def seen(tokens: int, name: str, learn: bool) -> float:
        x_TH = scene.normal(tokens, hidden, name=name)
        x_TH[:, 0] = 1
        routing = router(x_TH, Context())
        if learn:
            router.update(routing)
        return imbalance(routing)

    before = seen(16_384, "held out", learn=False)
    for step in range(400):
        seen(2048, f"batch {step}", learn=True)
    after = seen(16_384, "held out", learn=False)
    return Outcome(after, 1.0, before > 3, "the load was even from the start", {"before": before})


@torch.no_grad()
def deepseek_apart(scene: Scene) -> Outcome:
    """Compare weights under a random bias with those that the scores of the selected experts give without it."""
    router, x_TH = scene.router("deepseek_v3", layer_shape(experts=64)).router, scene.normal(512, 32)
    unbiased_TK = router(x_TH, Context()).padded()[0]
    router.get_buffer("selector.bias_E").copy_(scene.normal(64, std=0.3, name="bias"))
    routing = router(x_TH, Context())
    indices_TK, weights_TK = routing.padded()
    score_TK = logits_of(routing).sigmoid().gather(1, indices_TK)
    wanted_TK = 2.5 * score_TK / score_TK.sum(-1, keepdim=True)
    moved = not torch.equal(indices_TK, unbiased_TK)
    return Outcome(largest(weights_TK, wanted_TK), 0.0, moved, "the bias changed no choice")


@torch.no_grad()
def deepseek_groups(scene: Scene) -> Outcome:
    """Return the most groups that the 8 experts of a token lie in, which must be 4 of 8 at most."""
    router, x_TH = scene.router("deepseek_v3", layer_shape(experts=64)).router, scene.normal(2048, 32)
    routing = router(x_TH, Context())
    groups = [
        torch.nn.functional.one_hot(indices_TK // 8, 8).amax(1).sum(1).max()
        for indices_TK in (routing.padded()[0], logits_of(routing).topk(8).indices)
    ]
    limited, free = (float(most) for most in groups)
    return Outcome(limited, 4.0, free > 4, "no token wants more groups", {"groups_without_limit": free})


CLAIMS: dict[str, Claim] = {
    "mixtral-renormalised": mixtral_renormalised,
    "moe-llava-upcycled": moe_llava_upcycled,
    "switch-even": switch_even,
    "gshard-priority": gshard_priority,
    "gshard-second": gshard_second,
    "xmoe-length": xmoe_length,
    "deepseek-bias": deepseek_bias,
    "deepseek-apart": deepseek_apart,
    "deepseek-groups": deepseek_groups,
}
