"""What consecutive tokens need together: sparsity of tokens and of chunks, and the bytes of a chunk's experts.

A chunk is ``length`` consecutive tokens of one segment; the tail of a segment that fills no chunk is left out, and no
chunk crosses a segment (as BlockFFN's released code counts, arXiv 2507.08771). The Context says what the segments are
and which tokens are padding. An entry counts whatever its weight.
Shape letters: T tokens, E expert ids, C chunks, L tokens of a chunk, N assignments, M distinct (chunk, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...contracts import Metric
from ..balance.rows import chunks, valid_tokens
from ..routing import Context, Routing

LENGTHS = (2, 4, 8, 16)
"""The lengths of chunks that BlockFFN reports."""


def chunk_experts(routing: Routing, length: int, ctx: Context | None = None) -> Tensor:
    """Return how many distinct experts each chunk touches, [C] int64; without segments all tokens are one."""
    if length < 1:
        raise ValueError(f"a chunk of {length} tokens is empty; give a length of at least 1.")
    token_CL = chunks(routing, ctx, length)
    chunk_T = torch.full((routing.num_tokens,), -1, device=token_CL.device)
    chunk_T[token_CL] = torch.arange(len(token_CL), device=token_CL.device)[:, None]
    chunk_N = chunk_T[routing.token_N]
    inside_N = chunk_N >= 0
    pair_M = torch.unique(chunk_N[inside_N] * routing.num_experts + routing.expert_N[inside_N])
    return torch.bincount(pair_M // routing.num_experts, minlength=len(token_CL))


def sparsity_metrics(routing: Routing, lengths: Sequence[int] = LENGTHS, ctx: Context | None = None) -> list[Metric]:
    """Return token-level and chunk-level sparsity (BlockFFN): the share of experts that nobody there needs.

    ``tls`` = 1 - N / (T E), over all tokens that are no padding; ``cls_L`` = 1 - distinct experts of a chunk / E, mean
    over chunks. Where chunks cover all tokens, cls_2L <= cls_L <= tls; with independent tokens cls_L is tls^L on
    average.
    """
    tokens, experts = int(valid_tokens(routing, ctx).sum()), routing.num_experts
    tls = 1 - len(routing.token_N) / (tokens * experts) if tokens else None
    metrics = [Metric("tls", tls, "share", n=tokens)]
    for length in lengths:
        distinct_C = chunk_experts(routing, length, ctx)
        share = 1 - float(distinct_C.double().mean()) / experts if len(distinct_C) else None
        metrics.append(Metric(f"cls_{length}", share, "share", n=len(distinct_C)))
    return metrics


def chunk_bytes(
    routing: Routing, expert_bytes: float, lengths: Sequence[int] = LENGTHS, ctx: Context | None = None
) -> list[Metric]:
    """Return ``chunk_bytes_L``: the weights that a chunk reads at least, each of its experts once, mean over chunks.

    ``expert_bytes`` is the size of one expert. This is (1 - cls_L) * E * ``expert_bytes``: what a step of speculative
    decoding that verifies L tokens must move.
    """
    metrics = []
    for length in lengths:
        distinct_C = chunk_experts(routing, length, ctx)
        value = float(distinct_C.double().mean()) * expert_bytes if len(distinct_C) else None
        metrics.append(Metric(f"chunk_bytes_{length}", value, "byte", n=len(distinct_C)))
    return metrics
