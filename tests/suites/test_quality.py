"""Figures of quality by their definitions: calibration, exact match and F1, layer errors, agreement of routers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.routing import Routing
from moebench.moe.routing_metrics.agreement import agreement_per_token, fluctuation
from moebench.suites.quality.answers import exact_match, normalised, token_f1
from moebench.suites.quality.block import relative_error
from moebench.suites.quality.calibration import bin_gaps, calibration_error, equal_mass_bins
from moebench.suites.quality.windows import block_items


def rng(seed):
    return torch.Generator().manual_seed(seed)


# --- calibration -----------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_definition():
    confidence_T = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    right_T = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1], dtype=torch.float64)
    # two bins of four tokens: |0.25 - 0.25| and |0.75 - 0.75|; four of two: means .15 .35 .65 .85 against 0 .5 1 .5
    assert calibration_error(confidence_T, right_T, 0, bins=2).value == pytest.approx(0, abs=1e-12)
    expected = (0.15 + 0.15 + 0.35 + 0.35) / 4
    assert calibration_error(confidence_T, right_T, 0, bins=4).value == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(15, 300), st.integers(1, 20), st.integers(0, 9))
def test_bins_hold_as_many_tokens_each_and_order_them(tokens, bins, seed):
    values_T = torch.rand(tokens, generator=rng(seed), dtype=torch.float64)
    bin_T = equal_mass_bins(values_T, bins)
    counts = torch.bincount(bin_T, minlength=bins)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(bin_T[values_T.argsort()], bin_T.sort().values)
    assert torch.equal(equal_mass_bins(torch.ones(tokens), bins), torch.zeros(tokens, dtype=torch.int64))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(0, 9))
def test_the_error_lies_between_the_mean_gap_and_one(tokens, seed):
    confidence_T = torch.rand(tokens, generator=rng(seed), dtype=torch.float64)
    right_T = torch.randint(2, (tokens,), generator=rng(seed + 1)).double()
    found = calibration_error(confidence_T, right_T, 0)
    assert abs(float((confidence_T - right_T).mean())) - 1e-12 <= found.value <= 1
    assert torch.allclose(bin_gaps(confidence_T, right_T).sum(), (confidence_T - right_T).sum())


def test_a_calibrated_model_has_less_error_than_one_that_is_too_sure():
    confidence_T = torch.rand(6000, generator=rng(0), dtype=torch.float64)
    right_T = (torch.rand(6000, generator=rng(1), dtype=torch.float64) < confidence_T).double()
    calibrated = calibration_error(confidence_T, right_T, 0)
    sure = calibration_error(confidence_T.sqrt(), right_T, 0)
    assert calibrated.hi < sure.lo
    assert sure.value == pytest.approx(float((confidence_T.sqrt() - confidence_T).mean()), abs=0.03)
    assert sure.lo <= sure.value <= sure.hi


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["Eiffel tower"], 1, 1),
        ("a cat", ["cat", "dog"], 1, 1),
        ("a big cat", ["cat"], 0, 2 / 3),
        ("Paris, France", ["Paris"], 0, 2 / 3),
        ("to to be", ["to be"], 0, 4 / 5),
        ("nothing in common", ["other words"], 0, 0),
        ("", ["x"], 0, 0),
        ("the", [""], 1, 1),
        ("x", [], 0, 0),
        ("theatre", ["atre"], 0, 0),
    ],
)
def test_answers_are_compared_as_squad_does(answer, right, exact, f1):
    assert exact_match(answer, right) == exact
    assert token_f1(answer, right) == pytest.approx(f1)


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_is_symmetric_and_one_where_answers_match(one, other):
    assert token_f1(one, [other]) == pytest.approx(token_f1(other, [one]))
    assert exact_match(one, [one]) == token_f1(one, [one]) == 1
    assert 0 <= token_f1(one, [other]) <= 1
    assert normalised(normalised(one)) == normalised(one)


# --- layers, routers, items ------------------------------------------------------------------------------------------


def test_relative_error_is_that_of_each_row():
    expected_TH = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    found_TH = torch.tensor([[3.0, 9.0], [1.0, 0.0], [0.0, 0.0]])
    assert relative_error(found_TH, expected_TH).tolist() == [1.0, 0.0, 0.0]


def test_agreement_is_that_of_each_token():
    one = Routing.topk(torch.tensor([[0, 1], [2, 3], [4, 4 + 9]]), torch.tensor([[0.7, 0.3]] * 3), 5)
    other = Routing.topk(torch.tensor([[0, 1], [3, 2], [1, 2]]), torch.tensor([[0.7, 0.3]] * 3), 5)
    assert agreement_per_token(one, one).tolist() == [[1.0, 1.0, 1.0]] * 3
    assert agreement_per_token(one, other).tolist() == [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    means = {metric.name: metric.value for metric in fluctuation(one, other)}
    assert means == pytest.approx({"fluctuation_top1": 2 / 3, "fluctuation_set": 1 / 3, "jaccard_mean": 2 / 3})


def test_items_are_blocks_of_one_window_in_the_order_of_the_text():
    windows = [torch.full((40, 8), 1.0), torch.full((40, 8), 2.0)]
    found = block_items(windows, "t", {"nll": "nll"})
    assert [(item.item, item.value) for item in found] == [("0", 1.0), ("32", 1.0), ("40", 2.0), ("72", 2.0)]
    after = block_items([window[24:] for window in windows], "t", {"nll": "nll"}, prompt=24)
    assert [(item.item, item.value) for item in after] == [("24", 1.0), ("64", 2.0)], "named by their place in the text"
