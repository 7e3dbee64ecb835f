"""What every policy keeps to, Belady as the bound of all, and what each family does on accesses worked by hand."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.offload.access import Access, Event, Future, Layout, Moment
from moebench.backends.offload.cache import Cache, Leaving
from moebench.backends.offload.names import POLICIES, PREFETCHERS, make_execution, make_policy, make_prefetcher
from moebench.backends.offload.policies.base import Ranked, Settled
from moebench.backends.offload.policies.lookahead import Belady, Windowed
from moebench.backends.offload.policies.placement import popularity
from moebench.backends.offload.policies.scored import proximity
from moebench.backends.offload.simulate import optimality, read_bytes, simulate, sweep
from moebench.contracts import load_file

MADE = load_file(Path(__file__).parent / "made_accesses.py")
SPECS = [
    *sorted(set(POLICIES) - {"pattern"}),
    "lru_k:1",
    "lru_k:3",
    "lfu:0.5",
    "cpu_moe:1",
    "pattern:blk.2.",
    "belady:3",
]
ANY_POLICY, ANY_PREFETCHER = st.sampled_from(SPECS), st.sampled_from(sorted(PREFETCHERS))


@st.composite
def cases(draw):
    accesses, layout = draw(MADE.traces())
    return accesses, layout, draw(st.integers(0, layout.size))


def hits(simulated):
    return simulated.tally.hits + simulated.tally.covered


@given(case=cases(), spec=ANY_POLICY)
@settings(max_examples=200, deadline=None)
def test_nobody_has_more_hits_than_belady_that_begins_with_the_same(case, spec):
    accesses, layout, capacity = case
    one = simulate(accesses, make_policy(spec), capacity, layout)
    bound = simulate(accesses, Belady(initial=sorted(one.initial)), capacity, layout)
    assert hits(one) <= hits(bound)


@given(case=cases())
@settings(max_examples=120, deadline=None)
def test_a_longer_window_never_has_fewer_hits_and_the_longest_is_belady(case):
    accesses, layout, capacity = case
    windows = [0, 1, 2, 3, 5, 8, len(accesses)]
    found = [hits(simulate(accesses, Windowed(window), capacity, layout)) for window in windows]
    assert found == sorted(found)
    assert found[-1] == hits(simulate(accesses, Belady(), capacity, layout))


@given(case=cases(), filled=st.booleans())
@settings(max_examples=120, deadline=None)
def test_no_order_of_eviction_whatsoever_has_more_hits_than_belady(case, filled):
    """All subsets that can be kept are tried, on the shortest traces."""
    accesses, layout, capacity = case
    accesses, initial = accesses[:6], layout.keys()[:capacity] if filled else []
    reached = {frozenset(initial): 0}  # who is kept -> most hits so far
    for access in accesses:
        following = {}
        for kept, count in reached.items():
            there = kept | set(access.keys)
            count += len(kept & set(access.keys))
            for rest in subsets(there, capacity):
                following[rest] = max(following.get(rest, 0), count)
        reached = following
    assert max(reached.values()) == hits(simulate(accesses, Belady(initial), capacity, layout))


def subsets(keys, size):
    """Return the largest subsets of at most ``size``: more is never worse to keep."""
    return map(frozenset, combinations(sorted(keys), min(size, len(keys))))


@given(case=cases(), spec=ANY_POLICY, ahead=ANY_PREFETCHER, how=st.sampled_from(["fetch", "hobbit:0.3", "defer:1"]))
@settings(max_examples=200, deadline=None)
def test_events_tell_who_is_in_the_cache_and_capacity_holds(case, spec, ahead, how):
    accesses, layout, capacity = case
    future = Future(accesses)
    cache = Cache(make_policy(spec), capacity, layout, make_prefetcher(ahead), future, make_execution(how))
    held = set(cache.resident)
    for access in accesses:
        asked = []
        for event in cache.access(access):
            here = event.key in held
            assert here == (event.kind in ("hit", "covered"))
            if event.evicted is not None:
                held.remove(event.evicted)  # raises where it was not there, or went before
            if event.kept and not here:
                held.add(event.key)
            assert len(held) <= capacity
            asked += [event.key] if event.kind != "prefetch" else []
        assert sorted(asked) == sorted(access.keys)
        assert held == set(cache.resident)
    tally = cache.tally
    assert tally.requests == sum(len(access.experts) for access in accesses)
    assert tally.covered + tally.wasted <= tally.prefetched


@given(case=cases(), spec=ANY_POLICY, ahead=ANY_PREFETCHER)
@settings(max_examples=100, deadline=None)
def test_equal_accesses_give_equal_events(case, spec, ahead):
    accesses, layout, capacity = case
    runs = [simulate(accesses, make_policy(spec), capacity, layout, make_prefetcher(ahead)) for _ in range(2)]
    assert runs[0] == runs[1]


@given(case=cases(), spec=st.sampled_from(["lru", "lru_k", "lfu:2", "belady"]), ahead=ANY_PREFETCHER)
@settings(max_examples=100, deadline=None)
def test_a_heap_finds_who_is_worth_least(case, spec, ahead):
    accesses, layout, capacity = case

    def events(patch):
        if patch is not None:
            patch.setattr(Settled, "least", Ranked.least)
        return simulate(accesses, make_policy(spec), capacity, layout, make_prefetcher(ahead)).events

    with pytest.MonkeyPatch.context() as patch:
        plain = events(patch)
    assert events(None) == plain


def test_hits_alone_do_not_fill_the_memory():
    policy = make_policy("lru")
    cache = Cache(policy, 2, Layout((0,), 2))
    for access in asks(*[0, 1] * 500):
        cache.access(access)
    assert len(policy._heap) < 100


@given(case=cases(), spec=st.sampled_from(["static", "cpu_moe", "cpu_moe:1", "pattern:blk.2."]))
@settings(max_examples=60, deadline=None)
def test_placements_never_change(case, spec):
    accesses, layout, capacity = case
    simulated = simulate(accesses, make_policy(spec), capacity, layout)
    for access, events in zip(accesses, simulated.events, strict=True):
        assert {event.key for event in events if event.kind == "hit"} == set(access.keys) & simulated.initial
        assert all(event.evicted is None and not event.kept for event in events if event.kind == "miss")


@given(case=cases(), spec=st.sampled_from(["lru", "belady"]))
@settings(max_examples=100, deadline=None)
def test_more_slots_never_have_fewer_hits(case, spec):
    accesses, layout, _ = case
    swept = sweep(accesses, lambda: make_policy(spec), range(layout.size + 1), layout)
    found = [hits(one) for one in swept.values()]
    assert found == sorted(found)
    asked = {key for access in accesses for key in access.keys}
    assert swept[0].tally.hits == 0
    assert swept[layout.size].tally.misses == len(asked)  # each comes once, and nobody goes


@given(case=cases(), spec=ANY_POLICY)
@settings(max_examples=60, deadline=None)
def test_policies_without_knowledge_of_the_future_do_not_look_at_it(case, spec):
    accesses, layout, capacity = case
    policy = make_policy(spec)
    if policy.needs_future:
        with pytest.raises(ValueError, match="give the trace beforehand"):
            Cache(policy, capacity, layout)
        return
    cache = Cache(policy, capacity, layout)
    assert [cache.access(access) for access in accesses] == [
        list(events) for events in simulate(accesses, make_policy(spec), capacity, layout).events
    ]


def asks(*experts, layer=0, weights=None):
    """Return the accesses of one layer, one expert each unless a tuple is given."""
    made = []
    for step, chosen in enumerate(experts):
        chosen = chosen if isinstance(chosen, tuple) else (chosen,)
        made.append(Access(step, layer, chosen, (1,) * len(chosen), weights or (1.0,) * len(chosen)))
    return made


def evictions(spec, accesses, capacity, layout=None):
    """Return who went, in order; the key itself where it was not kept."""
    simulated = simulate(accesses, make_policy(spec), capacity, layout or Layout((0,), 8))
    went = [event.evicted if event.kept else event.key for events in simulated.events for event in events]
    return [key[1] for key in went if key is not None]


@pytest.mark.parametrize(
    ("spec", "went"),
    [
        ("lru", [1]),  # the oldest use
        ("lru_k:2", [2]),  # used once only, of those the oldest
        ("lru_k:3", [1]),  # nobody has been used three times but 0: the oldest of the others
        ("lfu", [2]),  # used once, the earliest of those
        ("lfu:0.01", [1]),  # nothing counts but the last use
        ("lfru", [2]),  # 0: 3/2, 1: 2/5, 2: 1/4, 3: 1/1
        ("static", [4]),  # 0 to 3 are there from the start, and nobody else stays
    ],
)
def test_who_goes_is_as_worked_by_hand(spec, went):
    accesses = asks(0, 0, 1, 1, 2, 0, 3, 4)
    assert evictions(spec, accesses, 4) == went


def test_a_window_sees_as_far_as_it_says():
    accesses = asks(0, 1, 2, 0, layer=0)  # when 2 comes at 2, 0 is used at 3: one access away
    assert evictions("belady:0", accesses, 2) == [0, 1]  # by recency alone
    assert evictions("belady:1", accesses, 2) == [1]
    assert evictions("belady", accesses, 2) == [1]  # neither 1 nor 2 is wanted again; 1 was used before 2


def test_what_is_brought_ahead_counts_as_used():
    layout = Layout((0, 1), 3)
    hint = (((1, 0), 1.0),)
    accesses = [
        Access(0, 0, (0,), (1,), (1.0,)),
        Access(0, 1, (1,), (1,), (1.0,)),
        Access(1, 0, (0,), (1,), (1.0,), hint),
        Access(1, 1, (1, 2), (1, 1), (1.0, 1.0)),  # serves layer 1, so what was brought ahead may go from now on
        Access(2, 0, (2,), (1,), (1.0,)),
    ]
    went = {}
    for capacity in (3, 4):
        simulated = simulate(accesses, make_policy("lru"), capacity, layout, make_prefetcher("gate"))
        went[capacity] = [event.evicted for events in simulated.events for event in events if event.evicted]
    assert went == {3: [(0, 0), (1, 0)], 4: [(0, 0)]}  # (1, 0), brought ahead, is younger than (0, 0)


def test_popularity_counts_accesses():
    assert popularity([*asks(0, (0, 2)), *asks(1, layer=3)]) == {(0, 0): 2, (0, 2): 1, (3, 1): 1}


def test_those_who_may_leave_are_neither_awaited_nor_spared():
    one, two, three, four = ((0, expert) for expert in range(4))
    view = Leaving(dict.fromkeys((one, two, three)), {two: None}, (three,))
    assert list(view) == [one]
    assert len(view) == 1
    assert [key in view for key in (one, two, three, four)] == [True, False, False, False]


def test_counts_that_age_forget_the_former_subject():
    accesses = asks(*[0] * 10, *[1, 2] * 8)  # 0 was popular, and is used no more
    assert simulate(accesses, make_policy("lfu:1000000"), 2, Layout((0,), 3)).tally.hits == 9
    assert simulate(accesses, make_policy("lfu:2"), 2, Layout((0,), 3)).tally.hits > 9 + 10


def test_a_layer_makes_room_only_in_its_own_slots():
    layout = Layout((4, 9), 4)
    accesses = [Access(step, layer, (step,), (1,), (1.0,)) for step in range(3) for layer in (4, 9)]
    accesses += [Access(3, 4, (3,), (1,), (1.0,))]
    simulated = simulate(accesses, make_policy("per_layer"), 3, layout)  # two slots and one
    went = [(event.key, event.evicted) for events in simulated.events for event in events]
    assert went == [
        ((4, 0), None),
        ((9, 0), None),
        ((4, 1), None),
        ((9, 1), (9, 0)),
        ((4, 2), (4, 0)),
        ((9, 2), (9, 1)),
        ((4, 3), (4, 1)),
    ]
    nothing = simulate(accesses, make_policy("per_layer"), 1, layout)  # the second layer has no slot
    assert all(not event.kept for events in nothing.events for event in events if event.key[0] == 9)


def test_who_is_placed_is_as_worked_by_hand():
    layout = Layout((1, 2, 3), 2)  # decoder layer 0 has no experts

    def placed(spec, capacity, popularity=None):
        return sorted(make_policy(spec, popularity).start(layout, capacity))

    assert placed("static", 4) == [(1, 0), (1, 1), (2, 0), (3, 0)]
    assert placed("static", 2, {(3, 1): 9, (2, 0): 5, (1, 0): 1}) == [(2, 0), (3, 1)]
    assert placed("cpu_moe:2", 6) == [(2, 0), (2, 1), (3, 0), (3, 1)]  # decoder layers 0 and 1 are slow
    assert placed("cpu_moe:0", 3) == [(1, 0), (1, 1)]  # one layer fits, and half a layer is none
    assert placed("cpu_moe", 3) == [(3, 0), (3, 1)]
    assert placed("cpu_moe", 1) == []
    assert placed("cpu_moe", 6) == layout.keys()
    assert placed(r"pattern:blk\.(1|3)\.ffn_.*_exps", 6) == [(2, 0), (2, 1)]
    assert placed("pattern:ffn_down_exps", 6) == []  # one of three tensors is enough
    assert placed("pattern:ffn_down_shexp", 6) == layout.keys()


def test_the_next_layer_is_the_nearest_and_the_one_being_served_the_farthest():
    layout = Layout((2, 5, 7, 8), 1)
    moment = Moment(0, Access(0, 7, (0,), (1,), (1.0,)), layout)
    assert [proximity(layer, moment) for layer in (8, 2, 5, 7)] == [1, 0.75, 0.5, 0.25]


def test_the_score_of_hobbit_is_one_sign_where_the_others_weigh_nothing():
    accesses = MADE.switching(Layout((0, 1), 6), 2, 40, seed=3)
    layout = Layout((0, 1), 6)
    events = {
        spec: simulate(accesses, make_policy(spec), 5, layout).events for spec in ("hobbit:1/0/0/0", "hobbit:0/0/0/1")
    }
    last = {}
    for now, happened in enumerate(events["hobbit:1/0/0/0"]):
        for event in happened:
            if event.evicted is not None:
                assert last[event.evicted] == min(last.values())
                del last[event.evicted]
            last[event.key] = now
    for access, happened in zip(accesses, events["hobbit:0/0/0/1"], strict=True):
        gone = [event.evicted for event in happened if event.evicted is not None]
        assert all(key[0] == access.layer for key in gone)  # of two layers, the one being served is the farthest


def test_unimportant_experts_count_nothing_for_high_precision():
    weights = (0.9, 0.1)  # the second one has 0.9 before it
    accesses = [Access(step, 0, (0, 1), (1, 1), weights) for step in range(3)]
    accesses.append(Access(3, 0, (2,), (1,), (1.0,)))
    assert evictions("hobbit:0/0/1/0", accesses, 2) == [1]


def test_the_priority_of_activations_follows_the_nearest_stored_matrix():
    layout = Layout((0, 1), 4)
    alone = [Access(step, layer, (0 if step < 4 else 1,), (1,), (1.0,)) for step in range(8) for layer in (0, 1)]
    back = [Access(8, layer, (0,), (1,), (1.0,)) for layer in (0, 1)]  # the first subject again
    policy = make_policy("eam:4")
    cache = Cache(policy, 4, layout)
    for access in alone:
        cache.access(access)
    moment = Moment(len(alone), back[0], layout)
    policy.begin(moment)
    policy.begin(Moment(len(alone) + 1, back[1], layout))  # at the last layer all rows tell: the first matrix
    assert policy.worth((0, 0), moment) > policy.worth((0, 1), moment)


def test_a_policy_that_starts_with_too_much_is_refused():
    with pytest.raises(ValueError, match="starts with 2 experts in 1 slots"):
        Cache(Belady(initial=[(0, 0), (0, 1)]), 1, Layout((0,), 2), future=Future([]))


def test_bytes_are_those_of_what_is_read():
    assert [
        read_bytes(Event("miss", (0, 0), None, False, how), 10, 3) for how in ("fetch", "in_place", "low", "deferred")
    ] == [
        10,
        0,
        3,
        10,
    ]
    assert read_bytes(Event("prefetch", (0, 0)), 10) == 10
    assert read_bytes(Event("hit", (0, 0)), 10) == read_bytes(Event("covered", (0, 0)), 10) == 0
    simulated = simulate(asks(0, 1, 0, 2), make_policy("lru"), 2, Layout((0,), 3))
    assert simulated.bytes_read(100) == 300


def test_optimality_is_the_closed_share_of_the_gap():
    assert optimality(0.6, 0.5, 0.9) == pytest.approx(0.25)
    assert optimality(0.4, 0.5, 0.9) < 0
    assert optimality(0.9, 0.5, 0.9) == 1
    assert optimality(0.5, 0.5, 0.5) is None


def test_on_a_text_that_switches_subjects_the_order_of_policies_is_the_known_one():
    layout = Layout(tuple(range(4)), 16)
    accesses = MADE.switching(layout, 2, 250, seed=0, stay=0.2)
    rate = {
        spec: simulate(accesses, make_policy(spec), 16, layout).tally.hit_rate
        for spec in ("lru", "lfu", "lfu:1000000", "static", "belady:12", "belady:24", "belady:96", "belady")
    }
    assert rate["lfu:1000000"] < rate["lfu"]  # counts that never age go stale
    assert rate["static"] < rate["lru"] < rate["belady:12"] < rate["belady:24"] < rate["belady:96"] <= rate["belady"]
