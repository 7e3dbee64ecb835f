"""How few activations are not zero, and keeping the largest alone (lazy neurons, arXiv 2210.06313).

Shape letters: T tokens, F width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nonzero_share(hidden_TF: Tensor) -> float:
    """Return the share of activations that are not exactly zero."""
    return float((hidden_TF != 0).double().mean())


def active_share(hidden_TF: Tensor, epsilon: float) -> float:
    """Return the share of activations above ``epsilon`` times the largest |activation| of their token."""
    size_TF = hidden_TF.abs()
    return float((size_TF > epsilon * size_TF.amax(dim=-1, keepdim=True)).double().mean())


def largest(hidden_TF: Tensor, k: int) -> Tensor:
    """Return the activations with all but the ``k`` largest of each token set to zero; all stay where k is the width.

    The gradient goes through what is kept.
    """
    if k >= hidden_TF.shape[-1]:
        return hidden_TF
    kept_TF = torch.zeros_like(hidden_TF, dtype=torch.bool)
    return hidden_TF.masked_fill(~kept_TF.scatter(-1, hidden_TF.topk(k, dim=-1).indices, True), 0.0)
