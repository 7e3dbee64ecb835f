"""Traces as accesses: exact sums and hints, round trips through files, and made-up traces with known statistics."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.suites.trace import TraceError, facts_of, load_trace, save_trace, trace_of
from moebench.suites.traces.accesses import accesses_of, layout_of
from moebench.suites.traces.files import check_target, hints_file, read_trace, write_trace
from moebench.suites.traces.synthetic import KINDS, DomainTrace, StickyTrace, ZipfTrace

# --- accesses --------------------------------------------------------------------------------------------------------

ROWS = st.lists(
    st.tuples(
        st.integers(0, 3), st.sampled_from([1, 4, 6]), st.integers(0, 3), st.integers(0, 5), st.floats(-4, 4, width=32)
    ),
    min_size=1,
    max_size=60,
    unique_by=lambda row: row[:4],
)


def columns(rows):
    return {name: [row[i] for row in rows] for i, name in enumerate(("step", "layer", "token", "expert", "weight"))}


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_accesses_are_what_the_rows_say(rows):
    expected = {}
    steps = sorted({row[0] for row in rows})
    for step, layer, _, expert, weight in sorted(rows, key=lambda row: row[:3]):
        of_place = expected.setdefault((steps.index(step), layer), {})
        count, total = of_place.get(expert, (0, 0.0))
        of_place[expert] = (count + 1, total + weight)
    found = accesses_of(trace_of(columns(rows)))
    assert [(access.step, access.layer) for access in found] == sorted(expected)
    for access in found:
        of_place = expected[access.step, access.layer]
        assert access.experts == tuple(sorted(of_place))
        assert access.tokens == tuple(of_place[expert][0] for expert in access.experts)
        assert access.weights == tuple(of_place[expert][1] for expert in access.experts)


@settings(max_examples=20, deadline=None)
@given(rows=ROWS, suffix=st.sampled_from([".parquet", ".jsonl"]))
def test_a_file_gives_the_accesses_that_went_into_it(tmp_path_factory, rows, suffix):
    path = str(tmp_path_factory.mktemp("trace") / f"a{suffix}")
    sha256 = save_trace(path, columns(rows))
    assert read_trace(path, sha256).accesses() == accesses_of(trace_of(columns(rows)))


def test_only_the_layers_that_are_asked_for():
    trace = KINDS["zipf"](steps=3, layers=4, experts=8, k=2).trace()
    some = accesses_of(trace, layers=[3, 1])
    assert some == [access for access in accesses_of(trace) if access.layer in (1, 3)]
    assert accesses_of(trace, layers=[]) == []
    with pytest.raises(TraceError, match="nothing of layer 9; choose among its layers 0, 1, 2, 3"):
        accesses_of(trace, layers=[1, 9])


def test_a_layout_has_the_experts_that_were_told_or_seen():
    trace = trace_of(columns([(0, 2, 0, 5, 1.0), (0, 7, 0, 1, 1.0)]))
    assert layout_of(trace).layers == (2, 7)
    assert layout_of(trace).experts == 6
    assert layout_of(trace, 64).size == 128
    with pytest.raises(TraceError, match="asks for expert 5 where a layer has 5"):
        layout_of(trace, 5)


# --- hints -----------------------------------------------------------------------------------------------------------

TRACE = [(s, layer, 0, expert, 0.5) for s in (0, 1) for layer in (1, 4, 6) for expert in (2, 3)]
HINTS = [(0, 4, 0, 1, 0.25), (0, 4, 1, 1, 0.5), (0, 4, 0, 3, 0.125), (0, 4, 0, 0, 0.125), (1, 6, 0, 5, 1.0)]


def test_hints_go_to_the_layer_before_the_surest_first():
    found = {(a.step, a.layer): a.hints for a in accesses_of(trace_of(columns(TRACE)), hints=trace_of(columns(HINTS)))}
    assert found.pop((0, 1)) == (((4, 1), 0.75), ((4, 0), 0.125), ((4, 3), 0.125))
    assert found.pop((1, 4)) == (((6, 5), 1.0),)
    assert set(found.values()) == {()}


def test_hints_of_layers_that_are_left_out_are_left_out():
    trace, hints = trace_of(columns(TRACE)), trace_of(columns(HINTS))
    carried = {a.layer: a.hints for a in accesses_of(trace, [1, 6], hints)}
    assert carried == {1: (), 6: ()}  # layer 4 carried those of layer 6: layer 1 knew nothing of it
    assert any(a.hints for a in accesses_of(trace, [4, 6], hints))


def test_hints_lie_beside_the_trace(tmp_path):
    path = str(tmp_path / "a.parquet")
    save_trace(path, columns(TRACE))
    assert read_trace(path).hints is None
    assert hints_file(path) == tmp_path / "a.hints.parquet"
    sha256 = save_trace(str(hints_file(path)), columns(HINTS))
    assert read_trace(path).accesses() == accesses_of(trace_of(columns(TRACE)), hints=trace_of(columns(HINTS)))
    save_trace(path, columns(TRACE), {"hints_sha256": sha256})
    assert read_trace(path).hints is not None


def test_hints_of_another_trace_are_refused(tmp_path):
    trace = trace_of(columns(TRACE))
    with pytest.raises(TraceError, match="speak of layer 1"):
        accesses_of(trace, hints=trace_of(columns([(0, 1, 0, 0, 1.0), (1, 4, 0, 0, 1.0)])))
    with pytest.raises(TraceError, match="have 1 steps where it has 2"):
        accesses_of(trace, hints=trace_of(columns(HINTS[:3])))
    path = str(tmp_path / "a.parquet")
    save_trace(path, columns(TRACE), {"hints_sha256": "0" * 64})
    with pytest.raises(TraceError, match=r"a\.hints\.parquet' cannot be read"):
        read_trace(path)
    save_trace(str(hints_file(path)), columns(HINTS))
    with pytest.raises(TraceError, match="has sha256"):
        read_trace(path)


def test_facts_are_kept_and_change_no_row(tmp_path):
    path = str(tmp_path / "a.parquet")
    save_trace(path, columns(TRACE), {"experts": 64, "tasks": [1, 0]})
    assert facts_of(path) == {"experts": 64, "tasks": [1, 0]}
    assert read_trace(path).layout.experts == 64
    assert save_trace(path, columns(TRACE)) == save_trace(path, columns(TRACE), {})
    assert facts_of(path) == {}
    assert accesses_of(load_trace(path, save_trace(path, columns(TRACE)))) == accesses_of(trace_of(columns(TRACE)))


@pytest.mark.parametrize("facts", ["[1]", '{"experts": "many"}', "{"])
def test_broken_facts_are_told(tmp_path, facts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table(columns(TRACE)).replace_schema_metadata({"moebench": facts}), path)
    with pytest.raises(TraceError, match="says of itself"):
        facts_of(path)


def test_a_trace_is_written_with_its_hints_or_without(tmp_path):
    path = str(tmp_path / "a.parquet")
    sha256 = write_trace(path, columns(TRACE), {"experts": 8}, columns(HINTS))
    found = read_trace(path, sha256)
    assert (found.layout.experts, found.hints is None) == (8, False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.hints.parquet", "a.parquet"]
    write_trace(path, columns(TRACE), {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]  # hints of another trace do not stay


def test_targets_that_will_not_do_are_told(tmp_path):
    path = tmp_path / "a.parquet"
    check_target(str(path), force=False)
    for wrong, told in ((tmp_path / "a.csv", "end it in .parquet"), (tmp_path / "no" / "a.parquet", "is no folder")):
        with pytest.raises(TraceError, match=told):
            check_target(str(wrong), force=False)
    hints_file(path).touch()
    with pytest.raises(TraceError, match=r"a.hints.parquet is there already; name another file, or .* --force"):
        check_target(str(path), force=False)
    check_target(str(path), force=True)
    path.mkdir()
    with pytest.raises(TraceError, match="cannot be written"):
        write_trace(str(path), columns(TRACE), {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.parquet"]


# --- made-up traces --------------------------------------------------------------------------------------------------

SMALL = {"steps": 6, "layers": 3, "experts": 8, "k": 2, "tokens": 2}


def sets_of(trace):
    """The set of experts by (step, layer, token)."""
    found = {}
    for (step, layer), entries in trace.by_place.items():
        for token, expert in zip(entries.token_N.tolist(), entries.expert_N.tolist(), strict=True):
            found.setdefault((step, layer, token), set()).add(expert)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_traces_are_those_of_a_router(kind):
    params = KINDS[kind](**SMALL)
    trace = params.trace()
    assert trace.steps == 6
    assert trace.layers == (0, 1, 2)
    assert len(trace.by_place) == 18
    for entries in trace.by_place.values():
        assert entries.tokens == 2
        assert Counter(entries.token_N.tolist()) == {0: 2, 1: 2}
        weight_TK = entries.weight_N.reshape(2, 2)
        assert (weight_TK[:, 0] >= weight_TK[:, 1]).all()
        np.testing.assert_allclose(weight_TK.sum(1), 1, rtol=1e-12)
    assert accesses_of(trace) == accesses_of(KINDS[kind](**SMALL).trace())
    assert accesses_of(trace) != accesses_of(KINDS[kind](**SMALL, seed=1).trace())
    assert facts_json(params)["experts"] == 8


def facts_json(params):
    return json.loads(json.dumps(params.facts()))


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_alpha_0_is_uniform():
    trace = ZipfTrace(steps=2000, layers=1, experts=16, k=1, alpha=0.0).trace()
    counts = np.bincount(np.concatenate([e.expert_N for e in trace.by_place.values()]), minlength=16)
    assert chi_square(counts, 2000 / 16) < 37.7  # 99.9 % of chi-square with 15 degrees of freedom


def test_the_first_expert_follows_the_law():
    params = ZipfTrace(steps=3000, layers=1, experts=8, k=3, alpha=1.0)
    columns = params.columns()
    first = np.bincount(columns["expert"].reshape(-1, 3)[:, 0], minlength=8)
    p = 1 / np.arange(1, 9)
    expected = 3000 * p / p.sum()
    order = params._shuffled("ranks")[0]
    assert chi_square(first[order], expected) < 24.3  # 99.9 %, 7 degrees of freedom
    assert chi_square(first[np.roll(order, 1)], expected) > 100


def test_layers_have_orders_of_their_own():
    columns = ZipfTrace(steps=400, layers=6, experts=16, k=1, alpha=3.0).columns()
    favourites = {int(np.bincount(columns["expert"][columns["layer"] == layer]).argmax()) for layer in range(6)}
    assert len(favourites) > 1


def test_who_stays_stays_whole():
    trace = StickyTrace(**SMALL, stay=1.0).trace()
    for (_, layer), entries in trace.by_place.items():
        first = trace.at(0, layer)
        np.testing.assert_array_equal(entries.expert_N, first.expert_N)
        np.testing.assert_array_equal(entries.weight_N, first.weight_N)


def test_who_goes_goes_whole():
    sets = sets_of(StickyTrace(**SMALL, stay=0.0).trace())
    assert all(
        sets[place].isdisjoint(sets[step + 1, *rest])
        for place in sets
        if (step := place[0]) < 5
        for rest in [place[1:]]
    )


def test_the_number_kept_is_binomial():
    steps, k, stay = 1500, 4, 0.7
    sets = sets_of(StickyTrace(steps=steps, layers=1, experts=32, k=k, stay=stay).trace())
    kept = np.bincount([len(sets[s, 0, 0] & sets[s + 1, 0, 0]) for s in range(steps - 1)], minlength=k + 1)
    law = np.array([math.comb(k, n) * stay**n * (1 - stay) ** (k - n) for n in range(k + 1)])
    assert chi_square(kept, (steps - 1) * law) < 18.5  # 99.9 %, 4 degrees of freedom


def test_sequences_are_sticky_each_for_itself():
    sets = sets_of(StickyTrace(steps=2, layers=1, experts=32, k=2, tokens=8, stay=1.0).trace())
    assert all(sets[0, 0, t] == sets[1, 0, t] for t in range(8))
    assert len({frozenset(sets[0, 0, t]) for t in range(8)}) > 1


def test_disjoint_domains_share_no_expert():
    params = DomainTrace(steps=60, layers=2, experts=12, k=3, domains=4, period=5, share=1.0)
    used, tasks = {}, params.tasks()
    for (step, layer, _), experts in sets_of(params.trace()).items():
        used.setdefault((tasks[step], layer), set()).update(experts)
    assert len({task for task, _ in used}) > 1
    for (task, layer), experts in used.items():
        assert experts <= set(params.popular_DLM()[task, layer].tolist())
        assert all(experts.isdisjoint(other) for key, other in used.items() if key[1] == layer and key[0] != task)


def test_domains_may_share_experts():
    popular = DomainTrace(layers=1, experts=8, k=2, domains=8, popular=4, disjoint=False).popular_DLM()
    assert popular.shape == (8, 1, 4)
    assert len(set(popular.ravel().tolist())) < popular.size


def test_popular_experts_have_their_share():
    params = DomainTrace(steps=3000, layers=1, experts=16, k=1, domains=2, period=7, share=0.75, popular=4)
    popular, tasks = params.popular_DLM(), params.tasks()
    hits = [expert in popular[tasks[step], 0] for step, expert in enumerate(params.columns()["expert"])]
    assert abs(np.mean(hits) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 3000)


def test_domains_change_when_they_may():
    tasks = DomainTrace(steps=400, domains=3, period=10).tasks()
    assert all(tasks[s] == tasks[s - 1] for s in range(1, 400) if s % 10)
    assert all(tasks[s] != tasks[s - 1] for s in range(10, 400, 10))
    assert set(DomainTrace(steps=400, domains=3, period=10, switch=0.0).tasks()) == {tasks[0]}
    half = DomainTrace(steps=4000, domains=3, period=10, switch=0.5).tasks()
    changes = np.mean([half[s] != half[s - 1] for s in range(10, 4000, 10)])
    assert abs(changes - 0.5) < 4 * math.sqrt(0.25 / 399)
    assert set(DomainTrace(steps=40, domains=1, period=10).tasks()) == {0}


@pytest.mark.parametrize(
    ("kind", "wrong", "told"),
    [
        ("zipf", {"k": 65}, "k lie between 1 and experts"),
        ("zipf", {"steps": 10**9}, "would have 128000000000 rows"),
        ("zipf", {"alpha": -1.0}, "alpha=-1.0 must not be negative"),
        ("sticky", {"stay": 1.5}, r"stay=1.5 must lie in \[0, 1\]"),
        ("sticky", {"k": 40}, "at least twice k=40"),
        ("domains", {"domains": 0}, "at least 1"),
        ("domains", {"domains": 100}, "popular=0 must lie between 1"),
        ("domains", {"popular": 32}, "need 128 of 64"),
        ("domains", {"popular": 4, "share": 1.0}, "of the 4 popular experts"),
        ("domains", {"switch": 2.0}, "switch=2.0"),
    ],
)
def test_impossible_sizes_are_told(kind, wrong, told):
    with pytest.raises(ValueError, match=told):
        KINDS[kind](**wrong)
