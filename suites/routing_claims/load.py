"""Claims about load and its cost: expert choice, Hash layers, THOR, and what Z-code M3 does for inference.

Shape letters: T tokens, H hidden, E expert ids, V token ids.
"""

from __future__ import annotations

from functools import partial

import torch

from ...moe.capacity import CapacityRule, with_capacity
from ...moe.layer import LayerWeights
from ...moe.routing import Context
from ...moe.routing_metrics.cost import counted_flops
from ...moe.routing_metrics.drops import drop_metrics
from ...moe.transforms.aggregate import aggregate
from .base import Claim, Outcome, Scene, imbalance, layer_shape


@torch.no_grad()
def expert_choice_load(scene: Scene) -> Outcome:
    """Return the farthest that any expert's load is from k T / E."""
    x_TH = scene.normal(4096, 32)
    routing, free = (scene.router(name, layer_shape()).router(x_TH, Context()) for name in ("expert_choice", "mixtral"))
    off = float((routing.counts_E - 2 * 4096 / 16).abs().max())
    starved = float((routing.k_T == 0).double().mean())
    return Outcome(off, 0.0, imbalance(free) > 1.05, "top-k is even here too", {"tokens_without_experts": starved})


@torch.no_grad()
def expert_choice_variable(scene: Scene) -> Outcome:
    """Return the share of tokens that do not have the mean number of experts, 2."""
    routing = scene.router("expert_choice", layer_shape()).router(scene.normal(4096, 32), Context())
    mean = float(routing.k_T.double().mean())
    figures = {"k_max": float(routing.k_T.max()), "more_than_two": float((routing.k_T > 2).double().mean())}
    other = float((routing.k_T != 2).double().mean())
    return Outcome(other, 0.0, mean == 2, f"a token has {mean} experts on average", figures)


@torch.no_grad()
def hash_free(scene: Scene) -> Outcome:
    """Count the flops of a Hash layer's router."""
    x_TH = scene.normal(256, 32)
    ctx = Context(token_ids_T=torch.randint(65_536, (256,), generator=scene.rng()))
    routers = (scene.router(name, layer_shape()).router for name in ("hash", "switch"))
    flops = [counted_flops(partial(router, x_TH, ctx)) for router in routers]
    return Outcome(float(flops[0]), 0.0, flops[1] == 2 * 256 * 32 * 16, "flops are not counted as 2 T H E")


@torch.no_grad()
def hash_balanced(scene: Scene) -> Outcome:
    """Compare the imbalance of a balanced table with that of a random one, for ids of falling frequency."""
    vocabulary, exponent, tokens = 5000, 0.7, 20_000
    frequency_V = torch.arange(1, vocabulary + 1, dtype=torch.float64) ** -exponent
    ids_T = torch.multinomial(frequency_V, tokens, replacement=True, generator=scene.rng("ids"))
    found = []
    for table in ("balanced", "random"):
        params = {"table": table, "vocabulary": vocabulary, "exponent": exponent}
        router = scene.router("hash", layer_shape(), params=params).router
        found.append(imbalance(router(torch.zeros(tokens, 32), Context(token_ids_T=ids_T))))
    return Outcome(found[0], found[1], found[1] > 1.02, "the random table is even too")


@torch.no_grad()
def thor_uniform(scene: Scene) -> Outcome:
    """Return the largest over the mean load of random experts for 4096 tokens and 16 experts."""
    router = scene.router("thor", layer_shape()).router
    routing = router(torch.zeros(4096, 32), Context(rng=scene.rng()))
    learned = sum(parameter.numel() for parameter in router.parameters())
    return Outcome(imbalance(routing), 1.0, learned == 0, "a random router has parameters")


@torch.no_grad()
def zcode_rts(scene: Scene) -> Outcome:
    """Compare the drop rates of the second and of the first half of a batch, tokens selected at random."""
    bundle, x_TH = scene.router("switch", layer_shape(hidden=48)), scene.normal(4096, 48)
    asked = bundle.router(x_TH, Context())
    halves = {}
    for policy in ("random", "position"):
        cut = with_capacity(bundle, CapacityRule(1.0, policy=policy)).router
        halves[policy] = drop_metrics(asked, cut(x_TH, Context(rng=scene.rng())), parts=2)[1].values
    by_chance, by_position = halves["random"], halves["position"]
    figures = {"position_first_half": by_position[0], "position_second_half": by_position[1]}
    sound = by_position[1] - by_position[0] > 0.1
    return Outcome(by_chance[1], by_chance[0], sound, "dropping by position has no bias to remove", figures)


@torch.no_grad()
def zcode_aoe(scene: Scene) -> Outcome:
    """Return the ratio of top-1 probabilities of a layer aggregated with itself and of the layer."""
    experts, hidden, x_TH = 12, 32, scene.normal(512, 32)
    layer = LayerWeights(
        scene.normal(experts, 8, hidden, name="gate_up"),
        scene.normal(experts, hidden, 4, name="down"),
        scene.normal(experts, hidden, std=hidden**-0.5, name="rows"),
    )
    both = aggregate(layer, layer)
    single, double = (
        scene.router("switch", layer_shape(len(one.down), hidden), one.router_EH).router(x_TH, Context())
        for one in (layer, both)
    )
    ratio_T = double.weight_N / single.weight_N
    same = torch.equal(double.expert_N % experts, single.expert_N)
    farthest = ratio_T[(ratio_T - 0.5).abs().argmax()]
    return Outcome(float(farthest), 0.5, same, "the aggregate chooses other experts")


CLAIMS: dict[str, Claim] = {
    "expert-choice-load": expert_choice_load,
    "expert-choice-variable": expert_choice_variable,
    "hash-free": hash_free,
    "hash-balanced": hash_balanced,
    "thor-uniform": thor_uniform,
    "zcode-rts": zcode_rts,
    "zcode-aoe": zcode_aoe,
}
