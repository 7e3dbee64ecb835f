"""Claims of routers that know more than a token: Graph of Tokens, Read-ME, M3ViT, MoIIE and MixER.

Shape letters: T tokens, H hidden, E expert ids, F channels of a dense FFN, C private channels, S environments.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...moe.experts import ExpertStore
from ...moe.layer import PreparedLayer, SharedExpert, ffn_hidden, moe_forward
from ...moe.router import Router
from ...moe.router_context import OncePerModel
from ...moe.routers.environment import EnvironmentLosses, MixER
from ...moe.routing import Context
from ...moe.routing_metrics.agreement import fluctuation
from .base import Claim, Outcome, Scene, gap, layer_shape

# --- Graph of Tokens -------------------------------------------------------------------------------------------------


@torch.no_grad()
def got_flips(scene: Scene, spread: float, clusters: int | None) -> Outcome:
    """Compare how often noise changes the first expert with similarity-aware routing and with top-2 of the same rows.

    Tokens lie at a distance of ``spread`` N(0, 1) around ``clusters`` centres N(0, 1), or are N(0, 1) without any.
    """
    tokens, shape = 960, layer_shape()
    x_TH = spread * scene.normal(tokens, 32)
    if clusters is not None:
        x_TH += scene.normal(clusters, 32, name="centres")[torch.arange(tokens) % clusters]
    noisy_TH = x_TH + 0.3 * scene.normal(tokens, 32, name="noise")
    rows_EH = scene.normal(16, 32, std=32**-0.5, name="rows")
    ctx = Context(segment_T=torch.zeros(tokens, dtype=torch.int64))

    def flips(router: Router) -> float:
        return float(fluctuation(router(x_TH, ctx), router(noisy_TH, ctx))[0].value or 0)

    plain = flips(scene.router("mixtral", shape, rows_EH).router)
    mixed, causal = (
        flips(scene.router("got_similarity", shape, rows_EH, {"causal": causal}).router) for causal in (False, True)
    )
    return Outcome(mixed, plain, 0 < plain < 1, "noise changes nothing, or everything", {"flips_causal": causal})


# --- Read-ME ---------------------------------------------------------------------------------------------------------


def read_me(scene: Scene, tokens: int, layers: int = 1) -> tuple[OncePerModel, Context]:
    """Return the pre-gating router for 7 experts, and a Context of sequences of 16 token ids."""
    shape = layer_shape(experts=7, layers=layers)
    router = scene.router("read_me", shape, params={"vocabulary": 500}).router
    if not isinstance(router, OncePerModel):
        raise TypeError("routing 'read_me' no longer decides once per model; mend this claim.")
    ids_T = torch.randint(500, (tokens,), generator=scene.rng("ids"))
    return router, Context(token_ids_T=ids_T, segment_T=torch.arange(tokens) // 16)


@torch.no_grad()
def read_me_sliced(scene: Scene) -> Outcome:
    """Compare a dense FFN under the mask of each token's cluster with slices behind the router and a residual."""
    hidden, width, residual, private, tokens = 32, 256, 32, 96, 128
    gate_FH, up_FH = (scene.normal(width, hidden, std=hidden**-0.5, name=name) for name in ("gate", "up"))
    down_HF, x_TH = scene.normal(hidden, width, std=width**-0.5, name="down"), scene.normal(tokens, hidden)
    private_EC = residual + scene.normal(7, width - residual, name="masks").argsort(1)[:, :private]
    mask_EF = torch.zeros(7, width).scatter(1, private_EC, 1.0)
    mask_EF[:, :residual] = 1
    router, ctx = read_me(scene, tokens)
    cluster_T = router(x_TH, ctx).padded()[0][:, 0]
    masked_TH = (ffn_hidden(x_TH, torch.cat([gate_FH, up_FH]), "silu") * mask_EF[cluster_T]) @ down_HF.T
    gate_up = torch.cat([gate_FH[private_EC], up_FH[private_EC]], dim=1)
    store = ExpertStore(gate_up, down_HF.T[private_EC].transpose(1, 2), ("ffn",) * 7)
    always_on = SharedExpert(torch.cat([gate_FH[:residual], up_FH[:residual]]), down_HF[:, :residual])
    sliced_TH = moe_forward(PreparedLayer(store, router, always_on), x_TH, ctx)
    used = len(cluster_T.unique())
    return Outcome(gap(sliced_TH, masked_TH), 0.0, used > 3, f"only {used} clusters were used")


@torch.no_grad()
def read_me_plan(scene: Scene) -> Outcome:
    """Count assignments of four layers, on hidden states of their own, that were not planned before the first."""
    tokens, layers = 128, range(4)
    router, ctx = read_me(scene, tokens, len(layers))
    planned_TE = router.plan(torch.zeros(tokens, 32), ctx, layers)[0].to_dense()
    unplanned = 0
    for layer in layers:
        own_TE = router(scene.normal(tokens, 32, name=f"layer {layer}"), ctx).to_dense()
        unplanned += int(((own_TE > 0) & (planned_TE == 0)).sum())
    used = int((planned_TE > 0).any(0).sum())
    return Outcome(float(unplanned), 0.0, used > 3, f"only {used} experts were planned")


# --- tasks, modalities and environments ------------------------------------------------------------------------------


@torch.no_grad()
def m3vit_task(scene: Scene) -> Outcome:
    """Count experts outside a task's own slice of 8 of 16 that its 4000 tokens use."""
    router = scene.router("m3vit", layer_shape(), params={"tasks": 2, "slice_width": 8}).router
    used_2E = torch.stack([router(scene.normal(4000, 32), Context(task=task)).counts_E > 0 for task in range(2)])
    own_2E = torch.arange(16) // 8 == torch.arange(2)[:, None]
    sound = bool((used_2E & own_2E).sum() == 16)
    return Outcome(float((used_2E & ~own_2E).sum()), 0.0, sound, "a task leaves experts of its own slice unused")


@torch.no_grad()
def moiie_apart(scene: Scene) -> Outcome:
    """Count assignments of a modality to the experts of the other, of which each has 2 of 8."""
    modality_T = torch.arange(4000) % 2
    routing = scene.router("moiie", layer_shape(experts=8)).router(
        scene.normal(4000, 32), Context(modality_T=modality_T)
    )
    load_2E = torch.stack([routing.keep(modality_T[routing.token_N] == modality).counts_E for modality in range(2)])
    leaked = int(load_2E[0, :2].sum() + load_2E[1, 6:].sum())
    shared = bool((load_2E[:, 2:6] > 0).all())
    return Outcome(float(leaked), 0.0, shared, "the shared experts do not serve both modalities")


@torch.no_grad()
def mixer_refit(scene: Scene) -> Outcome:
    """Return the share of 200 environments that have the expert made for their cluster after one refit."""
    clusters, per_cluster, size = 10, 20, 16
    rng = scene.rng("order")
    cluster_S = torch.arange(clusters).repeat(per_cluster)[torch.randperm(clusters * per_cluster, generator=rng)]
    centre_S: Tensor = 3 * scene.normal(clusters, size, name="centres")[cluster_S]
    features_SD = centre_S + 0.1 * scene.normal(len(cluster_S), size, name="features")
    wanted_S = torch.randperm(clusters, generator=rng)[cluster_S]
    loss_SE = 1 + 0.3 * scene.normal(len(cluster_S), clusters, name="losses").abs()
    loss_SE.scatter_add_(1, wanted_S[:, None], torch.full((len(cluster_S), 1), -1.0))
    router = scene.router("mixer", layer_shape(experts=clusters), params={"features": size}).router
    if not isinstance(router, MixER):
        raise TypeError("routing 'mixer' is no longer the class that refits; mend this claim.")
    ctx = Context(features=features_SD, segment_T=torch.arange(len(cluster_S)))

    def right() -> float:
        expert_S = router(torch.zeros(len(cluster_S), 32), ctx).padded()[0][:, 0]
        return float((expert_S == wanted_S).double().mean())

    before = right()
    router.update(router(torch.zeros(len(cluster_S), 32), ctx), EnvironmentLosses(features_SD, loss_SE))
    return Outcome(right(), 1.0, before < 0.5, "the map was right before", {"before": before})


CLAIMS: dict[str, Claim] = {
    "got-clusters": partial(got_flips, spread=0.5, clusters=24),
    "got-loose": partial(got_flips, spread=1.0, clusters=24),
    "got-unstructured": partial(got_flips, spread=1.0, clusters=None),
    "read-me-sliced": read_me_sliced,
    "read-me-plan": read_me_plan,
    "m3vit-task": m3vit_task,
    "moiie-apart": moiie_apart,
    "mixer-refit": mixer_refit,
}
