"""PMQ, the integer program of MC-MoE (arXiv 2410.06270), by scipy's HiGHS.

Shape letters: E experts of one layer, B choices of bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...contracts import MoebenchError
from .allocators import Rule
from .budget import Costs

SPREAD = 1e4
"""The solver's tolerances are absolute (1e-7); the largest coefficient of the objective is scaled to this."""


def objective(
    error_EB: Sequence[Sequence[float]],
    count_E: Sequence[float],
    share_E: Sequence[float],
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 2.0,
) -> NDArray[np.float64]:
    """Return what expert e at choice b adds, [E, B]: phi_e^alpha * w_e^beta * epsilon_eb^gamma.

    phi and w are ``count_E`` and ``share_E`` as parts of the layer's sum, epsilon is ``error_EB``. The paper has
    alpha=1, beta=1.5, gamma=2; the released code never uses its gamma, which is gamma=1.
    """
    error, phi, share = (np.asarray(value, dtype=np.float64) for value in (error_EB, count_E, share_E))
    if error.ndim != 2 or phi.shape != error.shape[:1] or share.shape != error.shape[:1]:
        raise ValueError(
            f"errors {error.shape}, counts {phi.shape} and shares {share.shape} must be of the same experts."
        )
    if any(not np.isfinite(value).all() or (value < 0).any() for value in (error, phi, share)):
        raise ValueError("errors, counts and shares must be finite and not negative; look at the calibration.")
    phi, share = (value / (value.sum() or 1.0) for value in (phi, share))
    product: NDArray[np.float64] = (phi**alpha * share**beta)[:, None] * error**gamma
    return product


def pmq(objective_EB: NDArray[np.float64], one_of_each: bool = True) -> Rule:
    """Return the rule that minimises the sum of ``objective_EB`` within the budget.

    With ``one_of_each`` at least one expert gets the widest choice and at least one the second widest (3 and 2 bits in
    the paper).
    """

    def rule(costs: Costs, allowed: int) -> tuple[int, ...]:
        experts, choices = objective_EB.shape
        if (experts, choices) != (len(costs), len(costs.choices)):
            raise ValueError(f"the objective is {objective_EB.shape} for {len(costs)} experts at {costs.choices} bits.")
        solved = _solve(objective_EB, costs, allowed, 2 if one_of_each else 0)
        bits_E = tuple(costs.choices[place] for place in solved)
        if costs.total(bits_E) > allowed:
            raise MoebenchError("the solver exceeded the budget by its tolerance; lower the budget a little.")
        return bits_E

    return rule


def _solve(objective_EB: NDArray[np.float64], costs: Costs, allowed: int, each: int) -> list[int]:
    """Return the chosen place of each expert; the ``each`` widest choices are taken at least once."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise MoebenchError("allocation 'pmq' needs scipy; run pip install 'moebench[quantization]'.") from None
    experts, choices = objective_EB.shape
    if each > choices:
        raise ValueError(
            f"one_of_each wants two choices of bits and there is {costs.choices}; give more or turn it off."
        )
    stored = np.asarray(costs.stored_UB, dtype=np.int64)
    extra = stored - stored[:, :1]
    unit = max(1, int(np.gcd.reduce(extra, axis=None)))
    one_choice = np.kron(np.eye(experts), np.ones(choices))
    widest = np.tile(np.eye(choices)[choices - each :], experts)
    constraints = [
        LinearConstraint(one_choice, 1, 1),
        LinearConstraint((extra // unit).reshape(1, -1), -np.inf, (allowed - int(stored[:, 0].sum())) // unit),
        *([LinearConstraint(widest, 1, np.inf)] if each else []),
    ]
    scaled = objective_EB - objective_EB.min(axis=1, keepdims=True)
    result: Any = milp(
        (scaled * (SPREAD / (scaled.max() or 1.0))).ravel(),
        integrality=np.ones(scaled.size),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        wanted = " and ".join(f"one expert at {bits} bits" for bits in costs.choices[choices - each :])
        raise ValueError(f"no allocation keeps the budget{f' with {wanted}' if each else ''}; raise the budget.")
    chosen: list[int] = result.x.reshape(experts, choices).argmax(axis=1).tolist()
    return chosen
