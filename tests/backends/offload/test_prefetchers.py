"""What each prefetcher proposes, and what perfect knowledge is worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.offload.access import Access, Future, Layout, Moment
from moebench.backends.offload.activation import ActivationMatrices, directions
from moebench.backends.offload.names import PREFETCHERS, make_policy, make_prefetcher
from moebench.backends.offload.prefetch.learned import Nearest, following
from moebench.backends.offload.simulate import simulate
from moebench.contracts import load_file

MADE = load_file(Path(__file__).parent / "made_accesses.py")
LAYOUT = Layout((3, 4, 6), 4)


def access(step, layer, *experts, hints=(), weights=None):
    return Access(step, layer, experts, (1,) * len(experts), weights or (1.0,) * len(experts), hints)


def proposals(spec, accesses, layout=LAYOUT):
    """Return what is proposed after each access."""
    prefetcher, future = make_prefetcher(spec), Future(accesses)
    return [list(prefetcher.propose(Moment(now, one, layout, future))) for now, one in enumerate(accesses)]


def test_hints_come_in_the_order_of_their_priority():
    hints = (((4, 0), 0.1), ((4, 3), 0.7), ((4, 1), 0.7))
    assert proposals("gate", [access(0, 3, 0, hints=hints), access(0, 4, 1)]) == [[(4, 1), (4, 3), (4, 0)], []]


def test_what_is_decided_ahead_ends_with_the_step():
    accesses = [access(0, 3, 0), access(0, 4, 1, 2, weights=(0.2, 0.8)), access(0, 6, 3), access(1, 3, 0)]
    assert proposals("pregate", accesses) == [[(4, 2), (4, 1)], [(6, 3)], [], []]
    assert proposals("pregate:5", accesses)[0] == [(4, 2), (4, 1), (6, 3)]
    assert proposals("oracle:2", accesses) == [[(4, 2), (4, 1), (6, 3)], [(6, 3), (3, 0)], [(3, 0)], []]


def test_the_most_frequent_of_the_following_layers_come_as_many_as_now():
    accesses = [access(0, 3, 1), access(0, 4, 0), access(0, 6, 2), access(1, 3, 1, 2), access(1, 4, 0, 1)]
    assert proposals("frequency", accesses) == [[], [], [(3, 1)], [(4, 0)], [(6, 2)]]
    assert proposals("frequency:2", accesses)[-1] == [(6, 2), (3, 1), (3, 2)]
    assert following(LAYOUT, 4, 9) == [6, 3, 4]


def test_the_nearest_matrix_tells_who_comes():
    one = [access(step, layer, 0) for step in range(4) for layer in LAYOUT.layers]
    other = [access(step, layer, 3) for step in range(4, 8) for layer in LAYOUT.layers]
    again = [access(8, layer, 0) for layer in LAYOUT.layers] + [access(9, 3, 0)]
    prefetcher, found = Nearest(layers=2, period=4), []
    for now, each in enumerate(one + other + again):
        found.append(list(prefetcher.propose(Moment(now, each, LAYOUT))))
    assert found[: len(one)] == [[]] * len(one)  # nothing is stored yet
    assert found[len(one)] == [(4, 0), (6, 0)]  # the other subject has only begun
    assert found[-2] == [(3, 0), (4, 0)]  # at the last layer all rows tell
    assert found[-1] == [(4, 0), (6, 0)]


def test_the_farther_a_layer_the_less_its_tokens_weigh():
    prefetcher = Nearest(layers=2, period=1)
    stored = [Access(0, 3, (0,), (1,), (1.0,)), Access(0, 4, (0,), (3,), (1.0,)), Access(0, 6, (1,), (4,), (1.0,))]
    for now, one in enumerate(stored):
        prefetcher.propose(Moment(now, one, LAYOUT))
    found = prefetcher.propose(Moment(3, access(1, 3, 0), LAYOUT))
    assert found == [(4, 0), (6, 1)]  # 3 tokens x 3/4 before 4 tokens x 2/4


def test_rows_up_to_this_layer_do_not_tell():
    """As in the authors' code: only rows after the current layer are compared, which earlier tokens have filled."""
    matrices = ActivationMatrices(period=1)
    first = [access(0, 3, 0), access(0, 4, 1), access(0, 6, 1)]
    second = [access(1, 3, 3), access(1, 4, 2), access(1, 6, 2)]
    for now, one in enumerate([*first, *second, access(2, 3, 0)]):
        matrices.see(Moment(now, one, LAYOUT))
    matrices.running_LE[1:] = [[0, 0, 1, 0], [0, 0, 1, 0]]  # rows of an earlier token of the sequence
    nearest_LE = matrices.nearest(Moment(6, access(2, 3, 0), LAYOUT))
    assert np.array_equal(nearest_LE, [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 0]])
    matrices.running_LE[1:] = 0  # now the only row is like that of the first, but it does not tell: a tie
    assert np.array_equal(matrices.nearest(Moment(6, access(2, 3, 0), LAYOUT))[1], [0, 0, 1, 0])


def test_the_matrix_that_is_seldom_the_nearest_makes_room():
    matrices = ActivationMatrices(period=1, kept=2)
    for step, expert in enumerate((0, 1, 0, 2)):  # the first is the nearest to the third, the second to nobody
        moment = Moment(step, access(step, 3, expert), Layout((3,), 4))
        matrices.see(moment)
        matrices.nearest(moment)
    assert [int(one_LE.argmax()) for one_LE in matrices._stored] == [0, 0]


def test_directions_are_unit_vectors_or_zero():
    assert np.array_equal(directions(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])


@given(case=MADE.traces(), share=st.sampled_from((0.5, 1.0)))
@settings(max_examples=60, deadline=None)
def test_an_oracle_is_always_right(case, share):
    accesses, layout = case
    capacity = int(share * layout.size)
    simulated = simulate(accesses, make_policy("lru"), capacity, layout, make_prefetcher("oracle"))
    assert simulated.tally.wasted == 0
    if capacity >= 2 * layout.experts:  # whatever one access asks for fits into the half that may be ahead
        assert simulated.tally.misses == len(accesses[0].experts)


@given(case=MADE.traces(), spec=st.sampled_from(sorted(set(PREFETCHERS) - {"none"})))
@settings(max_examples=60, deadline=None)
def test_proposals_are_keys_of_the_model_each_once(case, spec):
    accesses, layout = case
    for keys in proposals(spec, accesses, layout):
        assert len(keys) == len(set(keys))
        assert set(keys) <= set(layout.keys())


def test_on_a_text_that_switches_subjects_its_traces_tell_more_than_counts():
    layout = Layout(tuple(range(4)), 16)
    accesses = MADE.subjects(layout, 2, 320, seed=1, wide=3, length=16)
    recall = {
        spec: simulate(accesses, make_policy("lru"), 16, layout, make_prefetcher(spec)).tally.recall
        for spec in ("none", "eam", "frequency", "pregate", "oracle")
    }
    assert recall["none"] == 0
    assert recall["frequency"] < recall["eam"] < recall["pregate"] < recall["oracle"] <= 1
