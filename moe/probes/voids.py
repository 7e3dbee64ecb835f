"""Voids: layers that add little to a token's residual stream, by L2 adaptive computation (LAC, arXiv 2505.14467).

With n_l the L2 norm of a token's state after layer l and D_l = n_l - n_{l-1}, layer l is a void for the token where
D_l < alpha (max D - min D), maximum and minimum over the layers before l; for the first layer over itself, so that its
threshold is 0. Void or not is known only once the layer has run: this tells what might be left out, and saves nothing.
Shape letters: T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Adaptive:
    """Decides layer by layer; one object for one forward pass."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.least_T: Tensor | None = None
        self.most_T: Tensor | None = None

    def copy(self) -> Adaptive:
        """Return another that has seen the same layers, for decisions that do not count yet."""
        other = Adaptive(self.alpha)
        other.least_T, other.most_T = self.least_T, self.most_T
        return other

    def active(self, change_T: Tensor) -> Tensor:
        """Return whether the next layer is active (no void) for each token; ``change_T`` is its D_l."""
        least_T = change_T if self.least_T is None else self.least_T
        most_T = change_T if self.most_T is None else self.most_T
        active_T: Tensor = change_T >= self.alpha * (most_T - least_T)
        self.least_T, self.most_T = torch.minimum(least_T, change_T), torch.maximum(most_T, change_T)
        return active_T


def decided(changes: Sequence[float], alpha: float) -> list[bool]:
    """Return what LAC says of one token, from its D_l in all layers: the definition, for checks."""
    spans = [max(changes[:layer] or [0.0]) - min(changes[:layer] or [0.0]) for layer in range(len(changes))]
    return [not change < alpha * span for change, span in zip(changes, spans, strict=True)]


def matched(active_LT: Tensor, seed: int) -> Tensor:
    """Return random activity [L, T] with the same number of active tokens in every layer."""
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([row_T[torch.randperm(len(row_T), generator=rng)] for row_T in active_LT])


def uniform(active_LT: Tensor, seed: int) -> Tensor:
    """Return random activity [L, T] with the same number of active pairs in all, wherever they lie."""
    rng = torch.Generator().manual_seed(seed)
    flat = active_LT.flatten()
    return flat[torch.randperm(len(flat), generator=rng)].view_as(active_LT)


def jensen_shannon(first_L: Tensor, second_L: Tensor) -> float:
    """Return the Jensen-Shannon divergence in bits, 0 to 1, of two profiles of usage, each brought to sum 1."""
    p_L, q_L = (usage_L.double() / usage_L.double().sum() for usage_L in (first_L, second_L))
    middle_L = (p_L + q_L) / 2

    def divergence(of_L: Tensor) -> Tensor:
        seen_L = of_L > 0
        return (of_L[seen_L] * (of_L[seen_L] / middle_L[seen_L]).log2()).sum()

    return float(divergence(p_L) + divergence(q_L)) / 2
