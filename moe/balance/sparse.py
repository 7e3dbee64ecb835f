"""Losses of routers whose k is not fixed: few experts per chunk, the same ones from token to token, few at all.

Shape letters: T tokens, E expert ids, C chunks, L tokens of a chunk, P pairs of neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..routing import Context, Routing
from .rows import chunks, given, neighbours, valid_tokens


def chunk_sparsity(routing: Routing, ctx: Context | None = None, *, length: int = 64, epsilon: float = 0.0) -> Tensor:
    """Return 1 - mean over chunks and experts of prod_t (1 - q_te): BlockFFN's CLS loss (arXiv 2507.08771).

    q_te is the share of expert e in the weights of token t (in their magnitudes, where weights are signed). If e ran
    with probability q_te for each token on its own, this is the expected share of experts that a chunk of ``length``
    consecutive tokens of one segment touches: 1 / E where all share one expert, near 1 where none do.

    The released code adds ``epsilon`` = 1e-5 within the logarithm of each factor, so that experts nobody chose count
    a little less than nothing.
    """
    weight_TE = routing.to_dense().abs()
    share_TE = weight_TE / weight_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_TE.dtype).tiny)
    token_CL = chunks(routing, ctx, length)
    if len(token_CL) == 0:
        raise ValueError(f"no segment holds a chunk of {length} tokens; choose a smaller length.")
    return 1 - (1 - share_TE[token_CL] + epsilon).prod(1).mean()


def locality(routing: Routing, ctx: Context | None = None, *, steepness: float = 100.0) -> Tensor:
    """Return the mean over neighbours and experts of BCE(sigmoid(s z_before), sigmoid(s z_after)): BlockFFN's L_al.

    z are logits, of which the positive ones are active, and s is ``steepness``. Neighbours are consecutive tokens of
    one segment. 0 where nothing changes; where logits are +-1 it is s times the share of experts that change sides.
    """
    logits_TE = given(routing.logits_TE, "logits_TE").float() * steepness
    before_P, after_P = neighbours(routing, ctx)
    if len(before_P) == 0:
        raise ValueError("locality compares neighbours, and no segment has two tokens; give longer segments.")
    return nnf.binary_cross_entropy_with_logits(logits_TE[before_P], logits_TE[after_P].sigmoid())


def l1(routing: Routing, ctx: Context | None = None, *, k: float) -> Tensor:
    """Return E / (k T^2) * sum_e (sum_t w_te) (entries of e): ReMoE's balanced L1 (arXiv 2412.14711), without lambda.

    At ``k`` active experts per token and even load it is the mean sum of a token's weights; an expert with more than
    its part of the load is pressed down the more. ``controllers.lambda_step`` moves the coefficient.
    """
    if k <= 0:
        raise ValueError(f"k={k} is how many experts a token should have; give a positive number.")
    tokens = max(int(valid_tokens(routing, ctx).sum()), 1)
    sum_E = routing.weight_N.new_zeros(routing.num_experts).index_add(0, routing.expert_N, routing.weight_N)
    return routing.num_experts / (k * tokens**2) * torch.dot(sum_E, routing.counts_E.to(sum_E.dtype))
