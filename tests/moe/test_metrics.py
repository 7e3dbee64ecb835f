"""Figures of a Routing against values known by hand, and bounds that hold for any load."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.metrics import histogram, load_metrics, load_series, routing_metrics
from moebench.moe.routing import Routing

relaxed = settings(deadline=None, max_examples=60)


def named(metrics):
    values = {metric.name: metric.value for metric in metrics}
    assert len(values) == len(metrics), "a name came twice"
    return values


def of_load(*load):
    return named(load_metrics(torch.tensor(load)))


def single(expert_of_token, experts, weight=1.0):
    """One expert per token."""
    indices_T1 = torch.tensor(expert_of_token)[:, None]
    return Routing.topk(indices_T1, torch.full(indices_T1.shape, weight), experts)


def test_imbalance_counts_dead_experts():
    assert of_load(5, 5, 0, 0, 0, 0, 0, 0)["load_max_over_mean"] == 4.0
    assert of_load(5, 5, 0, 0, 0, 0, 0, 0)["dead_experts"] == 6


def test_imbalance_does_not_saturate():
    assert of_load(100_000, 2000, 2000, 1500)["load_max_over_mean"] == pytest.approx(3.79, abs=0.005)


def test_balance_and_collapse_are_the_ends_of_every_scale():
    even, one = of_load(7, 7, 7, 7), of_load(28, 0, 0, 0)
    assert even == {
        "load_max_over_mean": 1.0,
        "load_cv": 0.0,
        "load_gini": 0.0,
        "load_entropy": pytest.approx(math.log(4)),
        "load_entropy_normalised": pytest.approx(1.0),
        "dead_experts": 0.0,
    }
    assert one["load_max_over_mean"] == 4.0
    assert one["load_cv"] == pytest.approx(math.sqrt(3))
    assert one["load_gini"] == pytest.approx(0.75)
    assert one["load_entropy"] == 0.0
    assert one["load_entropy_normalised"] == 0.0


def test_gini_by_its_definition():
    load = [9, 1, 4, 0, 4]
    pairs = sum(abs(a - b) for a in load for b in load)
    assert of_load(*load)["load_gini"] == pytest.approx(pairs / (2 * len(load) * sum(load)))


@relaxed
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=20).filter(any), st.integers(2, 9))
def test_load_figures_stay_in_range_and_ignore_order_and_scale(load, factor):
    values, experts = of_load(*load), len(load)
    assert 1 <= values["load_max_over_mean"] <= experts + 1e-9
    assert -1e-12 <= values["load_gini"] <= 1 - 1 / experts + 1e-9
    assert 0 <= values["load_entropy_normalised"] <= 1 + 1e-9
    assert of_load(*sorted(load)) == pytest.approx(values)
    assert of_load(*(factor * n for n in load)) == pytest.approx(values)


def test_an_empty_load_has_no_imbalance():
    values = named(routing_metrics(Routing.dense(torch.zeros(3, 4))))
    assert values["load_max_over_mean"] is None
    assert values["load_entropy_normalised"] is None
    assert values["dead_experts"] == 4
    assert values["k_mean"] == 0


def test_no_tokens_have_no_figures():
    values = named(routing_metrics(Routing.dense(torch.zeros(0, 4))))
    assert {values[name] for name in ("k_mean", "k_var", "weight_sum_mean")} == {None}


def test_k_and_weights_count_dropped_tokens():
    gate_TE = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]])
    metrics = routing_metrics(Routing.dense(gate_TE))
    values = named(metrics)
    assert values["k_mean"] == 1.0
    assert values["k_var"] == pytest.approx(2 / 3)
    assert values["weight_sum_mean"] == pytest.approx(1.25 / 3)
    assert {metric.name: metric.n for metric in metrics}["k_mean"] == 3
    assert {metric.name: metric.n for metric in metrics}["load_cv"] == 3


def test_kinds_leave_only_experts_with_weights_in_the_load():
    routing = single([0, 0, 1, 1, 2, 2, 2, 2], experts=4)
    values = named(routing_metrics(routing, ("ffn", "ffn", "copy", "zero")))
    assert values["load_max_over_mean"] == 1.0
    assert values["dead_experts"] == 0
    assert values["ffn_k_mean"] == 0.5
    assert values["k_mean"] == 1.0
    assert named(routing_metrics(routing))["dead_experts"] == 1


def test_load_series():
    series = load_series(single([0, 2, 2], experts=4), layer=7)
    assert (series.name, series.values, series.layer) == ("tokens_per_expert", (1.0, 0.0, 2.0, 0.0), 7)


def test_histogram_requested_against_realised():
    (requested, realised), error = histogram(torch.tensor([3, 1, 0]), single([0, 0, 1, 2], experts=3))
    assert requested.values == (0.75, 0.25, 0.0)
    assert realised.values == (0.5, 0.25, 0.25)
    assert error.value == 0.25
    assert error.n == 4


@pytest.mark.parametrize("requested", [[1.0, 1.0], [0.0, 0.0, 0.0]])
def test_histogram_refuses_what_is_no_share_per_expert(requested):
    with pytest.raises(ValueError, match="3 shares"):
        histogram(torch.tensor(requested), single([0, 1], experts=3))
