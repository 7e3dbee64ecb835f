"""Claims about experts behind a router: MoE-X, MoFME, PR-MoE and Time-MoE.

Shape letters: T tokens, H hidden, E expert ids, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...moe.experts import ExpertStore
from ...moe.layer import PreparedLayer, SharedExpert, moe_forward
from ...moe.routers.mofme import VARIANCE_FLOOR, film_apart, film_merged
from ...moe.routing import Context
from ...moe.routing_metrics.cost import counted_flops
from .base import Claim, Outcome, Scene, gap, layer_shape, logits_of

# --- MoE-X -----------------------------------------------------------------------------------------------------------


def moex(scene: Scene, width: int, tokens: int = 200) -> tuple[PreparedLayer, Context, Tensor]:
    """Return a layer of 8 ReLU experts behind MoE-X's router, its Context, and tokens.

    The first weights are Gaussian per input channel, with a mean and a variance of their own for each expert.
    """
    experts, hidden = 8, 32
    mean_E1H = scene.normal(experts, 1, hidden, std=0.3, name="mean")
    deviation_E1H = 0.5 + scene.normal(experts, 1, hidden, name="deviation").abs()
    gate_up = mean_E1H + deviation_E1H * scene.normal(experts, width, hidden, name="up")
    down = scene.normal(experts, hidden, width, std=1 / width, name="down")
    store = ExpertStore(gate_up, down, ("ffn",) * experts, "relu", False)
    router = scene.router("moex", layer_shape(experts, hidden, width, activation="relu", gated=False)).router
    return PreparedLayer(store, router), Context(experts=store), scene.normal(tokens, hidden)


def firing(layer: PreparedLayer, x_TH: Tensor) -> Tensor:
    """Return the share of each expert's neurons that fire for each token, [T, E]."""
    up_EFH = torch.stack([layer.store.weights(expert)[0] for expert in range(layer.store.num_experts)])
    return torch.einsum("th,efh->tef", x_TH, up_EFH).gt(0).float().mean(-1)


@torch.no_grad()
def moex_firing(scene: Scene) -> Outcome:
    """Return the correlation of (1 - score) / 2 with the share of 2000 neurons that fire."""
    layer, ctx, x_TH = moex(scene, width=2000)
    predicted_TE = (1 - logits_of(layer.router(x_TH, ctx))) / 2
    observed_TE = firing(layer, x_TH)
    correlation = torch.corrcoef(torch.stack([predicted_TE.flatten(), observed_TE.flatten()]))[0, 1]
    figures = {"largest_error": float((predicted_TE - observed_TE).abs().max())}
    return Outcome(float(correlation), 1.0, float(observed_TE.std()) > 0.05, "all experts fire alike", figures)


@torch.no_grad()
def moex_sparser(scene: Scene) -> Outcome:
    """Compare the neurons that fire in the selected experts with those of all experts."""
    layer, ctx, x_TH = moex(scene, width=256)
    active_TE = firing(layer, x_TH)
    chosen_TE = layer.router(x_TH, ctx).to_dense() > 0
    sound = int(chosen_TE.sum()) == 2 * len(x_TH)
    return Outcome(float(active_TE[chosen_TE].mean()), float(active_TE.mean()), sound, "k is not 2")


@torch.no_grad()
def moex_wide(scene: Scene) -> Outcome:
    """Compare the layer with one MLP of width E F whose hidden units are multiplied by their expert's weight."""
    width = 256
    layer, ctx, x_TH = moex(scene, width)
    weights = [layer.store.weights(expert) for expert in range(layer.store.num_experts)]
    gate_TE = layer.router(x_TH, ctx).to_dense()
    wide_TF = nnf.relu(x_TH @ torch.cat([up for up, _ in weights]).T) * gate_TE.repeat_interleave(width, dim=1)
    wanted_TH = wide_TF @ torch.cat([down for _, down in weights], dim=1).T
    sound = int((gate_TE > 0).any(0).sum()) > 2
    return Outcome(gap(moe_forward(layer, x_TH, ctx), wanted_TH), 0.0, sound, "hardly an expert is used")


# --- MoFME -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mofme_merged(scene: Scene) -> Outcome:
    """Compare mixing the maps of feature-modulating experts with mixing their outputs, under training weights."""
    h_TH = scene.normal(64, 32)
    scale_EHH, shift_EHH = (scene.normal(8, 32, 32, std=32**-0.5, name=name) for name in ("scale", "shift"))
    routing = scene.router("mofme", layer_shape(experts=8)).router(h_TH, Context(training=True, rng=scene.rng()))
    apart_TH, merged_TH = (film(h_TH, scale_EHH, shift_EHH, routing) for film in (film_apart, film_merged))
    return Outcome(gap(merged_TH, apart_TH), 0.0, bool((routing.weight_N < 0).any()), "no weight is negative")


@torch.no_grad()
def mofme_released(scene: Scene) -> Outcome:
    """Return the largest |r - mean of 5 passes| where passes have no dropout, as in the released code."""
    x_TH, found = scene.normal(512, 32), []
    for dropout in (0.0, 0.1):
        router = scene.router("mofme", layer_shape(experts=8), params={"dropout": dropout}).router
        weight_N = router(x_TH, Context(training=True, rng=scene.rng())).weight_N
        found.append(float(weight_N.abs().max()))
    figures = {"largest_weight_with_dropout": found[1]}
    return Outcome(found[0] * VARIANCE_FLOOR**0.5, 0.0, found[1] > 0.5, "dropout leaves no weights either", figures)


# --- sizes -----------------------------------------------------------------------------------------------------------


def pr_moe_parameters(scene: Scene) -> Outcome:
    """Return by how many billions of expert parameters PR-MoE is smaller than the 1.3B model with 128 experts."""
    rule = scene.registry.get("routing", "pr_moe").params_from()
    shape = layer_shape(128, hidden=2048, width=8192, layers=12, gated=False)
    pyramid = rule.PYRAMIDS["1.3B"]
    standard = len(shape.moe_layers) * shape.expert_bytes(1)
    residual = len(shape.moe_layers) * shape.with_(experts=1).expert_bytes(1) * rule.shared.width
    small = sum(shape.with_(experts=experts).expert_bytes(1) for experts in pyramid) + residual
    figures = {"standard": standard / 1e9, "pr_moe": small / 1e9}
    sound = len(pyramid) == len(shape.moe_layers)
    return Outcome((standard - small) / 1e9, 52 - 31, sound, "the pyramid has another number of layers", figures)


@torch.no_grad()
def time_moe_active(scene: Scene) -> Outcome:
    """Compare the flops of k experts of width F / k and the shared one, k = 1 to 8, with an FFN's of width 2F."""
    hidden, width, tokens = 32, 64, 64
    found = {f"flops_k_{k}": active_flops(scene, k, hidden, width, tokens) for k in (1, 2, 4, 8)}
    wanted = 2.0 * tokens * 3 * hidden * 2 * width
    farthest = max(found.values(), key=lambda flops: abs(flops - wanted))
    return Outcome(farthest, wanted, min(found.values()) > 0, "nothing was counted", found)


def active_flops(scene: Scene, k: int, hidden: int, width: int, tokens: int) -> float:
    """Return the flops of Time-MoE's experts for ``tokens`` tokens, the router and the shared gate left out."""
    rule = scene.registry.get("routing", "time_moe").params_from({"k": k})
    own = width // k
    always = round(rule.shared.width * own)
    store = ExpertStore(torch.zeros(8, 2 * own, hidden), torch.zeros(8, hidden, own), ("ffn",) * 8)
    shared = SharedExpert(torch.zeros(2 * always, hidden), torch.zeros(hidden, always))
    bundle, x_TH = scene.router("time_moe", layer_shape(8, hidden, own), params={"k": k}), scene.normal(tokens, hidden)
    layer, routing = PreparedLayer(store, bundle.router, shared), bundle.router(x_TH, Context())
    return float(counted_flops(lambda: moe_forward(layer, x_TH, routing=routing)))


CLAIMS: dict[str, Claim] = {
    "moex-firing": moex_firing,
    "moex-sparser": moex_sparser,
    "moex-wide": moex_wide,
    "mofme-merged": mofme_merged,
    "mofme-released": mofme_released,
    "pr-moe-parameters": pr_moe_parameters,
    "time-moe-active": time_moe_active,
}
