"""The factories of the sparsity plug-ins: from parameters to the last step of a recipe.

Shape letters: T tokens, H hidden, I channels of a site.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...contracts import SITES, make_key
from ..channel_artefacts import sparsified
from ..channels import SiteRule, Sparsity
from ..experts import ExpertStore
from ..routing import Routing
from .baselines import Magnitude, RandomChannels, Wanda
from .channel import calibrated, matrix_shape, sparsifiers
from .params import ChannelParams
from .search import greedy_levels, searched_alphas
from .weight_masks import input_norms, weight_mask

SparsityStep = Callable[..., ExpertStore]
"""(store, routing, x_TH, seed=0) -> the store with its sparsity; ``x_TH`` are calibration tokens, ``seed`` is the
layer's own. Nothing but ``store.sparsity`` and, with masked weights, their zeros may differ."""


def channels(params: ChannelParams) -> SparsityStep:
    """Sparsity of the family: TEAL, CATS, CHESS, WINA, R-Sparse. Level 0 gives the store back as it is."""

    def calibrate(store: ExpertStore, routing: Routing, x_TH: Tensor, seed: int = 0) -> ExpertStore:
        if params.level == 0:
            return store
        alphas = searched_alphas(params, store, routing, x_TH) if params.search else None
        family = sparsifiers(params, alphas)
        levels = dict.fromkeys(params.scores, params.level)
        if params.allocation == "greedy":
            levels = greedy_levels(family, store, routing, x_TH, params.level, params.step)
        return calibrated(family, store, routing, x_TH, levels)

    return calibrate


def random_channels(params: RandomChannels) -> SparsityStep:
    """Sparsity ``random_channels``: the kept channels of each site are drawn, whatever the tokens are."""

    def draw(store: ExpertStore, routing: Routing, x_TH: Tensor, seed: int = 0) -> ExpertStore:
        if params.level == 0:
            return store
        sites = [site for site in SITES if site in params.sites]
        kept = {site: drawn(matrix_shape(store, site)[1], params.level, site, seed) for site in sites}
        return replace(store, sparsity=Sparsity({site: SiteRule(kept=kept_I) for site, kept_I in kept.items()}))

    return draw


def drawn(width: int, level: float, site: str, seed: int) -> Tensor:
    """Return floor(width (1 - level)) of ``width`` channels as a mask, by the seed of a layer."""
    rng = torch.Generator().manual_seed(int(make_key([seed, "channels", site])[:15], 16))
    kept_I = torch.zeros(width, dtype=torch.bool)
    kept_I[torch.randperm(width, generator=rng)[: math.floor(width * (1 - level) + 1e-9)]] = True
    return kept_I


def masked_weights(params: Magnitude) -> SparsityStep:
    """Sparsity ``magnitude`` and ``wanda``: the smallest weights of every row are zeros from now on."""

    def mask(store: ExpertStore, routing: Routing, x_TH: Tensor, seed: int = 0) -> ExpertStore:
        if params.level == 0:
            return store
        norms = input_norms(store, routing, x_TH) if isinstance(params, Wanda) else {}
        return sparsified(store, Sparsity({}, weight_mask(store, params.level, norms)))

    return mask
