"""Oracles of suite ``offload``: the run with all experts at hand. Shape letters: B sequences, H hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...contracts import Check
from ...moe.experts import ExpertStore
from ...moe.oracle import compare, reference
from .layers import Answer


def same(found_BH: Tensor, expected_BH: Tensor) -> Check:
    """Ask for the same bits."""
    if torch.equal(found_BH, expected_BH):
        return Check(True, 0.0, 0.0)
    if found_BH.shape != expected_BH.shape or not bool(torch.isfinite(found_BH).all()):
        return Check(False, bound=0.0, reason="the output is of another shape, or not finite")
    off_B = (found_BH.double() - expected_BH.double()).norm(dim=-1)
    error = float((off_B / expected_BH.double().norm(dim=-1).clamp(min=1e-30)).max())
    return Check(False, error, 0.0, f"outputs differ by {error:.2g} of their norm where they must be the same bits")


def layer_by_layer(answers: Sequence[Answer], dense: Mapping[int, ExpertStore]) -> Check:
    """Compare what each layer answered with the float64 oracle on the very inputs that it had; return the worst.

    For executions that round otherwise: at the end of a deep model, roundings of all layers would be amplified.
    """
    checks = [compare(one.y_TH, reference(dense[one.layer], one.routing, one.x_TH), one.x_TH.dtype) for one in answers]
    failed = [check for check in checks if not check.ok]
    return max(failed or checks, key=lambda check: check.error or 0.0)
