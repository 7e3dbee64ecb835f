"""The store does what the cache decides, event by event, and never shows another expert's bytes."""

from __future__ import annotations

import random
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.offload import names
from moebench.backends.offload.access import Future
from moebench.backends.offload.cache import Cache
from moebench.backends.offload.file import OffloadError
from moebench.backends.offload.policies.lookahead import Belady, Windowed
from moebench.backends.offload.policies.recency import LRU
from moebench.backends.offload.simulate import simulate
from moebench.backends.offload.source import Source
from moebench.backends.offload.store import SlotStore
from moebench.contracts import load_file

lab = load_file(Path(__file__).parent / "slab_lab.py")

TRACES = {"uniform": lab.uniform(12, 1), "zipf": lab.zipf(12, 2), "sticky": lab.sticky(12, 3)}
POLICIES = {"lru": LRU, "belady": Belady, "window": lambda: Windowed(6)}
SIZE = len(lab.LAYERS) * lab.EXPERTS
SLAB = 12288


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lab.Model(tmp_path_factory.mktemp("slabs") / "model.safetensors", low=lab.low)


def open_store(model, policy, capacity, accesses=(), prefetcher=None, execution=None, **settings):
    cache = Cache(policy, capacity, model.file.layout, prefetcher, Future(accesses), execution)
    return SlotStore(model.file, cache, **settings)


def serve_all(model, store, accesses, dwell=lambda: None):
    """Serve accesses, checking every weight before and after the readers had time; return the events yielded."""
    seen = []
    for access in accesses:
        for served in store.serve(access):
            model.check(served)
            dwell()
            seen.append(model.check(served))
    return seen


def quiet(store):
    """Wait until no read is under way, and return the sum of the ledger."""
    readers = store._readers
    lab.until(lambda: not readers._running and all(place[2].state != "queued" for place in readers._queue))
    entries = [store.first, *store.ledger]
    return {name: sum(getattr(entry, name) for entry in entries) for name in vars(store.first)}


@pytest.mark.parametrize("capacity", [0, 1, 6, 13, SIZE])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("trace", TRACES)
def test_store_and_simulator_agree_on_every_event(model, trace, policy, capacity):
    accesses = TRACES[trace]
    agree(model, accesses, POLICIES[policy], capacity, lab.NextLayer)


NAMED = {"cpu_moe": "cpu_moe:2", "pattern": "pattern:blk.[12]", "static": "static"}


@pytest.mark.parametrize("prefetcher", names.PREFETCHERS)
@pytest.mark.parametrize("policy", names.POLICIES)
def test_they_agree_for_every_policy_and_prefetcher_by_name(model, policy, prefetcher):
    popularity = {(layer, expert): 1.0 / (1 + layer + expert) for layer in lab.LAYERS for expert in range(lab.EXPERTS)}
    agree(
        model,
        [replace(one, hints=(((one.layer, 3), 0.5),)) for one in lab.zipf(5, 9)],
        lambda: names.make_policy(NAMED.get(policy, policy), popularity),
        7,
        lambda: names.make_prefetcher(prefetcher),
    )


def agree(model, accesses, policy, capacity, prefetcher):
    """Assert that store and simulator do the same, and that what was read is what the events say."""
    found = simulate(accesses, policy(), capacity, model.file.layout, prefetcher())
    with open_store(model, policy(), capacity, accesses, prefetcher()) as store:
        begun = store.first.reads
        seen = serve_all(model, store, accesses)
        spent = quiet(store)
    assert tuple(map(tuple, store.log)) == found.events
    assert store.cache.tally == found.tally
    assert seen == [event for some in found.events for event in some if event.kind != "prefetch"]
    assert spent["reads"] - begun + spent["cancelled"] == found.tally.misses + found.tally.prefetched
    assert spent["bytes_read"] == spent["reads"] * SLAB
    assert spent["bytes_read"] + (spent["cancelled"] - begun) * SLAB == found.bytes_read(SLAB)
    assert spent["late"] <= found.tally.covered + found.tally.hits


@pytest.mark.parametrize("io", ["direct", "page_cache"])
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("staging", [1, 2, 5])
def test_weights_are_those_that_were_written(model, io, readers, staging):
    settings = {"io": io, "readers": readers, "staging": staging}
    accesses = TRACES["sticky"]
    with open_store(model, LRU(), 9, accesses, lab.NextLayer(), lab.ByTurns(), **settings) as store:
        seen = serve_all(model, store, accesses)
        assert store.resident_bytes() == (9 + staging) * SLAB
    assert {event.how for event in seen if event.kind == "miss"} == {"fetch", "in_place", "low", "deferred"}
    assert {event.kind for event in seen} == {"hit", "covered", "miss"}
    assert lab.reader_threads() == []


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_trace_under_threads_that_dawdle(model, data):
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    make = data.draw(st.sampled_from((lab.uniform, lab.zipf, lab.sticky)))
    accesses = make(4, rng.random())
    capacity, readers, staging = (data.draw(st.integers(*bounds)) for bounds in ((0, SIZE), (1, 4), (1, 3)))
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    both = {"prefetcher": lab.NextLayer() if data.draw(st.booleans()) else None}
    ways = data.draw(st.lists(st.sampled_from(("fetch", "in_place", "low", "deferred")), min_size=1, max_size=4))
    events = simulate(
        accesses, POLICIES[policy](), capacity, model.file.layout, **both, execution=lab.ByTurns(ways)
    ).events
    read = Source.read

    def dawdling(source, slab, target, name):
        time.sleep(rng.random() * 0.002)
        read(source, slab, target, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "read", dawdling)
        both["execution"] = lab.ByTurns(ways)
        with open_store(
            model, POLICIES[policy](), capacity, accesses, **both, readers=readers, staging=staging
        ) as store:
            serve_all(model, store, accesses, lambda: time.sleep(rng.random() * 0.002))
    assert tuple(map(tuple, store.log)) == events


class Fixed(LRU):
    """Begins with some experts."""

    def __init__(self, keys):
        super().__init__()
        self.keys = keys

    def start(self, layout, capacity):
        self._last.update(dict.fromkeys(self.keys, 0))
        return self.keys


def test_what_is_there_from_the_start_is_read_first(model):
    keys = [(0, 1), (5, 4), (2, 0)]
    with open_store(model, Fixed(keys), 3) as store:
        assert (store.first.reads, store.first.bytes_read) == (3, 3 * SLAB)
        (served,) = store.serve(lab.access(5, [4]))
        assert model.check(served).kind == "hit"
        assert store.ledger[0].stall_ns == store.ledger[0].reads == 0


# Order and waiting


class Scripted:
    """Proposes what it is told to, access by access."""

    needs_future = False

    def __init__(self, *proposals):
        self.proposals = list(proposals)

    def propose(self, moment):
        return self.proposals.pop(0) if self.proposals else ()


def test_demand_comes_before_prefetch_and_both_before_the_first_expert(model, monkeypatch):
    gate = lab.Gate(monkeypatch)
    ahead = Scripted([(1, 0), (1, 1)])
    with open_store(model, LRU(), 8, prefetcher=ahead, staging=2) as store:
        gate.open.set()
        served = store.serve(lab.access(0, [2, 3]))
        next(served)
        quiet(store)  # nothing was asked of the generator since
        assert gate.begun == [f"expert {expert} of layer {layer}" for layer, expert in ((0, 2), (0, 3), (1, 0), (1, 1))]
        list(served)


def test_a_late_prefetch_is_hurried_waited_for_and_counted(model, monkeypatch):
    ahead = Scripted([(1, 0), (1, 1), (1, 2)])
    with open_store(model, LRU(), 8, prefetcher=ahead) as store:
        list(store.serve(lab.access(0, [])))
        quiet(store)
        assert store.ledger[0].reads == 3
        gate = lab.Gate(monkeypatch)
        ahead.proposals = [[(2, 0), (2, 1), (2, 2)]]
        list(store.serve(lab.access(1, [0, 1])))
        lab.until(lambda: gate.begun)
        wanted = store._held[2, 2].ticket

        def open_gate():
            lab.until(lambda: wanted.urgent)
            gate.open.set()

        opener = lab.threading.Thread(target=open_gate)
        opener.start()
        (served,) = store.serve(lab.access(2, [2]))
        opener.join()
        assert model.check(served).kind == "covered"
        assert gate.begun[:2] == ["expert 0 of layer 2", "expert 2 of layer 2"]  # the second one was begun before 1
        assert store.ledger[1].late == 0
        assert store.ledger[2].late == 1
        assert store.ledger[2].stall_ns > 0
        assert store.ledger[2].reads == 0


def test_a_prefetch_that_was_dropped_before_it_began_is_never_read(model, monkeypatch):
    gate = lab.Gate(monkeypatch)
    ahead = Scripted([(1, 0), (1, 1)], [], [(2, 0), (2, 1)])
    with open_store(model, LRU(), 4, prefetcher=ahead) as store:
        for layer in (0, 1, 1):  # layer 1 is served without its two, which may go then
            list(store.serve(lab.access(layer, [])))
            lab.until(lambda: gate.begun)
        assert [event.evicted for event in store.log[2]] == [None, None]
        ahead.proposals = [[(5, 0), (5, 1)]]
        list(store.serve(lab.access(2, [])))
        assert [event.evicted for event in store.log[3]] == [(1, 0), (1, 1)]
        assert [entry.cancelled for entry in store.ledger] == [1, 0, 0, 0]
        gate.open.set()
        quiet(store)
        assert "expert 1 of layer 1" not in gate.begun
        assert [entry.reads for entry in store.ledger] == [1, 0, 2, 2]
        assert {model.check(served).kind for served in store.serve(lab.access(5, [0, 1]))} == {"covered"}


def test_a_slot_is_not_given_away_while_a_read_into_it_goes_on(model, monkeypatch):
    go_on, read = lab.threading.Event(), Source.read

    def held(source, slab, target, name):
        if name == "expert 0 of layer 1":
            assert go_on.wait(20)
        read(source, slab, target, name)

    monkeypatch.setattr(Source, "read", held)
    with open_store(model, LRU(), 2, prefetcher=Scripted([(1, 0)]), staging=1, readers=2) as store:
        for layer, experts in ((0, []), (1, []), (2, [0, 1])):  # it is brought ahead, not used, and dropped
            serve_all(model, store, [lab.access(layer, experts)])
        assert store.log[2][1].evicted == (1, 0)
        serving = store.serve(lab.access(5, [0]))
        served = next(serving)
        model.check(served)
        go_on.set()
        quiet(store)
        model.check(served)
        serving.close()
        serve_all(model, store, lab.uniform(3, 0))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_access_that_is_left_early_harms_nothing(model, taken):
    accesses = lab.uniform(6, 4, k=4)
    events = simulate(accesses, LRU(), 5, model.file.layout, lab.NextLayer()).events
    with open_store(model, LRU(), 5, accesses, lab.NextLayer(), staging=1) as store:
        for place, access in enumerate(accesses):
            serving = store.serve(access)
            for count, served in enumerate(serving):
                model.check(served)
                if place % 2 and count == taken:
                    break
            serving.close()
    assert tuple(map(tuple, store.log)) == events


# Refusals


def test_settings_that_make_no_sense_are_refused(model, tmp_path):
    other = lab.Model(tmp_path / "m", (0, 1))
    with pytest.raises(OffloadError, match="another model"):
        SlotStore(other.file, Cache(LRU(), 1, model.file.layout))
    used = Cache(LRU(), 1, model.file.layout)
    used.access(lab.access(0, [1]))
    with pytest.raises(OffloadError, match="in use already"):
        SlotStore(model.file, used)
    for setting, said in (
        ({"staging": 0}, "at least one"),
        ({"readers": 0}, "at least one"),
        ({"io": "mmap"}, "direct, page_cache"),
        ({"device": "xpu"}, "no slots on device xpu"),
    ):
        with pytest.raises(OffloadError, match=said):
            open_store(model, LRU(), 1, **setting)
    assert lab.reader_threads() == []


def test_accesses_take_turns_and_end_with_the_store(model):
    with open_store(model, LRU(), 2) as store:
        serving = store.serve(lab.access(0, [1, 2]))
        next(serving)
        with pytest.raises(OffloadError, match="take turns"):
            next(store.serve(lab.access(1, [1])))
        serving.close()
        with pytest.raises(OffloadError, match="no expert 6 of layer 0"):
            next(store.serve(lab.access(0, [6])))
        assert [model.check(served).kind for served in store.serve(lab.access(0, [1, 2]))] == ["hit", "hit"]
        store.cache.access(lab.access(0, [3]))
        with pytest.raises(OffloadError, match="used elsewhere"):
            next(store.serve(lab.access(0, [3])))
    with pytest.raises(OffloadError, match="closed"):
        next(store.serve(lab.access(0, [1])))


def test_a_closed_store_lets_go_of_its_slots_but_not_of_what_it_yielded(model):
    stores = [open_store(model, LRU(), 4) for _ in range(2)]
    serving, cut_short = (store.serve(lab.access(0, [1, 2])) for store in stores)
    served, slots = next(serving), weakref.ref(stores[0].memory._view.obj)
    next(cut_short)
    for store in stores:
        store.close()
        assert store.resident_bytes() == 0
    with pytest.raises(OffloadError, match="closed"):
        next(cut_short)
    model.check(served)
    serving.close()
    assert slots() is not None  # a view of it is out
    del served
    assert slots() is None


def test_a_form_that_the_file_lacks_ends_the_store(tmp_path):
    plain = lab.Model(tmp_path / "m")
    with open_store(plain, LRU(), 2, execution=lab.ByTurns(["low", "fetch"])) as store:
        for _ in range(2):  # the second time nothing in few bits is asked for
            with pytest.raises(OffloadError, match="no form low"):
                next(store.serve(lab.access(0, [1])))
