"""Oracles of suite ``offload``: the run with all experts at hand. Shape letters: B sequences, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Check

BOUNDS = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""What |y - y'| / |y'| of a sequence may be at the end of a model whose experts compute in another order: roundings of
all layers add up. Experts chosen by mistake, or weights of another, are off by far more."""


def same(found_BH: Tensor, expected_BH: Tensor) -> Check:
    """Ask for the same bits."""
    if torch.equal(found_BH, expected_BH):
        return Check(True, 0.0, 0.0)
    check = close_to(found_BH, expected_BH, "float32")
    reason = check.reason or f"outputs differ by {check.error:.2g} of their norm where they must be the same bits"
    return Check(False, check.error, 0.0, reason)


def close_to(found_BH: Tensor, expected_BH: Tensor, dtype: str) -> Check:
    """Ask that every sequence is within the bound of ``dtype``."""
    bound = BOUNDS[dtype]
    if found_BH.shape != expected_BH.shape or not bool(torch.isfinite(found_BH).all()):
        return Check(False, bound=bound, reason="the output is of another shape, or not finite")
    off_B = (found_BH.double() - expected_BH.double()).norm(dim=-1)
    error = float((off_B / expected_BH.double().norm(dim=-1).clamp(min=1e-30)).max())
    reason = "" if error <= bound else f"a sequence is off by {error:.2g} of its norm, allowed {bound:.2g}"
    return Check(error <= bound, error, bound, reason)
