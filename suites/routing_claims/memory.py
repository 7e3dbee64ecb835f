"""Claims of memory layers: PEER's product keys, and UltraMem's TDQKR with the modules of ``moe.gather``.

Shape letters: T tokens, A heads, S keys on one side, R Tucker rank, M cores, K rows found, E = S^2 experts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...moe.gather.peer import ProductKeyRouter
from ...moe.gather.rank_one import gather_metrics
from ...moe.gather.retrieval import (
    exhaustive_topk,
    leading_vectors,
    recall,
    spectral_ratio,
    tucker_grid,
    tucker_topk,
)
from ...moe.gather.ultramem import UltraMem
from ...moe.routing import Context
from ...moe.routing_metrics.cost import counted_flops
from .base import Claim, Outcome, Scene, largest, layer_shape


def product_keys(scene: Scene, side: int) -> ProductKeyRouter:
    """Return PEER's router with 8 heads, 16 experts per head and ``side`` squared experts."""
    shape = layer_shape(side**2, hidden=64, width=1)
    router = scene.router("peer", shape, params={"heads": 8, "k": 16, "key_width": 32}).router
    if not isinstance(router, ProductKeyRouter):
        raise TypeError("routing 'peer' no longer searches by product keys; mend this claim.")
    return router


@torch.no_grad()
def peer_exact(scene: Scene) -> Outcome:
    """Compare the weights of product-key retrieval with those of scoring all 1024 experts."""
    router, x_TH = product_keys(scene, 32), scene.normal(128, 64)
    found_TE, wanted_TE = (search(x_TH, Context()).to_dense() for search in (router, router.exhaustive))
    return Outcome(largest(found_TE, wanted_TE), 0.0, int((wanted_TE > 0).any(0).sum()) > 100, "few experts are used")


@torch.no_grad()
def peer_sublinear(scene: Scene) -> Outcome:
    """Compare the growth of the retrieval's flops from 32^2 to 128^2 experts with that of the experts, 16."""
    x_TH = scene.normal(128, 64)
    routers = [product_keys(scene, side) for side in (32, 128)]
    flops = [counted_flops(partial(router, x_TH, Context())) for router in routers]
    sound = routers[1].experts == 16 * routers[0].experts and flops[0] > 0
    figures = {"flops_at_1024": float(flops[0]), "flops_at_16384": float(flops[1])}
    return Outcome(flops[1] / flops[0], 16.0, sound, "the experts did not grow by 16", figures)


@torch.no_grad()
def tucker_recall(scene: Scene, core: str) -> Outcome:
    """Return the recall of TDQKR for positive scores, 128 keys a side and 16 rows.

    ``core`` is ``uniform``, two cores of U(0, 1) as the released code starts them, or ``identity``.
    """
    tokens, side, rank = 300, 128, 2
    core_MARR = torch.eye(rank)[None, None] if core == "identity" else scene.uniform(2, 1, rank, rank, name="core")
    first, second = (scene.uniform(tokens, 1, side, rank, name=name) for name in ("first", "second"))
    _, rows_TAK = tucker_topk(first, second, core_MARR, leading_vectors(core_MARR), 16)
    scores_TASS: Tensor = tucker_grid(first, second, core_MARR).sum(-1)
    _, wanted_TAK = exhaustive_topk(scores_TASS, 16)
    figures = {"spectral_ratio": float(spectral_ratio(core_MARR))}
    return Outcome(recall(rows_TAK, wanted_TAK), 1.0, bool((scores_TASS >= 0).all()), "scores are signed", figures)


@torch.no_grad()
def ultramem_start(scene: Scene) -> Outcome:
    """Return the recall of a whole layer's search at its released initialisation, whose scores have both signs."""
    layer = UltraMem.seeded(64, key_width=64, values=16, pre_values=16, seed=scene.seed)
    x_TH = scene.normal(200, 64)
    found, wanted = layer.search(x_TH), layer.search.exhaustive(x_TH)
    first, _ = layer.search.side_scores(x_TH)
    figures = {"spectral_ratio": float(spectral_ratio(layer.search.core_MARR))}
    sound = bool((first < 0).any()) and bool((wanted.scores_TAKM.sum(-1) > 0).all())
    return Outcome(recall(found.rows_TAK, wanted.rows_TAK), 1.0, sound, "scores are not signed", figures)


@torch.no_grad()
def ultramem_bytes(scene: Scene) -> Outcome:
    """Compare the bytes that one token reads of a memory layer with those of 2 of 8 experts, both bfloat16."""
    layer = UltraMem.seeded(768, side=32, key_width=64, seed=scene.seed)
    metrics = gather_metrics(layer.routing(scene.normal(64, 768)), layer.table.row_values, 2)
    read = float(next(metric.value for metric in metrics if metric.name == "gather_bytes_per_token") or 0)
    of_experts = 2 * layer_shape(8, 768, 2048).with_(experts=1).expert_bytes(2)
    return Outcome(read, float(of_experts), layer.table.row_values == 1024, "rows have another size than released")


CLAIMS: dict[str, Claim] = {
    "peer-exact": peer_exact,
    "peer-sublinear": peer_sublinear,
    "ultramem-positive": partial(tucker_recall, core="uniform"),
    "ultramem-identity": partial(tucker_recall, core="identity"),
    "ultramem-start": ultramem_start,
    "ultramem-bytes": ultramem_bytes,
}
