"""Normalised mutual information of experts and labels, with its null (after DiT-MoE's analysis, arXiv 2407.11633).

Shape letters: T tokens, K slots, C labels, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shuffle = Callable[[Tensor, torch.Generator], Tensor]
"""Labels [T] to others that are as likely where the experts know nothing of them."""


@dataclass(frozen=True)
class Shared:
    """``nmi`` = 2 I / (H(label) + H(expert)) in [0, 1], that of shuffled labels on average, and its chance.

    ``p`` is (1 + shuffles with at least as much) / (1 + shuffles).
    """

    nmi: float
    null: float
    p: float


def counts(label_T: Tensor, expert_TK: Tensor, labels: int, experts: int) -> Tensor:
    """Return how many assignments each pair has, float64 [C, E]; empty slots hold an id outside [0, experts)."""
    kept_TK = (expert_TK >= 0) & (expert_TK < experts)
    cell_TK = label_T[:, None] * experts + expert_TK
    return torch.bincount(cell_TK[kept_TK], minlength=labels * experts).view(labels, experts).double()


def normalised(joint_CE: Tensor) -> float:
    """Return the normalised mutual information of rows and columns of a table of counts; 0 where neither varies.

    Normalised by the arithmetic mean of both entropies; suite ``dit_moe`` takes their geometric mean.
    """
    p_CE = joint_CE / joint_CE.sum().clamp(min=1)
    independent_CE = p_CE.sum(1, keepdim=True) * p_CE.sum(0, keepdim=True)
    seen_CE = p_CE > 0
    shared = float((p_CE[seen_CE] * (p_CE[seen_CE] / independent_CE[seen_CE]).log()).sum())
    both = entropy(p_CE.sum(1)) + entropy(p_CE.sum(0))
    return max(0.0, 2 * shared / both) if both > 0 else 0.0


def entropy(p: Tensor) -> float:
    """Return the entropy of probabilities in nats."""
    seen = p[p > 0]
    return -float((seen * seen.log()).sum())


def against_chance(
    label_T: Tensor, expert_TK: Tensor, labels: int, experts: int, permutations: int, seed: int, shuffle: Shuffle
) -> Shared:
    """Return the information beside that of ``permutations`` shuffles of the labels.

    Neighbours in a text resemble each other, and so do their experts: a ``shuffle`` must keep what neighbouring labels
    have in common (``parts_moved``, ``rotated``), or chance is taken for too small.
    """
    rng = torch.Generator().manual_seed(seed)
    own = normalised(counts(label_T, expert_TK, labels, experts))
    shuffled = [normalised(counts(shuffle(label_T, rng), expert_TK, labels, experts)) for _ in range(permutations)]
    as_much = sum(one >= own for one in shuffled)
    return Shared(own, sum(shuffled) / max(1, permutations), (1 + as_much) / (1 + permutations))


def parts_moved(window: int, parts: int) -> Shuffle:
    """Return what moves whole parts: in each ``window`` tokens the ``parts`` labels change places with each other."""

    def moved(label_T: Tensor, rng: torch.Generator) -> Tensor:
        found = []
        for part_T in torch.split(label_T, window):
            own = torch.unique(part_T)  # a last window may have fewer
            place = torch.full((parts,), -1)
            place[own] = own[torch.randperm(len(own), generator=rng)]
            found.append(place[part_T])
        return torch.cat(found)

    return moved


def rotated(window: int) -> Shuffle:
    """Return what rotates the labels of each ``window`` tokens by any number of places."""

    def turned(label_T: Tensor, rng: torch.Generator) -> Tensor:
        windows = torch.split(label_T, window)
        return torch.cat([one.roll(int(torch.randint(len(one), (), generator=rng))) for one in windows])

    return turned
