"""Block-sparse attention of SparseD: which blocks of keys each head keeps, and attention to nothing else.

Blocks are chosen by mean attention, separately among those of the prompt and those that are generated (isolated
selection), so that every block of queries keeps the same number and the kept keys can be gathered without a kernel of
its own. Scores are divided by sqrt(head width); the official code takes the square root of the number of heads instead.

Shape letters: B sequences, A heads, T tokens, D head width, P tokens of a block, N blocks, K kept blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor


def importance(q_BATD: Tensor, k_BATD: Tensor, block: int) -> Tensor:
    """Return the mean attention of each block of queries to each block of keys, [B, A, N, N]."""
    attention = (q_BATD @ k_BATD.transpose(-1, -2) / math.sqrt(q_BATD.shape[-1])).softmax(-1)
    batch, heads, tokens, _ = attention.shape
    blocks = tokens // block
    return attention.view(batch, heads, blocks, block, blocks, block).mean((3, 5))


def kept(blocks: int, share: float) -> int:
    """Return how many of ``blocks`` key blocks stay: floor(share of them) + 1, at most all."""
    return min(blocks, math.floor(blocks * share) + 1)


def select(importance_BANN: Tensor, prompt: int, share: float) -> Tensor:
    """Return the kept key blocks of each query block, int64 [B, A, N, K], rising; the first ``prompt`` blocks are the
    prompt's and are chosen among themselves."""
    parts = [importance_BANN[..., :prompt], importance_BANN[..., prompt:]]
    chosen = [part.topk(kept(part.shape[-1], share), dim=-1).indices for part in parts if part.shape[-1]]
    if prompt and len(chosen) == 2:
        chosen[1] = chosen[1] + prompt
    return torch.cat(chosen, dim=-1).sort(-1).values


def sparse_attention(q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor, blocks_BANK: Tensor) -> Tensor:
    """Return attention of each query block to its kept key blocks, which are gathered; [B, A, T, D]."""
    batch, heads, tokens, width = q_BATD.shape
    blocks, keep = blocks_BANK.shape[-2:]
    size = tokens // blocks
    index = blocks_BANK.flatten(2)[..., None, None].expand(-1, -1, -1, size, width)

    def gathered(x_BATD: Tensor) -> Tensor:
        parts = x_BATD.reshape(batch, heads, blocks, size, width).gather(2, index)
        return parts.view(batch, heads, blocks, keep * size, width)

    q_BANPD = q_BATD.reshape(batch, heads, blocks, size, width)
    return nnf.scaled_dot_product_attention(q_BANPD, gathered(k_BATD), gathered(v_BATD)).flatten(2, 3)


def masked_attention(q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor, blocks_BANK: Tensor) -> Tensor:
    """Return the same by a dense mask over all keys."""
    block = q_BATD.shape[2] // blocks_BANK.shape[2]
    mask = as_mask(blocks_BANK).repeat_interleave(block, -1).repeat_interleave(block, -2)
    return nnf.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, attn_mask=mask)


def as_mask(blocks_BANK: Tensor) -> Tensor:
    """Return kept blocks as bool [B, A, N, N]."""
    batch, heads, blocks, _ = blocks_BANK.shape
    mask = torch.zeros(batch, heads, blocks, blocks, dtype=torch.bool)
    return mask.scatter_(-1, blocks_BANK, True)


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Return the overlap of masks, intersection over union of their last two dimensions."""
    both = (first & second).sum((-1, -2)).double()
    return both / (first | second).sum((-1, -2))
