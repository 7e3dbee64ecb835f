"""The models of a run: two tiers against bounds and cases worked by hand, Che against simulation, MoE-Lens' limits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.offload.access import Access, Layout
from moebench.backends.offload.che import inclusion, lru_hit_rate
from moebench.backends.offload.costs import Curve
from moebench.backends.offload.execution import Deferral, LowBits
from moebench.backends.offload.lens import Load, Streaming, execution_per_memory, stage_one, stage_two
from moebench.backends.offload.names import make_policy, make_prefetcher
from moebench.backends.offload.simulate import simulate
from moebench.backends.offload.timeline import TierCosts, per_step, predict, two_tier
from moebench.contracts import load_file

MADE = load_file(Path(__file__).parent / "made_accesses.py")
COSTS = TierCosts(other=1.0, fast=Curve.line(0, 0.5), load=Curve.line(0, 1 / 32), slab_bytes=96, low_bytes=40)
PREFETCH = st.sampled_from(["none", "gate", "frequency", "eam", "pregate", "oracle:3"])


def serial(accesses, simulated, costs):
    """Return the seconds without any overlap, prefetches included."""
    seconds = 0.0
    for access, events in zip(accesses, simulated.events, strict=True):
        tokens = dict(zip(access.keys, access.tokens, strict=True))
        seconds += costs.other + sum(costs.read(event) for event in events)
        seconds += sum(costs.compute(event, tokens[event.key]) for event in events if event.kind != "prefetch")
    return seconds


def total(times):
    return sum(one.seconds for one in times)


@given(
    case=MADE.traces(),
    spec=st.sampled_from(["lru", "static"]),
    share=st.sampled_from((0, 0.3, 0.6)),
    count=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_deferring_waits_no_longer_than_what_is_read(case, spec, share, count):
    accesses, layout = case
    run = simulate(accesses, make_policy(spec), int(share * layout.size), layout, execution=Deferral(count))
    for staging in (1, 3):
        costs = replace(COSTS, staging=staging)
        times = predict(accesses, run, costs)
        assert total(times) <= serial(accesses, run, costs) + 1e-9
        if count == 0:
            plain = simulate(accesses, make_policy(spec), int(share * layout.size), layout)
            assert times == predict(accesses, plain, costs)


@given(
    case=MADE.traces(),
    spec=st.sampled_from(["lru", "lfu", "static", "belady"]),
    ahead=PREFETCH,
    share=st.sampled_from((0, 0.3, 0.6, 1)),
    readers=st.integers(1, 3),
    staging=st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_a_run_lies_between_perfect_overlap_and_none(case, spec, ahead, share, readers, staging):
    accesses, layout = case
    simulated = simulate(accesses, make_policy(spec), int(share * layout.size), layout, make_prefetcher(ahead))
    costs = replace(COSTS, readers=readers, staging=staging)
    times = predict(accesses, simulated, costs)
    assert total(times) <= serial(accesses, simulated, costs) + 1e-9
    free = replace(costs, load=Curve.line(0, 0))
    computing = total(predict(accesses, simulated, free))
    assert total(times) == pytest.approx(computing + sum(one.stall for one in times))
    if ahead == "none":
        closed = two_tier(accesses, simulated, costs)
        for one, bound in zip(per_step(times), closed, strict=True):
            assert (one.step, one.late) == (bound.step, 0)
            assert one.seconds >= bound.seconds - 1e-9


def lone(step, *experts, layer=0):
    return Access(step, layer, experts, (1,) * len(experts), (1.0,) * len(experts))


def test_reads_hide_behind_computing_as_worked_by_hand():
    accesses = [lone(0, 0, 1), lone(1, 0, 2)]
    simulated = simulate(accesses, make_policy("lru"), 2, Layout((0,), 3))
    first, second = predict(accesses, simulated, COSTS)  # a read takes 3, an expert 0.5, the rest of a layer 1
    assert (first.seconds, first.stall) == (1 + 3 + 3 + 0.5, 3 + 2.5)  # the first read hides nothing, the second 0.5
    assert (second.seconds, second.stall) == (1 + 3 + 0.5, 2.5)  # computing the hit hides 0.5
    two = predict(accesses, simulated, replace(COSTS, readers=2))
    assert two[0].seconds == 1 + 3 + 0.5 + 0.5
    assert [one.seconds for one in two_tier(accesses, simulated, COSTS)] == [1 + 6, 1 + 3]


def test_reads_ahead_come_late_or_in_time_as_worked_by_hand():
    layout = Layout((0, 1), 2)
    accesses = [lone(0, 0), lone(0, 1, layer=1), lone(1, 0), lone(1, 1, layer=1)]
    simulated = simulate(accesses, make_policy("lru"), 4, layout, make_prefetcher("oracle"))
    first, second, *others = predict(accesses, simulated, COSTS)
    assert first.seconds == 1 + 3 + 0.5
    assert (second.seconds, second.stall, second.late) == (1 + (3 - 0.5 - 1) + 0.5, 1.5, 1)  # read from 4 to 7
    assert all((one.stall, one.late) == (0, 0) for one in others)
    slow = replace(COSTS, other=2.6)
    assert predict(accesses, simulated, slow)[1].late == 0  # 2.6 hides what 0.5 of computing leaves


def test_demand_goes_before_what_waits_to_be_read_ahead():
    hints = (((1, 0), 1.0), ((1, 1), 0.5))
    accesses = [Access(0, 0, (0,), (1,), (1.0,), hints), lone(0, 2, layer=1), lone(1, 1, layer=0), lone(1, 1, layer=1)]
    simulated = simulate(accesses, make_policy("lru"), 8, Layout((0, 1), 4), make_prefetcher("gate"))
    times = predict(accesses, simulated, COSTS)
    assert times[0].seconds == 1 + 3 + 0.5  # then (1, 0) is read from 4 to 7, and (1, 1) waits
    assert times[1].stall == 7 + 3 - 5.5  # (1, 2), asked for at 5.5, is read from 7 to 10
    assert times[2].stall == 13 + 3 - 11.5  # (1, 1) is read from 10 to 13, before (0, 1) is asked for at 11.5
    assert (times[3].stall, times[3].late) == (0, 0)
    soon = [accesses[0], lone(0, 0, 1, layer=1)]  # both that are brought ahead: (1, 1) is read as soon as it can be
    again = predict(soon, simulate(soon, make_policy("lru"), 8, Layout((0, 1), 4), make_prefetcher("gate")), COSTS)
    assert (again[1].seconds, again[1].late) == (10 + 0.5 - 4.5, 2)


def test_what_goes_while_it_is_read_gives_its_buffer_back_when_it_has_come():
    nothing = Access(0, 0, (), (), (), (((0, 1), 1.0),))  # asks for nobody, and has (0, 1) read from 0.25 to 3.25
    accesses = [nothing, replace(nothing, step=1, hints=()), lone(2, 2, 3, 4)]
    simulated = simulate(accesses, make_policy("lru"), 2, Layout((0,), 5), make_prefetcher("gate"))
    assert [event.evicted for event in simulated.events[2]] == [None, (0, 1), (0, 2)]
    last = predict(accesses, simulated, replace(COSTS, other=0.25, staging=1, readers=4))[2]
    assert last.seconds == 3.25 + 3 + 0.5 - 0.5  # from 0.5: 2 and 3 are read at once, 4 once (0, 1) has come


def test_a_read_waits_for_a_buffer():
    accesses = [lone(0, 0, 1, 2)]
    nothing = simulate(accesses, make_policy("lru"), 0, Layout((0,), 3))  # every expert passes through staging
    slow = replace(COSTS, fast=Curve.line(0, 10.0), readers=3)
    ample = predict(accesses, nothing, replace(slow, staging=3))
    assert ample[0].seconds == 1 + 3 + 30
    assert predict(accesses, nothing, replace(slow, staging=1))[0].seconds == 1 + 3 * (3 + 10)


def test_what_is_deferred_is_waited_for_at_the_next_layer_as_worked_by_hand():
    accesses = [lone(0, 0, 1), lone(0, 0, layer=1)]
    layout = Layout((0, 1), 2)
    at_once = predict(accesses, simulate(accesses, make_policy("static"), 0, layout), COSTS)
    assert [one.seconds for one in at_once] == [1 + 6 + 0.5, 1 + 3 + 0.5]
    later = simulate(accesses, make_policy("static"), 0, layout, execution=Deferral(1))
    assert [event.how for event in later.events[0]] == ["fetch", "deferred"]
    first, second = predict(accesses, later, COSTS)
    assert (first.seconds, first.stall) == (1 + 3 + 0.5, 3)  # the second read goes on
    assert second.stall == pytest.approx(2.5 - 1 + 3)  # 1 of its 2.5 hides behind the rest of layer 1
    assert second.seconds == pytest.approx(1 + 1.5 + 0.5 + 3 + 0.5)


def test_copies_of_few_bits_cost_their_bytes_and_unknown_costs_are_refused():
    accesses = [Access(0, 0, (0, 1), (1, 1), (0.9, 0.1))]
    simulated = simulate(accesses, make_policy("lru"), 2, Layout((0,), 2), execution=LowBits(0.5))
    with pytest.raises(ValueError, match="computed 'low', of which no costs"):
        predict(accesses, simulated, COSTS)
    costs = replace(COSTS, low=Curve.line(0, 0.25))
    assert predict(accesses, simulated, costs)[0].seconds == pytest.approx(1 + 3 + 1.25 + 0.25)
    with pytest.raises(ValueError, match="must be at least 1"):
        replace(COSTS, readers=0)


@pytest.mark.parametrize(("layers", "experts", "k"), [(4, 16, 2), (8, 8, 2), (6, 8, 1), (6, 32, 4)])
@pytest.mark.parametrize("alpha", [0.0, 1.2])
def test_the_hit_rate_of_lru_follows_from_popularity(layers, experts, k, alpha):
    layout = Layout(tuple(range(layers)), experts)
    accesses = MADE.independent(layout, k, alpha, 240, seed=7)
    p_LE = inclusion(accesses, layout)
    assert p_LE.sum(axis=1) == pytest.approx(k)
    for share in (0.1, 0.25, 0.5, 0.75):
        capacity = round(share * layout.size)
        events = simulate(accesses, make_policy("lru"), capacity, layout).events
        later = [event for happened in events[len(events) // 3 :] for event in happened]
        found = sum(event.kind == "hit" for event in later) / len(later)
        assert lru_hit_rate(p_LE, capacity) == pytest.approx(found, abs=0.045)


def test_an_lru_that_cannot_hold_a_step_has_no_hits_and_one_that_holds_all_has_all():
    p_LE = np.full((8, 16), 2 / 16)
    assert lru_hit_rate(p_LE, 15) < 1e-3
    assert lru_hit_rate(p_LE, 16) == pytest.approx(2 / 16, abs=1e-3)  # those of the step before
    assert lru_hit_rate(p_LE, 128) == 1
    assert lru_hit_rate(p_LE, 0) == lru_hit_rate(np.zeros((2, 2)), 1) == 0
    rates = [lru_hit_rate(p_LE, capacity) for capacity in range(0, 129, 8)]
    assert rates == sorted(rates)


MACHINE = Streaming(weight_bytes=1e9, bandwidth=1e9, flops=1e12, flops_per_token=1e10, kv_bytes=5e6, kv_per_token=1e3)


def test_a_token_in_memory_is_worth_what_the_limits_say():
    assert execution_per_memory(Load(0, 50)) == pytest.approx(2 / 50)
    assert execution_per_memory(Load(10**9, 50)) == pytest.approx(1 / 50, rel=1e-6)
    with pytest.raises(ValueError, match="generated=0 at least 1"):
        Load(3, 0)


def test_the_bound_grows_with_memory_until_the_device_is_busy():
    load = Load(32, 32)
    stages = [stage_one(replace(MACHINE, kv_bytes=memory), load) for memory in np.geomspace(1e4, 1e9, 12)]
    used = [stage.utilisation for stage in stages]
    assert used == sorted(used)
    assert used[-1] == 1
    assert stages[-1].throughput == stages[-2].throughput == pytest.approx(100 * 32 / 64)  # n_sat tokens in delta = 1 s
    assert stages[0].throughput == pytest.approx(
        execution_per_memory(load) * 10 / 2
    )  # 10 tokens in memory, half of them


@given(
    load=st.builds(Load, st.integers(0, 60), st.integers(1, 40)),
    requests=st.integers(0, 120),
    memory=st.floats(2e5, 2e7),
    page=st.sampled_from((1, 16)),
    bandwidth=st.sampled_from((math.inf, 1e6)),
)
@settings(max_examples=100, deadline=None)
def test_a_replay_processes_every_token_and_is_never_faster_than_the_bound(load, requests, memory, page, bandwidth):
    machine = replace(MACHINE, kv_bytes=memory, kv_bandwidth=bandwidth)
    replayed = stage_two(machine, load, requests, page)
    assert sum(replayed.tokens) == requests * (load.prompt + load.generated)
    assert replayed.throughput <= stage_one(machine, load).throughput * (1 + 1e-9)
    assert all(seconds >= machine.delta for seconds in replayed.seconds)
    read = requests * load.generated * (load.prompt + (load.generated - 1) / 2) * machine.kv_per_token
    assert sum(replayed.seconds) >= read / bandwidth - 1e-6
    assert sum(replayed.seconds) >= sum(replayed.tokens) * machine.flops_per_token / machine.flops - 1e-6


def test_more_requests_bring_a_replay_nearer_to_the_bound():
    load = Load(32, 32)
    reached = [stage_two(MACHINE, load, requests).throughput for requests in (20, 100, 500, 2000)]
    assert reached == sorted(reached)
    assert 0.8 < reached[-1] / stage_one(MACHINE, load).throughput <= 1
    with pytest.raises(ValueError, match="must hold one request of 64 tokens"):
        stage_two(replace(MACHINE, kv_bytes=1e4), load, 1)
