"""The order behind a Pareto front: identities and properties, with no store."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.results.pareto import Mark, Place, Placed, ahead, best_of_all, dominates, place, span
from moebench.results.utilisation import Peaks, cost_of_tokens, s_mbu, s_mfu

WHOLE = st.integers(-4, 4)


@st.composite
def spans(draw, better="lower"):
    value, below, above = draw(WHOLE), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    known = draw(st.integers(0, 9)) > 0
    return span(value, value - below if known else None, value + above if known else None, better)


@st.composite
def marks(draw, least=0):
    pairs = draw(st.lists(st.tuples(spans(), spans(), st.integers(0, 7)), min_size=least, max_size=12))
    return [Mark(f"m{i:02d}", x, y, "contended" if odd == 0 else "") for i, (x, y, odd) in enumerate(pairs)]


def having(places, *wanted):
    return {key for key, one in places.items() if one.place in wanted}


@given(marks())
def test_the_front_is_a_subset_and_every_mark_has_one_place(found):
    places = place(found)
    assert list(places) == [mark.key for mark in found]
    assert having(places, *Place) == {mark.key for mark in found}
    assert having(places, Place.UNJUDGED) == {m.key for m in found if m.doubt or not (m.x.bounded and m.y.bounded)}


@given(marks())
def test_a_mark_is_dominated_only_where_another_is_better_on_both_axes_beyond_the_intervals(found):
    places = place(found)
    by_key = {mark.key: mark for mark in found}
    judged = [mark for mark in found if mark.key not in having(places, Place.UNJUDGED)]
    for mark in judged:
        better = [o.key for o in judged if o.x.hi < mark.x.lo and o.y.hi < mark.y.lo]
        assert (places[mark.key].place == Place.DOMINATED) == bool(better)
        if better:
            assert places[mark.key].by
            assert set(places[mark.key].by) <= set(better) - having(places, Place.DOMINATED)
    for key in having(places, Place.TIE):
        assert places[key].by
        for other in places[key].by:
            assert places[other].place == Place.FRONT
            assert ahead(by_key[other], by_key[key])
            assert not dominates(by_key[other], by_key[key])
    assert all(not places[key].by for key in having(places, Place.FRONT, Place.UNJUDGED))


@given(marks(least=1))
def test_there_is_a_front_wherever_anything_can_be_judged_and_it_is_a_staircase(found):
    places = place(found)
    kept = [mark for mark in found if places[mark.key].place == Place.FRONT]
    assert bool(kept) == (having(places, Place.UNJUDGED) != set(places))
    assert not any(ahead(one, other) for one in kept for other in kept)


@given(marks())
def test_leaving_dominated_marks_out_changes_no_other_place(found):
    places = place(found)
    gone = having(places, Place.DOMINATED)
    fewer = place(mark for mark in found if mark.key not in gone)
    assert fewer == {key: one for key, one in places.items() if key not in gone}


@given(marks(least=1), st.data())
def test_adding_a_dominated_mark_changes_nothing(found, data):
    places = place(found)
    judged = sorted(set(places) - having(places, Place.UNJUDGED))
    if not judged:
        return
    by_key = {mark.key: mark for mark in found}
    best = by_key[data.draw(st.sampled_from(judged))]
    worse = [span(one.hi + 1, one.hi + 0.5, one.hi + data.draw(WHOLE) + 6) for one in (best.x, best.y)]
    more = place([*found, Mark("zz", *worse)])
    assert more.pop("zz").place == Place.DOMINATED
    assert {key: one.place for key, one in more.items()} == {key: one.place for key, one in places.items()}
    assert {key: more[key] for key in having(places, Place.FRONT, Place.TIE)} == {
        key: places[key] for key in having(places, Place.FRONT, Place.TIE)
    }


@given(marks(), st.randoms(use_true_random=False))
def test_the_order_of_the_marks_means_nothing(found, random):
    mixed = list(found)
    random.shuffle(mixed)
    assert place(mixed) == place(found)


@given(marks())
def test_a_doubtful_mark_neither_dominates_nor_is_dominated(found):
    places = place(found)
    doubtful = having(places, Place.UNJUDGED)
    assert place(m for m in found if m.key not in doubtful) == {
        k: one for k, one in places.items() if k not in doubtful
    }


@given(st.lists(st.tuples(WHOLE, WHOLE, st.integers(0, 2), st.integers(0, 2)), max_size=10))
def test_an_axis_of_which_more_is_better_is_its_mirror_image(values):
    lower = [Mark(str(i), span(x, x - w, x + w), span(y, y - v, y + v)) for i, (x, y, w, v) in enumerate(values)]
    higher = [
        Mark(str(i), span(-x, -x - w, -x + w, "higher"), span(y, y - v, y + v)) for i, (x, y, w, v) in enumerate(values)
    ]
    assert place(higher) == place(lower)


def test_the_places_of_a_few_marks():
    def mark(key, x, y, half=0.5, **over):
        return replace(Mark(key, span(x, x - half, x + half), span(y, y - half, y + half)), **over)

    fast, good = mark("fast", 1, 9), mark("good", 9, 1)
    near = mark("near", 1.8, 9.2)
    poor, none = mark("poor", 5, 12), replace(mark("none", 1, 1), x=span(1, None, None))
    flagged = mark("flagged", 0, 0, doubt="contended")
    assert place([fast, good, near, poor, none, flagged]) == {
        "fast": Placed(Place.FRONT),
        "good": Placed(Place.FRONT),
        "near": Placed(Place.TIE, ("fast",)),
        "poor": Placed(Place.DOMINATED, ("fast", "near")),
        "none": Placed(Place.UNJUDGED, (), "no interval"),
        "flagged": Placed(Place.UNJUDGED, (), "contended"),
    }


def test_equal_on_an_axis_is_not_better_on_it_even_without_chance():
    same, better = (Mark(key, span(4, 4, 4), span(y, y - 0.1, y + 0.1)) for key, y in (("a", 3.0), ("b", 1.0)))
    assert place([same, better])["a"] == Placed(Place.TIE, ("b",))


def test_a_span_holds_its_estimate_and_has_no_bounds_where_one_is_missing():
    assert (span(1.0, 2.0, 3.0).lo, span(5.0, 2.0, 3.0).hi) == (1.0, 5.0)
    assert not span(1.0, 0.5, None).bounded
    assert math.isinf(span(1.0, None, 2.0).lo)


def test_nobody_is_best_in_everything_on_a_front_of_two():
    spans = {"a": (span(1, 1, 1), span(3, 3, 3)), "b": (span(3, 3, 3), span(1, 1, 1))}
    assert best_of_all(spans) == []
    assert best_of_all({**spans, "c": (span(1, 0, 2), span(1, 0, 2))}) == ["c"]


# ---------------------------------------------------------------------------------------------------------------------
# How much of the machine

HOST = {"host_key": "h", "device": "cpu", "threads": 1, "evidence": "measured-cpu", "dtype": "bfloat16"}
PLACE = ("h", "cpu", 1, "measured-cpu")
PEAKS = Peaks({(*PLACE, "bandwidth_dram", None): 10e9, (*PLACE, "peak_flops", "bfloat16"): 100e9}, "")


def layer(tokens, experts, chosen, k, ns, hidden=64, width=32, element=2, shared=0):
    """A row with the bytes and flops of a layer by MoE-CAP's definition, plus inputs and outputs."""
    per_expert = 3 * hidden * width
    moved = (chosen * per_expert + shared) * element + 2 * tokens * hidden * element
    flops = 2.0 * tokens * (k * per_expert + shared)
    return {
        **HOST,
        "bytes": moved,
        "flops": flops,
        "tokens": tokens,
        "median_ns": ns,
        "lo_ns": ns * 0.9,
        "hi_ns": ns * 1.25,
    }


def test_s_mbu_and_s_mfu_by_hand():
    row = layer(tokens=4, experts=8, chosen=5, k=2, ns=100_000.0)
    assert row["bytes"] == (5 * 6144) * 2 + 1024 == 62_464
    assert s_mbu(row, PEAKS) == pytest.approx((0.062464, 0.062464 / 1.25, 0.062464 / 0.9))
    assert s_mfu(row, PEAKS)[0] == pytest.approx(2 * 4 * 2 * 6144 / 1e-4 / 100e9)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 4096), st.floats(1e3, 1e9))
def test_s_mbu_is_at_most_that_of_all_experts_and_equal_where_all_are_active(experts, chosen, shared, ns):
    chosen = min(chosen, experts)
    sparse = s_mbu(layer(8, experts, chosen, 1, ns, shared=shared), PEAKS)
    dense = s_mbu(layer(8, experts, experts, 1, ns, shared=shared), PEAKS)
    assert sparse[0] <= dense[0]
    assert (sparse == dense) == (chosen == experts)


@pytest.mark.parametrize("over", [{"host_key": "other"}, {"threads": 2}, {"evidence": "model"}, {"device": "cuda"}])
def test_without_a_probe_of_the_same_host_there_is_no_utilisation(over):
    row = layer(4, 8, 5, 2, 1e5) | over
    assert (s_mbu(row, PEAKS), s_mfu(row, PEAKS)) == (None, None)


def test_a_peak_of_another_dtype_is_no_peak_but_memory_has_none():
    row = layer(4, 8, 5, 2, 1e5) | {"dtype": "float32"}
    assert s_mfu(row, PEAKS) is None
    assert s_mbu(row, PEAKS) is not None


def test_what_was_not_measured_has_no_utilisation_and_no_cost():
    row = layer(4, 8, 5, 2, 1e5)
    assert s_mbu(row | {"bytes": None}, PEAKS) is None
    assert s_mfu(row | {"median_ns": None}, PEAKS) is None
    assert s_mbu(row | {"lo_ns": None}, PEAKS)[1:] == (pytest.approx(s_mbu(row, PEAKS)[1]), None)
    assert cost_of_tokens(row, None) is None
    assert cost_of_tokens(row | {"median_ns": None}, 1.0) is None


def test_the_cost_of_tokens_by_hand():
    row = layer(4, 8, 5, 2, 1_000_000.0)  # four tokens in a millisecond: a million in 250 s
    assert cost_of_tokens(row, 3.6) == pytest.approx((0.25, 0.225, 0.3125))
