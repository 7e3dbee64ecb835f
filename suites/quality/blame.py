"""Which expert of which layer an output's error comes from: rounding is everybody's, a mistake is somebody's.

Shape letters: T tokens, E expert ids, H hidden, N assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...moe.layer import assigned_output, assignments
from .block import Call

RIDGE = 1e-6
"""Of the mean square of an expert's shares: what keeps experts apart that always come together."""


@dataclass(frozen=True)
class Blame:
    """The expert whose outputs are off the most: by ``error`` of their size, where its layer's others are by ``usual``
    (their median)."""

    layer: int
    expert: int
    error: float
    usual: float

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, expert {self.expert} is off by {self.error:.2g} of its outputs, "
            f"the layer's others by {self.usual:.2g}"
        )


def blame(calls: Sequence[Call]) -> Blame | None:
    """Return the worst expert of the layers that made ``calls``; None where none of their experts has a token."""
    found = []
    for call in calls:
        error_E = expert_errors(call)
        used_E = call.routing.counts_E > 0
        if not bool(used_E.any()):
            continue
        expert = int(error_E.masked_fill(~used_E, -1.0).argmax())
        used_E[expert] = False
        usual = float(error_E[used_E].median()) if bool(used_E.any()) else 0.0
        found.append(Blame(call.block.index, expert, float(error_E[expert]), usual))
    return max(found, key=lambda one: one.error, default=None)


def expert_errors(call: Call) -> Tensor:
    """Return the root mean square error of each expert's outputs relative to their size, [E] float64.

    The squared error of a row is the sum of its experts' where these are independent. So |y - y'|^2 =
    sum_e r_e^2 |w f_e|^2 is solved for r_e^2 by least squares over the tokens, each divided by its own sum so that all
    count the same.
    """
    off_T = (call.y_TH.double() - call.reference().y_TH).square().sum(1)
    square_TE = term_squares(call)
    total_T1 = square_TE.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    share_TE = square_TE / total_T1
    gram_EE = share_TE.T @ share_TE
    gram_EE += RIDGE * gram_EE.diagonal().mean().clamp(min=RIDGE) * torch.eye(len(gram_EE), dtype=gram_EE.dtype)
    error_E: Tensor = torch.linalg.solve(gram_EE, share_TE.T @ (off_T / total_T1[:, 0]))
    return error_E.clamp(min=0.0).sqrt()


def term_squares(call: Call) -> Tensor:
    """Return |w f_e(x)|^2 of every token and expert, [T, E] float64; 0 where a token does not have the expert."""
    store = call.block.subject.layer.store
    square_TE = torch.zeros(call.routing.shape, dtype=torch.float64)
    for expert, token_N, weight_N in assignments(call.routing):
        term_NH = assigned_output(call.x_TH, store, expert, token_N).double() * weight_N.double()[:, None]
        square_TE[token_N, expert] = term_NH.square().sum(1)
    return square_TE
