"""moebench.compare on real functions: the verdict's direction, and no time for a wrong answer."""

from __future__ import annotations

import pytest
import torch

import moebench
from moebench.contracts import MoebenchError

X_TH = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))


def once(x_TH):
    return x_TH @ x_TH.T


def three_times(x_TH):
    for _ in range(2):
        x_TH @ x_TH.T
    return x_TH @ x_TH.T


def test_more_work_regresses():
    found = moebench.compare(once, three_times, [X_TH], seconds=0.3)
    assert found.verdict == "regressed"
    assert found.ratio.lo > 1.5
    assert "regressed" in str(found)


def test_less_work_improves():
    assert moebench.compare(three_times, once, [X_TH], seconds=0.3).verdict == "improved"


def test_a_wrong_answer_has_no_time():
    with pytest.raises(MoebenchError, match="outputs differ"):
        moebench.compare(once, lambda x_TH: once(x_TH) * 1.01, [X_TH])


def test_an_answer_that_goes_wrong_later_has_no_time():
    calls = iter(range(10**6))

    def decaying(x_TH):
        return once(x_TH) * (1.0 if next(calls) < 5 else 2.0)

    with pytest.raises(MoebenchError, match="outputs differ"):
        moebench.compare(once, decaying, [X_TH], seconds=0.05)


def test_nan_and_shapes():
    with pytest.raises(MoebenchError, match="not finite"):
        moebench.compare(once, lambda x_TH: once(x_TH) * float("nan"), [X_TH])
    with pytest.raises(MoebenchError, match="shapes"):
        moebench.compare(once, lambda x_TH: once(x_TH)[:2], [X_TH])
