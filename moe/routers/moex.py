"""MoE-X (arXiv 2503.07639): a token goes to the experts whose hidden neurons it will fire least.

If the weights that one input channel d has in expert e were drawn from a Gaussian with mean mu_ed and variance
sigma2_ed, what enters the activation for a token x would be Gaussian too, with mean sum_d x_d mu_ed and variance
sum_d x_d^2 sigma2_ed, and would be positive with probability Phi(mu / sigma) = (1 - z) / 2 for the score z below.

Shape letters: T tokens, H hidden, E expert ids, F expert width.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..experts import ExpertStore
from ..router import RouterBundle, TopK, weighter
from ..router_context import ContextPipeline, needed
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.moex import MoEX
    from ..shapes import ModelShape


class Firing(nn.Module):
    """z_e = -erf(mu_e(x) / (sqrt(2) sigma_e(x))), from the experts in ``ctx.experts`` as they are stored.

    Means and variances are read once per store, and anew in every training step; no gradient goes through them. The
    store is only looked at: it is neither kept alive nor copied with the router.
    """

    def __init__(self) -> None:
        super().__init__()
        self._store: weakref.ref[ExpertStore] | None = None
        self._statistics: tuple[Tensor, Tensor] | None = None

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE float32 in [-1, 1]."""
        mean_EH, variance_EH = self._read(needed(ctx, "experts"), ctx.training)
        x_TH = x_TH.float()
        variance_TE = nnf.linear(x_TH.square(), variance_EH)
        ratio_TE = nnf.linear(x_TH, mean_EH) * torch.rsqrt(variance_TE.clamp(min=torch.finfo(torch.float32).tiny))
        return -torch.erf(ratio_TE / math.sqrt(2))

    def forget(self) -> None:
        """Read the experts anew at the next call: their weights have changed in place."""
        self._store = self._statistics = None

    def _read(self, store: ExpertStore, training: bool) -> tuple[Tensor, Tensor]:
        if self._statistics is None or training or self._store is None or self._store() is not store:
            self._store, self._statistics = weakref.ref(store), weight_statistics(store)
        return self._statistics


@torch.no_grad()
def weight_statistics(store: ExpertStore) -> tuple[Tensor, Tensor]:
    """Return (mean_EH, variance_EH) float32, over the F rows that the activation of each expert reads.

    Of a gated expert these are its gate rows. Quantized experts are read as they are executed.
    """
    if set(store.kinds) != {"ffn"}:
        raise ValueError(f"MoE-X scores experts by their weights and cannot score {sorted(set(store.kinds))}; use ffn.")
    rows_EFH = [store.weights(slot)[0][: store.width] for slot in range(store.num_experts)]
    moments = [torch.var_mean(rows_FH, dim=0, correction=0) for rows_FH in rows_EFH]
    return torch.stack([mean_H for _, mean_H in moments]), torch.stack([variance_H for variance_H, _ in moments])


class SparsestExperts(ContextPipeline):
    """Top-k of the scores of ``Firing``; ``update`` makes it read the experts anew."""

    scorer: Firing

    def update(self, routing: Routing, signal: Any = None) -> None:
        """Forget what was read from the experts: a training step has changed them."""
        self.scorer.forget()


def build(params: MoEX) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory; a router that the layer has is not used."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        selection = params.selection(shape)
        router = SparsestExperts(Firing(), TopK(selection.k), weighter(selection), {"experts"})
        return RouterBundle(router, params.kinds(shape))

    return factory
