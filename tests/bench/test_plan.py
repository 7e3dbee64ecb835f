"""Groups, pieces, shards, pairs and keys."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.bench import config
from moebench.bench.config import EngineConfig
from moebench.bench.plan import Plan, _split, make_plan, plan_hash, plan_lines, shard
from moebench.contracts import Case, Choice, Execution, MoebenchError, Planned, Registry
from moebench.suites.base import covering_pairs, residency_of, sweep
from moebench.suites.cold import cold_copies
from moebench.suites.estimate import model_seconds

REGISTRY = Registry.load()


def planned(*overrides, memory=8e9):
    return make_plan(config.load(overrides, REGISTRY, memory / 0.6, 32e6), REGISTRY, memory)


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def test_a_group_holds_what_may_be_compared():
    plan = planned("suite=selftest", "axes.tokens=[16,32]", "axes.residency=warm", "axes.dtype=[float32,bfloat16]")
    assert len(plan.groups) == 4
    for group in plan.groups:
        assert len({case.group_key for case in group.cases}) == 1
        assert len({(case.tokens, case.dtype) for case in group.cases}) == 1
        assert group.name == group.cases[0].group_key
    keys = [case.case_key for case in plan.cases]
    assert len(set(keys)) == len(keys)


def test_methods_and_backends_share_a_group_and_workloads_do_not(case):
    same = [case(), case(backend=Choice("grouped")), case(routing=Choice("moepp")), case(quantization=Choice("int8"))]
    assert len({c.group_key for c in same}) == 1
    others = [case(tokens=64), case(dtype="bfloat16"), case(threads=2), case(residency="cold"), case(seed=1)]
    others += [case(traffic=Choice("zipf")), case(boundary="sorted"), case(pass_="forward_backward")]
    assert len({c.group_key for c in [*others, case()]}) == len(others) + 1


def test_a_case_asked_for_twice_is_measured_once():
    assert len(planned("suite=selftest", "axes.backend=[eager,eager]", "axes.routing=topk").cases) == 1


sizes = st.lists(st.tuples(st.floats(1, 100), st.booleans()), min_size=1, max_size=12)


def test_cases_that_run_once_share_a_group_however_little_memory_there_is(case):
    once = [Planned(case(protocol="once", routing=Choice("topk", {"k": n})), None, 100.0) for n in (1, 2, 3)]
    (group,) = _split("key", once, 50.0)
    assert len(group.cases) == 3
    timed = [dataclasses.replace(item, case=dataclasses.replace(item.case, protocol="timed")) for item in once]
    assert len(_split("key", timed, 50.0)) > 1


def test_estimates_grow_with_what_is_read():
    shape = REGISTRY.params("model", Choice("smollm2")).shape()
    started = model_seconds(shape, 0)
    assert model_seconds(shape, 2000) - started == pytest.approx(2 * (model_seconds(shape, 1000) - started))
    assert model_seconds(shape, 1000, passes=3) - started == pytest.approx(model_seconds(shape, 3000) - started)
    seconds = [
        planned("suite=lm_eval", "model=smollm2", "model.layers=[]", f"suite.items={n}").seconds for n in (30, 300)
    ]
    assert all(few < many for few, many in zip(*(one.values() for one in seconds), strict=True))


@given(sizes, st.floats(1, 300))
@settings(deadline=None, max_examples=60)
def test_a_split_loses_nothing_and_repeats_only_its_anchor(case, sizes, memory):
    template = case()
    items = [
        Planned(dataclasses.replace(template, routing=Choice("topk", {"k": n})), None if runs else "no", size)
        for n, (size, runs) in enumerate(sizes)
    ]
    groups = _split("key", items, memory)
    runnable = [item.case for item in items if item.refusal is None]
    refused = [item for item in items if item.refusal is not None]
    assert [item for group in groups for item in group.refused] == refused
    if not runnable:
        assert [group.cases for group in groups] == [()]
        return
    assert [group.cases[0] for group in groups] == [runnable[0]] * len(groups)
    assert [runnable[0], *(c for group in groups for c in group.cases[1:])] == runnable
    assert [group.piece for group in groups] == list(range(len(groups)))
    assert len({group.name for group in groups}) == len(groups)
    bytes_of = {item.case.case_key: item.method_bytes for item in items}
    for group in groups:
        assert len(group.cases) <= 2 or sum(bytes_of[c.case_key] for c in group.cases) <= memory


# ---------------------------------------------------------------------------------------------------------------------
# Shards


@pytest.fixture(scope="module")
def many_groups():
    return planned("suite=selftest", "axes.tokens=[1,2,3,4,5,6,7]", "axes.residency=[warm,cold]")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 14])
def test_shards_are_disjoint_and_complete(count, many_groups):
    shards = [shard(many_groups, f"{index}/{count}") for index in range(1, count + 1)]
    names = [group.name for piece in shards for group in piece.groups]
    assert sorted(names) == sorted(group.name for group in many_groups.groups)
    assert max(len(piece.groups) for piece in shards) - min(len(piece.groups) for piece in shards) <= 1


@pytest.mark.parametrize(
    ("text", "words"),
    [("0/2", "from 1 to 2"), ("3/2", "from 1 to 2"), ("a/b", "write it as 1/4"), ("15/15", "the plan has only 14")],
)
def test_a_shard_that_is_none_is_told(text, words, many_groups):
    with pytest.raises(MoebenchError, match=words):
        shard(many_groups, text)


# ---------------------------------------------------------------------------------------------------------------------
# The hash that a resume needs


def test_the_plan_hash_depends_on_all_that_it_covers_and_not_on_free_memory(case):
    plan = Plan(tuple(_split("g", [Planned(case())], 1e9)), EngineConfig(), 0, {})
    first = plan_hash(plan, "sources", {"torch": "1"}, "host")
    assert first == plan_hash(plan, "sources", {"torch": "1"}, "host")
    others = [
        plan_hash(plan, "edited", {"torch": "1"}, "host"),
        plan_hash(plan, "sources", {"torch": "2"}, "host"),
        plan_hash(plan, "sources", {"torch": "1"}, "another"),
        plan_hash(dataclasses.replace(plan, engine=EngineConfig(seconds=1)), "sources", {"torch": "1"}, "host"),
        plan_hash(planned("suite=selftest"), "sources", {"torch": "1"}, "host"),
    ]
    assert len({first, *others}) == 6
    refused = [
        Plan(tuple(_split("g", [Planned(case()), Planned(case(seed=1), reason)], 1e9)), EngineConfig(), 0, {})
        for reason in ("3.1 GiB may be used", "3.2 GiB may be used")
    ]
    assert len({plan_hash(plan, "", {}, "") for plan in refused}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Keys: a change here makes stored results incomparable with new ones, and must be meant


def test_the_keys_of_one_case_are_what_they_were(case):
    one = case(routing=Choice("topk", {"k": 2}), execution=Execution(excludes=("aten.mm.default",)))
    assert one.method_key == "407d03018c535462ba16866afe273947fe0ba8e4158675561fecdfa231dffa3a"
    assert one.group_key == "0b92df8d8c1576a73f4580c882c27fbc8ddda70b6cbe11125b341d341619e3e9"
    assert one.case_key == "04d90a2a06d96448279996e24f398f4616849488872f6ec8c68ed5b30add307c"


def test_a_case_survives_json(case):
    one = case(execution=Execution("packed", excludes=("a", "b")), workload={"x": 1}, environment={"A": "1"})
    assert Case.from_json(one.to_json()) == one
    assert Case.from_json(one.to_json()).case_key == one.case_key


def test_what_identifies_a_method_is_not_how_it_is_run(case):
    one = case()
    assert one.method_key == case(backend=Choice("grouped"), tokens=64, dtype="bfloat16").method_key
    others = [case(seed=1), case(routing=Choice("moepp")), case(weights_sha256="1" * 64), case(layers=(3,))]
    assert len({c.method_key for c in [one, *others]}) == 5
    runs = [case(backend=Choice("grouped")), case(environment={"A": "1"}), case(execution=Execution("packed"))]
    assert len({c.case_key for c in [one, *runs]}) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def pairs(point):
    return set(itertools.combinations(sorted(point.items()), 2))


@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=4),
    st.sets(st.integers(0, 80), max_size=30),
)
@settings(deadline=None, max_examples=60)
def test_every_pair_that_can_run_does_so_in_a_chosen_case(counts, forbidden):
    axes = {f"axis{n}": [f"v{v}" for v in range(count)] for n, count in enumerate(counts)}
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    everything = [
        (point, Planned(case=None, refusal="no" if number in forbidden else None))
        for number, point in enumerate(points)
    ]
    chosen = covering_pairs(everything)
    runnable = set().union(*(pairs(p) for p, item in everything if item.refusal is None), set())
    run = set().union(*(pairs(p) for p, item in chosen if item.refusal is None), set())
    told = set().union(*(pairs(p) for p, _ in chosen), set())
    assert run == runnable
    assert told == set().union(*(pairs(point) for point in points))
    assert all(entry in everything for entry in chosen)
    assert len({tuple(p.values()) for p, _ in chosen}) == len(chosen)


def test_pairs_are_fewer_than_the_product():
    axes = ["axes.routing=[topk,moepp,mixtral]", "axes.quantization=[none,int8]", "axes.tokens=[16,32,64]"]
    everything = planned("suite=selftest", "axes.residency=warm", *axes)
    some = planned("suite=selftest", "axes.residency=warm", *axes, "combine=pairs")
    assert 9 <= len(some.cases) < len(everything.cases) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Small rules


@dataclasses.dataclass(frozen=True)
class Params:
    level: float = 0.5
    sites: tuple[str, ...] = ("hidden",)


def test_a_list_is_swept_only_where_one_value_is_meant():
    assert list(sweep(Params, {"level": [0.1, 0.2], "sites": ["a", "b"]})) == [
        {"level": 0.1, "sites": ["a", "b"]},
        {"level": 0.2, "sites": ["a", "b"]},
    ]
    assert list(sweep(None, {})) == [{}]
    assert list(sweep(Params, {"level": []})) == []


@pytest.mark.parametrize(
    ("residency", "tokens", "pass_", "expected"),
    [
        ("auto", 1, "forward", "cold"),
        ("auto", 16, "forward", "cold"),
        ("auto", 17, "forward", "warm"),
        ("auto", 1, "forward_backward", "warm"),
        ("cold", 4096, "forward", "cold"),
        ("warm", 1, "forward", "warm"),
    ],
)
def test_residency_follows_the_workload(residency, tokens, pass_, expected):
    assert residency_of({"residency": residency, "tokens": tokens, "pass": pass_}) == expected


@given(st.floats(1e6, 1e9), st.floats(1e4, 1e10), st.floats(0.01, 1))
def test_what_the_calls_between_read_passes_the_cache(cache, layer, share):
    copies = cold_copies(cache, layer, share)
    assert copies >= 2
    assert (copies - 1) * layer * share >= 1.2 * cache * (1 - 1e-9)
    assert copies == 2 or (copies - 2) * layer * share < 1.2 * cache * (1 + 1e-9)


def test_the_plan_is_told_line_by_line():
    lines = list(plan_lines(planned("suite=selftest", "axes.backend=[eager,packed]"), REGISTRY))
    assert lines[0].startswith("group 1: selftest v1 | tiny")
    assert sum(line.startswith("skipped: ") for line in lines) == 2
    assert lines[-1].startswith("2 cases in 1 groups, 2 skipped")


def test_a_new_version_of_a_plugin_is_another_method(case):
    first, second = (case(routing=Choice("topk", {"k": 2}, version)) for version in ("1", "2"))
    assert first.method_key != second.method_key
    faster = case(routing=Choice("topk", {"k": 2}), backend=Choice("eager", {}, "2"))
    assert (faster.method_key, faster.case_key != first.case_key) == (first.method_key, True)
