"""Token elimination of LeMo (published as Jenga, ATC 2025): which blocks of tokens a layer computes in training.

A layer scores blocks of tokens by its own attention, computes the best of them and lets the others pass by in the
residual stream; the last layer computes all. The loss is taken segment by segment, so that logits of one segment exist
at a time. The official code finds blocks by thresholds tuned per layer; here each layer keeps the same share.

Shape letters: B sequences, T tokens, P tokens of a block, N blocks, K kept blocks, A heads, D head width, H hidden,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .transformer import Block, causal

Choose = Callable[[int, Tensor], Tensor]
"""(layer, x_BTH) to the kept blocks of a layer, int64 [K], rising."""

Compute = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
"""(layer, x_BKH, token_K) to its output for these tokens, of which ``token_K`` says the places; None is all of them."""


def compute(layer: nn.Module, x_BKH: Tensor, token_K: Tensor | None) -> Tensor:
    """Run a Block, which knows no places: the residual stream brings them along."""
    y_BKH: Tensor = layer(x_BKH, causal)
    return y_BKH


def block_scores(q_BATD: Tensor, k_BATD: Tensor, block: int) -> Tensor:
    """Return the symmetric importance of pairs of blocks, [B, N, N]: ReLU scores of the past, summed over heads, pooled
    by their maximum."""
    scores_BATT = nnf.relu(q_BATD @ k_BATD.transpose(-1, -2) / math.sqrt(q_BATD.shape[-1])).tril()
    pooled_BNN = nnf.max_pool2d(scores_BATT.sum(1), block)
    return (pooled_BNN + pooled_BNN.transpose(-1, -2)) / 2


def best_blocks(scores_NN: Tensor, keep: int) -> Tensor:
    """Return the ``keep`` blocks with the largest column sums, int64 [K], rising."""
    return scores_NN.sum(-2).topk(keep).indices.sort().values


def kept_blocks(blocks: int, share: float) -> int:
    """Return how many of ``blocks`` blocks a share of them is, at least one."""
    return max(1, round(blocks * share))


def tokens_of(blocks_K: Tensor, block: int) -> Tensor:
    """Return the tokens of blocks, int64 [K * P]."""
    return (blocks_K[:, None] * block + torch.arange(block)).flatten()


def through(
    layers: nn.ModuleList, x_BTH: Tensor, block: int, choose: Choose | None, compute: Compute = compute
) -> Tensor:
    """Return the residual stream after ``layers``; each but the last computes the blocks that ``choose`` names."""
    last = len(layers) - 1
    for number, layer in enumerate(layers):
        if choose is None or number == last:
            x_BTH = compute(layer, x_BTH, None)
            continue
        token_K = tokens_of(choose(number, x_BTH), block)
        x_BTH = x_BTH.index_copy(1, token_K, compute(layer, x_BTH.index_select(1, token_K), token_K))
    return x_BTH


@torch.no_grad()
def oracle_scores(layer: Block, x_BTH: Tensor, block: int) -> Tensor:
    """Return what the layer's own attention says of its blocks, [B, N, N]."""
    q_BATD, k_BATD, _ = layer.attention.projections(layer.attention_norm(x_BTH))
    return block_scores(q_BATD, k_BATD, block)


class SegmentLoss(torch.autograd.Function):
    """Mean cross-entropy whose gradient is taken segment by segment in the forward pass: no logits are kept."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, head_VH: Tensor, target_T: Tensor, segments: int) -> Tensor:
        """Return the loss of ``target_T`` under logits ``x_TH @ head_VH.T``; ``segments`` must divide T."""
        tokens = len(x_TH)
        if tokens % segments:
            raise ValueError(f"{segments} segments do not divide {tokens} tokens; choose a divisor.")
        grad_TH, grad_VH = torch.empty_like(x_TH), torch.zeros_like(head_VH)
        loss = x_TH.new_zeros(())
        size = tokens // segments
        for first in range(0, tokens, size):
            part = slice(first, first + size)
            logits_SV = x_TH[part] @ head_VH.T
            logits_SV -= logits_SV.logsumexp(-1, keepdim=True)
            loss -= logits_SV.gather(1, target_T[part, None]).sum() / tokens
            logits_SV.exp_()
            logits_SV.scatter_add_(1, target_T[part, None], -torch.ones_like(logits_SV[:, :1]))
            logits_SV /= tokens
            grad_TH[part] = logits_SV @ head_VH
            grad_VH += logits_SV.T @ x_TH[part]
        ctx.save_for_backward(grad_TH, grad_VH)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients that forward made, times that of the loss."""
        grad_TH, grad_VH = ctx.saved_tensors
        return grads[0] * grad_TH, grads[0] * grad_VH, None, None


def segment_loss(x_TH: Tensor, head_VH: Tensor, target_T: Tensor, segments: int) -> Tensor:
    """Return the mean cross-entropy in ``segments`` segments; 0 is the plain loss with all logits at once."""
    if segments == 0:
        return nnf.cross_entropy(x_TH @ head_VH.T, target_T)
    loss: Tensor = SegmentLoss.apply(x_TH, head_VH, target_T, segments)  # type: ignore[no-untyped-call]
    return loss


class Predictor(nn.Module):
    """Guesses the block scores of a layer from its input: low-rank MLPs for query and key blocks, scores q k^T.

    Heads of the official predictor are summed; heads laid side by side in one product are that sum.
    """

    def __init__(self, hidden: int, block: int, rank: int) -> None:
        super().__init__()
        self.block = block
        self.query, self.key = (
            nn.Sequential(
                nn.Linear(block * hidden, rank),
                nn.ReLU(),
                nn.Linear(rank, rank),
                nn.ReLU(),
                nn.Linear(rank, rank),
            )
            for _ in range(2)
        )

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return scores [B, N, N] of the blocks of a layer's normalised input."""
        batch, tokens, hidden = x_BTH.shape
        flat = x_BTH.reshape(batch, tokens // self.block, self.block * hidden)
        scores_BNN = self.query(flat) @ self.key(flat).transpose(-1, -2)
        symmetric_BNN: Tensor = (scores_BNN + scores_BNN.transpose(-1, -2)) / 2
        return symmetric_BNN
