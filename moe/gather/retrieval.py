"""The best k of a grid of S x S rows without scoring them all: product keys, and Tucker-decomposed keys (TDQKR).

A query has one score per key on each of two sides; row (i, j) of the grid has index i * S + j. Product keys (PEER,
arXiv 2407.04153) add the scores of the sides, and the search is exact. TDQKR (UltraMem, arXiv 2411.12364) multiplies
vectors of R scores by a core, S1_i' C S2_j, and searches along the core's leading singular vectors, which is exact for
a core of rank one and scores that are not negative along them, and a guess otherwise (``recall`` says how good).

Shape letters: T tokens, A retrieval heads, S keys on one side, K rows found, R Tucker rank, M Tucker cores.
"""

from __future__ import annotations

import torch
from torch import Tensor

Vectors = tuple[Tensor, Tensor]
"""The leading left and right singular vectors of each head's core: (left_AR, right_AR)."""


def product_key_topk(first_TAS: Tensor, second_TAS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (scores_TAK, rows_TAK int64) of the ``k`` largest sums first_i + second_j, the largest first.

    Exact: a sum outside the k best keys of a side has at least k sums that are no smaller.
    """
    side = _side(first_TAS.shape[2], second_TAS.shape[2], k)
    first, second = first_TAS.topk(side, dim=-1), second_TAS.topk(side, dim=-1)
    return _best(product_grid(first.values, second.values), first.indices, second.indices, first_TAS.shape[2], k)


def product_grid(first_TAS: Tensor, second_TAS: Tensor) -> Tensor:
    """Return first_i + second_j of every row, [T, A, S, S]."""
    return first_TAS[..., :, None] + second_TAS[..., None, :]


def exhaustive_topk(grid_TASS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (scores_TAK, rows_TAK) of the ``k`` largest scores of the whole grid: what a search is held to."""
    found = grid_TASS.flatten(-2).topk(k, dim=-1)
    return found.values, found.indices


def tucker_topk(
    first_TASR: Tensor, second_TASR: Tensor, core_MARR: Tensor, vectors: Vectors, k: int
) -> tuple[Tensor, Tensor]:
    """Return (scores_TAKM, rows_TAK int64): the ``k`` best rows by sum_m S1_i' C_m S2_j among the candidates.

    Candidates are all pairs of the k keys of each side that are best along ``vectors``; each core keeps its own score.
    """
    side = _side(first_TASR.shape[2], second_TASR.shape[2], k)
    rows = []
    for scores_TASR, vector_AR in zip((first_TASR, second_TASR), vectors, strict=True):
        rows.append((scores_TASR * vector_AR[:, None]).sum(-1).topk(side, dim=-1).indices)
    first, second = (
        scores_TASR.gather(2, row_TAK[..., None].expand(-1, -1, -1, scores_TASR.shape[3]))
        for scores_TASR, row_TAK in zip((first_TASR, second_TASR), rows, strict=True)
    )
    grid_TAKKM = tucker_grid(first, second, core_MARR)
    place_TAK = grid_TAKKM.sum(-1).flatten(2).topk(k, dim=-1).indices
    index_TAKM = place_TAK[..., None].expand(-1, -1, -1, len(core_MARR))
    ids_TAC = (rows[0][..., :, None] * first_TASR.shape[2] + rows[1][..., None, :]).flatten(2)
    return grid_TAKKM.flatten(2, 3).gather(2, index_TAKM), ids_TAC.gather(2, place_TAK)


def tucker_grid(first_TASR: Tensor, second_TASR: Tensor, core_MARR: Tensor) -> Tensor:
    """Return S1_i' C_m S2_j of every row and core, [T, A, S, S, M]."""
    return torch.einsum("tair,marq,tajq->taijm", first_TASR, core_MARR, second_TASR)


@torch.no_grad()
def leading_vectors(core_MARR: Tensor, before: Vectors | None = None) -> Vectors:
    """Return the leading singular vectors of sum_m C_m, float32, detached.

    A singular pair has two signs, (u, v) and (-u, -v), and the search means only one of them: the one that lies nearer
    to ``before``, so that the search does not jump between steps. Without ``before`` the pair gets the sign with a
    positive sum; the released code keeps whatever the decomposition returns, which for a positive core may search for
    the smallest scores.
    """
    left_ARR, _, right_ARR = torch.linalg.svd(core_MARR.float().sum(0))
    left_AR, right_AR = left_ARR[..., 0], right_ARR[..., 0, :]
    if before is None:
        agreement_A = left_AR.sum(-1) + right_AR.sum(-1)
    else:
        agreement_A = (left_AR * before[0]).sum(-1) + (right_AR * before[1]).sum(-1)
    sign_A1 = torch.where(agreement_A < 0, -1.0, 1.0)[:, None]
    return left_AR * sign_A1, right_AR * sign_A1


def spectral_ratio(core_MARR: Tensor) -> Tensor:
    """Return sigma_2 / sigma_1 of each head's summed core, [A]: 0 where the search is along the whole core."""
    singular_AR = torch.linalg.svdvals(core_MARR.float().sum(0))
    ratio_A: Tensor = singular_AR[:, 1:2].sum(1) / singular_AR[:, 0]
    return ratio_A


def recall(found_TAK: Tensor, wanted_TAK: Tensor) -> float:
    """Return the share of the wanted rows that are among the found ones; 1 where none is wanted."""
    if wanted_TAK.numel() == 0:
        return 1.0
    return float((wanted_TAK[..., :, None] == found_TAK[..., None, :]).any(-1).double().mean())


def _side(first: int, second: int, k: int) -> int:
    """Return how many keys of each side can hold one of the ``k`` best rows."""
    if first != second or not 0 < k <= first * second:
        raise ValueError(f"k={k} rows cannot be found on a grid of {first} x {second}; use equal sides, a smaller k.")
    return min(k, first)


def _best(grid_TACC: Tensor, first_TAC: Tensor, second_TAC: Tensor, keys: int, k: int) -> tuple[Tensor, Tensor]:
    """Return scores and rows of the ``k`` best of a grid of candidates, whose keys are given for each side."""
    scores_TAK, place_TAK = exhaustive_topk(grid_TACC, k)
    ids_TAC = (first_TAC[..., :, None] * keys + second_TAC[..., None, :]).flatten(-2)
    return scores_TAK, ids_TAC.gather(-1, place_TAK)
