"""GPTQ (Frantar et al., arXiv 2210.17323): rounding column by column, each error made good by the columns that follow.

Written from the paper. Where it departs from the released code:

- Channels that were never active keep their weights, rounded to nearest (the code sets them to 0): an expert that saw
  no token is then what rounding to nearest makes of it.
- A group's scales come from weights that all compensation so far has reached, also where a group begins inside a block
  (the code reads stale weights there). So the size of a block changes nothing but the time.
- Errors are those of the scales as stored in bfloat16, and the arithmetic is float64.

With 2 bits and inputs whose channels differ much, what is handed on can widen the groups behind until rounding to
nearest is nearer; ``desc_act``, whose scales are those of the weights as they were, was nearer there.

Shape letters: O output rows, I input channels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...contracts import Scheme
from ..channel_stats import ChannelStats
from .calibrated import check_finite, second_moment
from .grid import Grid, check_group, in_groups
from .integer import IntTensor
from .integer_params import Gptq

BLOCK = 128
"""Columns whose errors reach the columns behind them in one product."""


def encode(weight_OI: Tensor, how: Gptq | Scheme, stats: ChannelStats | None, block: int = BLOCK) -> IntTensor:
    """Return ``weight_OI`` in codes that keep the outputs on the calibration tokens near.

    Raises:
        ValueError: no statistics, ones that do not fit or are not finite, weights that are not finite, a group that
            does not divide the input width, or a Hessian that is singular even with ``damp``.
    """
    params = Gptq.of(how)
    columns = weight_OI.shape[1]
    check_group(params.group, columns)
    check_finite(weight_OI)
    hessian_II = 2 * second_moment("gptq", weight_OI, stats)
    order_I = torch.arange(columns, device=weight_OI.device)
    grids: list[Grid] = []
    if params.desc_act:
        order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
        grids = _own_grids(weight_OI, params)
    upper_II = inverse_factor(hessian_II[order_I][:, order_I], params.damp)
    codes_OI = _codes(weight_OI.double()[:, order_I], upper_II, params, grids, order_I.tolist(), block)
    codes_OGN = in_groups(codes_OI[:, order_I.argsort()], params.group)
    return IntTensor.pack(codes_OGN, Grid.join(grids), params.scheme())


def inverse_factor(hessian_II: Tensor, damp: float) -> Tensor:
    """Return the upper triangular U with U^T U = (H + damp mean(diag H) 1)^-1; channels without inputs count as 1.

    U is the inverse of the R in H = R R^T, and R the Cholesky factor of H with rows and columns in reverse.
    """
    diagonal_I = hessian_II.diagonal()
    damped_I = diagonal_I + damp * diagonal_I.mean()
    damped_II = hessian_II + torch.diag(torch.where(damped_I > 0, damped_I, 1) - diagonal_I)
    reversed_II = damped_II.flip(0, 1)
    lower_II, failed = torch.linalg.cholesky_ex(reversed_II)
    # what is left of a channel after those before it: of a singular matrix rounding may leave a little of it
    nothing_I = len(lower_II) * torch.finfo(lower_II.dtype).eps * reversed_II.diagonal()
    if int(failed) or not bool((lower_II.diagonal() ** 2 > nothing_I).all()):
        raise ValueError(f"the inputs' second moment is singular with damp={damp:g}; use a larger damp, such as 0.01.")
    identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
    upper_II: Tensor = torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
    return upper_II


def _own_grids(weight_OI: Tensor, params: Gptq) -> list[Grid]:
    """Return the grid of each group of the weights as they are."""
    groups_GON = in_groups(weight_OI, params.group).unbind(1)
    return [Grid.fit(group_ON[:, None], params.bits, params.symmetric) for group_ON in groups_GON]


def _codes(work_OI: Tensor, upper_II: Tensor, params: Gptq, grids: list[Grid], order: list[int], block: int) -> Tensor:
    """Return the codes of the columns, which ``work_OI`` holds in the ``order`` in which they are rounded.

    Unless ``grids`` has the grid of every group, they are fitted when their first column's turn comes, and added to it.
    ``work_OI`` is overwritten.
    """
    columns = work_OI.shape[1]
    group = params.group or columns
    fitted = bool(grids)
    codes_OI = torch.empty_like(work_OI)
    for start, stop in pairwise(sorted({*range(0, columns, block), *range(0, columns, group), columns})):
        if not fitted and start % group == 0:
            grids.append(Grid.fit(work_OI[:, None, start : start + group], params.bits, params.symmetric))
        errors_OB = torch.empty_like(work_OI[:, start:stop])
        for column in range(start, stop):
            grid = grids[order[column] // group]
            code_O11 = grid.codes(work_OI[:, column, None, None])
            codes_OI[:, column] = code_O11[:, 0, 0]
            error_O = (work_OI[:, column] - grid.levels(code_O11)[:, 0, 0]) / upper_II[column, column]
            work_OI[:, column + 1 : stop] -= torch.outer(error_O, upper_II[column, column + 1 : stop])
            errors_OB[:, column - start] = error_O
        work_OI[:, stop:] -= errors_OB @ upper_II[start:stop, stop:]
    return codes_OI
