"""What becomes of missing experts: each choice against all choices there are, or worked by hand."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.offload.access import Access, Layout, Moment
from moebench.backends.offload.costs import Curve, ExpertCosts
from moebench.backends.offload.execution import Deferral, DuplexSplit, Fiddler, LowBits, best_threshold
from moebench.backends.offload.importance import share_before
from moebench.backends.offload.names import make_policy
from moebench.backends.offload.simulate import simulate
from moebench.contracts import load_file

MADE = load_file(Path(__file__).parent / "made_accesses.py")
SECONDS = st.floats(0, 10).map(lambda value: round(value, 3))
TOKENS = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def moment_of(tokens, weights=None, layer=0, layers=(0, 1)):
    experts = tuple(range(len(tokens)))
    return Moment(0, Access(0, layer, experts, tuple(tokens), tuple(weights or [1.0] * len(tokens))), Layout(layers, 8))


def slower_side(in_place, cold, hot, base=0.0):
    """Return how long it takes until both sides are done."""
    return max(
        sum(seconds for seconds, here in zip(cold, in_place, strict=True) if here),
        base + sum(seconds for seconds, here in zip(hot, in_place, strict=True) if not here),
    )


@given(tokens=TOKENS, load=SECONDS, fixed=SECONDS, each=SECONDS)
@settings(max_examples=100, deadline=None)
def test_fiddlers_choices_are_the_best_of_all(tokens, load, fixed, each):
    costs = ExpertCosts(load, Curve.line(0, 0), Curve.line(fixed, each))
    moment = moment_of(tokens)
    cold, hot = [costs.in_place(count) for count in tokens], [load] * len(tokens)
    masks = list(product((False, True), repeat=len(tokens)))
    for objective in ("sum", "max"):
        made = Fiddler(costs, objective).decide(moment.access.keys, moment)
        assert set(made.values()) <= {"in_place"}
        mask = [key in made for key in moment.access.keys]
        if objective == "max":
            taken = slower_side(mask, cold, hot)
            best = min(slower_side(one, cold, hot) for one in masks)
        else:
            taken = sum(c if here else h for here, c, h in zip(mask, cold, hot, strict=True))
            best = min(sum(c if here else h for here, c, h in zip(one, cold, hot, strict=True)) for one in masks)
        assert taken == pytest.approx(best)


@given(tokens=TOKENS, load=SECONDS, each=SECONDS, slow=SECONDS, there=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_duplex_splits_at_the_best_number_of_tokens(tokens, load, each, slow, there):
    costs = ExpertCosts(load, Curve.line(0.1, each), Curve.line(0.0, slow))
    moment = moment_of(tokens)
    missing = moment.access.keys[there:]
    made = DuplexSplit(costs).decide(missing, moment)
    base = sum(costs.fast(count) for count in tokens[:there])
    mine = tokens[there:]
    cold, hot = [costs.in_place(n) for n in mine], [load + costs.fast(n) for n in mine]
    taken = slower_side([key in made for key in missing], cold, hot, base)
    order = sorted(range(len(mine)), key=lambda place: (mine[place], place))
    thresholds = [[place in order[:count] for place in range(len(mine))] for count in range(len(mine) + 1)]
    assert taken == pytest.approx(min(slower_side(one, cold, hot, base) for one in thresholds))
    assert taken <= min(slower_side([side] * len(mine), cold, hot, base) for side in (False, True)) + 1e-9


def test_a_threshold_is_no_more_than_that():
    cold, hot = [3.0, 3.5], [1.0, 5.0]
    assert best_threshold(cold, hot) == 1  # 5 seconds
    assert min(slower_side(mask, cold, hot) for mask in product((0, 1), repeat=2)) == 3.5  # the other one in place
    assert best_threshold([2.0], [2.0]) == 0  # of equal choices, the fewest in place


def test_important_experts_are_those_of_the_most_weight():
    access = Access(0, 0, (0, 1, 2, 3), (1,) * 4, (0.125, -0.5, 0.25, 0.125))
    assert share_before(access) == {1: 0.0, 2: 0.5, 0: 0.75, 3: 0.875}
    assert share_before(Access(0, 0, (4, 5), (1, 1), (0.0, 0.0))) == {4: 0.0, 5: 0.0}


def test_unimportant_missing_experts_come_in_few_bits():
    moment = moment_of([1] * 4, [0.125, 0.5, 0.25, 0.125])
    assert LowBits(0.6).decide([(0, 0), (0, 1), (0, 2), (0, 3)], moment) == {(0, 0): "low", (0, 3): "low"}
    assert LowBits(0.8).decide([(0, 0), (0, 1)], moment) == {}
    assert LowBits(0).decide(moment.access.keys, moment) == {(0, 0): "low", (0, 2): "low", (0, 3): "low"}


@given(case=MADE.traces(), capacity=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_with_threshold_one_nothing_differs_from_plain_fetching(case, capacity):
    accesses, layout = case
    capacity = min(capacity, layout.size)
    plain = simulate(accesses, make_policy("lru"), capacity, layout)
    assert simulate(accesses, make_policy("lru"), capacity, layout, execution=LowBits(1)) == plain
    assert simulate(accesses, make_policy("lru"), capacity, layout, execution=Deferral(0)) == plain


def test_the_least_important_are_deferred_and_never_all():
    moment = moment_of([1] * 4, [0.125, 0.5, 0.25, 0.125])
    keys = moment.access.keys
    assert Deferral(2).decide(keys, moment) == {(0, 3): "deferred", (0, 0): "deferred"}
    assert Deferral(1).decide([(0, 1), (0, 2)], moment) == {(0, 2): "deferred"}
    assert len(Deferral(9).decide(keys, moment)) == 3
    assert Deferral(9).decide([(0, 0)], moment_of([1])) == {}
    assert Deferral(2).decide(((1, 0), (1, 1)), moment_of([1, 1], layer=1)) == {}  # the last layer


def test_a_curve_is_straight_between_its_points():
    curve = Curve(((1, 2.0), (4, 3.5), (8, 4.5)))
    assert [curve(n) for n in (0, 0.5, 1, 2, 4, 6, 8, 12)] == [0, 2, 2, 2.5, 3.5, 4, 4.5, 5.5]
    assert Curve(((1, 2.0), (4, 1.0)))(100) == 1.0  # noise does not make it fall
    assert Curve(((3, 2.0),))(100) == 2.0
    line = Curve.line(0.5, 0.25)
    assert [line(n) for n in (0, 1, 10)] == [0, 0.75, 3.0]
    for wrong in ((), ((1, 1.0), (1, 2.0)), ((1, -1.0),)):
        with pytest.raises(ValueError, match="of a curve must"):
            Curve(wrong)
