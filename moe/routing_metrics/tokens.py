"""Figures of single tokens: how many experts, what their weights add up to, whether these carry a gradient.

Shape letters: T tokens, H hidden, N assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Metric, Series
from ..routing import Routing

NO_GRADIENT = 1e-4
"""A token's weights are constant if a relative change of its input moves them by less than this part of themselves."""


def k_histogram(routing: Routing) -> Series:
    """Return ``tokens_per_k``: how many tokens have 0, 1, 2 ... experts."""
    return Series("tokens_per_k", tuple(map(float, torch.bincount(routing.k_T).tolist())), "tokens")


def weight_metrics(routing: Routing) -> list[Metric]:
    """Return the spread of the sum of a token's weights, and the share of the weights that are negative.

    Sums differ widely between schemes (0.1 to 0.5 for Switch, 2.5 for DeepSeek-V3, 4 to 12 for BlockFFN), so outputs
    of different routers cannot be expected on one scale. A token without experts has the sum 0.
    """
    tokens, entries = routing.num_tokens, len(routing.weight_N)
    weight_N = routing.weight_N.detach().double()
    sum_T = weight_N.new_zeros(tokens).index_add(0, routing.token_N, weight_N)
    negative = float((weight_N < 0).double().mean()) if entries else None
    return [
        Metric("weight_sum_std", float(sum_T.std(correction=0)) if tokens else None, n=tokens),
        Metric("weight_sum_min", float(sum_T.min()) if tokens else None, n=tokens),
        Metric("weight_sum_max", float(sum_T.max()) if tokens else None, n=tokens),
        Metric("weight_negative_share", negative, "share", n=entries),
    ]


def gradient_share(routing: Routing, x_TH: Tensor) -> Metric:
    """Return ``gradient_share``: the share of tokens through whose weights a loss of the output reaches the router.

    ``x_TH`` is the input that ``routing`` was made of, with a gradient of its own. Constant weights teach the router
    nothing: K = 1 with renormalisation, a lookup, a draw, or a token of AdaMoE or MoE++ whose other choices were null
    experts. A random direction of the weights is differentiated, since their sum may be constant while they are not.
    The share is that of single tokens only where a token's row depends on its own input alone, and a router that reads
    something else than its input (images, token ids) has none.
    """
    tokens = routing.num_tokens
    if tokens == 0 or not routing.weight_N.requires_grad:
        return Metric("gradient_share", 0.0 if tokens else None, "share", n=tokens)
    weight_N = routing.weight_N.float()
    direction_N = torch.randn(len(weight_N), generator=torch.Generator().manual_seed(0)).to(weight_N.device)
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad((direction_N * weight_N).sum(), x_TH, allow_unused=True)
    gradient_TH = gradients[0]
    if gradient_TH is None:
        return Metric("gradient_share", 0.0, "share", n=tokens)
    square_T = weight_N.new_zeros(tokens).index_add(0, routing.token_N, weight_N.detach().square())
    change_T = gradient_TH.float().norm(dim=1) * x_TH.detach().float().norm(dim=1)
    carries_T = change_T > NO_GRADIENT * square_T.sqrt()
    return Metric("gradient_share", float(carries_T.double().mean()), "share", n=tokens)
