import csv
import dataclasses
import datetime
import io

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.dashboards import data, units
from moebench.dashboards.details import thinned
from moebench.dashboards.query import ask, literal, to_csv
from moebench.dashboards.ratios import baseline_of, paired_ratio, turn_minima
from moebench.results.database import connect_parts


@given(st.text())
@settings(deadline=None)
def test_a_literal_is_read_back_as_the_text_it_was_made_from(text):
    text = text.replace("\0", "")
    with duckdb.connect() as connection:
        assert connection.execute(f"SELECT {literal(text)}").fetchone() == (text,)


def test_the_query_that_is_shown_is_the_one_that_ran(connection):
    answer = ask(connection, data.METRICS, run_id="20260314-092653-a1b2c3")
    assert "$run_id" not in answer.sql
    assert connection.execute(answer.sql).fetchall() == [tuple(row.values()) for row in answer.rows]


def test_csv_is_read_back_with_null_as_an_empty_field():
    rows = [{"a": 'x,"y"\nz', "b": None}, {"a": "1", "c": [1, 2]}]
    assert list(csv.DictReader(io.StringIO(to_csv(rows)))) == [
        {"a": 'x,"y"\nz', "b": "", "c": ""},
        {"a": "1", "b": "", "c": "[1, 2]"},
    ]


@pytest.mark.parametrize(
    ("ns", "shown"),
    [(None, units.DASH), (12.0, "12.00 ns"), (12_345.0, "12.35 µs"), (1_234_500.0, "1.234 ms"), (2.5e9, "2.500 s")],
)
def test_times_are_shown_in_a_unit_that_fits(ns, shown):
    assert units.time(ns) == shown


@given(st.floats(min_value=1e-9, max_value=1e15))
def test_a_shown_number_is_within_its_digits(value):
    assert float(units.digits(value).replace(",", "")) == pytest.approx(value, rel=6e-3)


def test_the_latest_run_comes_first_and_a_run_without_record_is_listed(build, tmp_path):
    later = build.START + datetime.timedelta(days=1)
    for run_id, started in (("old", build.START), ("new", later)):
        run = build.Builder(tmp_path, run_id)
        run.case()
        run.write(started)
    bare = build.Builder(tmp_path, "bare")
    bare.case(finished_at=build.START - datetime.timedelta(days=9))
    bare.write()
    (tmp_path / "runs" / "bare" / "run.json").unlink()
    found = data.load_runs(connect_parts(tmp_path))
    assert [run.run_id for run in found] == ["new", "old", "bare"]
    assert found[-1].row["cases"] == 1


def test_only_an_ok_case_has_a_time_whatever_the_parts_say(opened):
    builder, open_store = opened
    run = builder()
    good, bad = run.case(), run.case(backend="bad", status="wrong", reason="differs")
    run.timings(good, 50)
    run.timings(bad, 10)
    cases, _ = data.load_cases(open_store(run), run.run_id)
    assert {case.axes["backend"]: case.median_ns is not None for case in cases} == {"eager": True, "bad": False}


def test_a_median_is_that_of_all_calls_and_its_interval_spans_the_processes(opened):
    builder, open_store = opened
    run = builder()
    row = run.case()
    run.timings(row, 50, processes=3)
    wall = [timing for timing in run.tables["timings"] if timing["clock"] == "wall"]
    case = data.load_cases(open_store(run), run.run_id)[0][0]
    pooled = sorted(ns for timing in wall for ns in timing["ns"])
    assert case.median_ns == (pooled[len(pooled) // 2 - 1] + pooled[len(pooled) // 2]) / 2
    assert case.bounds_ns == (min(t["median_lo_ns"] for t in wall), max(t["median_hi_ns"] for t in wall))
    assert case.row["clock"] == "wall"


def test_one_process_without_an_interval_leaves_the_case_without_one(opened):
    builder, open_store = opened
    run = builder()
    row = run.case()
    run.timings(row, 50, processes=1)
    run.timings(row, 50, processes=1, calls=3)
    for process, timing in enumerate(run.tables["timings"]):
        timing["process"] = process // 2
    case = data.load_cases(open_store(run), run.run_id)[0][0]
    assert case.median_ns is not None
    assert case.bounds_ns == (None, None)


def test_a_device_clock_is_preferred_and_cpu_time_is_never_the_median(opened):
    builder, open_store = opened
    run = builder()
    row = run.case()
    run.timings(row, 50, processes=1)
    run.tables["timings"][0]["clock"] = "cuda_event"
    only_cpu = run.case(backend="cpu-only")
    run.timings(only_cpu, 50, processes=1)
    del run.tables["timings"][-2]
    cases, _ = data.load_cases(open_store(run), run.run_id)
    assert {case.axes["backend"]: case.row["clock"] for case in cases} == {"eager": "cuda_event", "cpu-only": None}


def test_throughput_counts_every_layer_of_a_call(opened):
    builder, open_store = opened
    run = builder()
    row = run.case(layers="3,5,7", tokens=100)
    run.timings(row, 50)
    case = data.load_cases(open_store(run), run.run_id)[0][0]
    assert case.layer_tokens_per_s == pytest.approx(300 / (case.median_ns * 1e-9))


def test_labels_name_what_differs_with_the_parameters_that_differ(opened):
    builder, open_store = opened
    run = builder()
    for tau in (0.25, 0.75):
        run.case(routing="moepp", params={"routing": {"tau": tau, "same": 1}})
    run.case(quantization="rtn_int8")
    cases, _ = data.load_cases(open_store(run), run.run_id)
    assert {case.label for case in cases} == {"moepp(tau=0.25)", "moepp(tau=0.75)", "topk · rtn_int8"}


def test_cases_of_other_sittings_are_never_in_one_group(opened):
    builder, open_store = opened
    run = builder()
    for backend in ("a", "b"):
        run.timings(run.case(backend=backend), 50, processes=2)
    run.timings(run.case(backend="c"), 50, processes=1)
    run.timings(run.case(backend="d"), 50, processes=1)
    for timing in run.tables["timings"][-2:]:
        timing["sitting"] = "another"
    cases, _ = data.load_cases(open_store(run), run.run_id)
    groups = [{case.axes["backend"] for case in group} for group in data.sitting_groups(cases)]
    assert sorted(groups, key=len) == [{"d"}, {"a", "b", "c"}]


def test_an_exact_ratio_is_found_exactly_and_only_from_shared_turns():
    base = {"s0": dict.fromkeys(range(20), 100), "s1": dict.fromkeys(range(20), 100)}
    case = {"s0": dict.fromkeys(range(10, 30), 200), "s2": {0: 999}}
    ratio = paired_ratio(base, case)
    assert (ratio.ratio, ratio.lo, ratio.hi) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio.pairs == 10
    assert paired_ratio(base, {"s2": {0: 999}}) is None


def test_a_difference_between_processes_widens_the_ratio():
    base = {sitting: dict.fromkeys(range(20), 100) for sitting in ("s0", "s1", "s2")}
    case = {f"s{i}": dict.fromkeys(range(20), ns) for i, ns in enumerate((90, 100, 120))}
    ratio = paired_ratio(base, case)
    assert (ratio.ratio, ratio.lo, ratio.hi) == pytest.approx((1.0, 0.9, 1.2))


def test_turn_minima_are_the_least_call_of_each_turn(opened):
    builder, open_store = opened
    run = builder()
    row = run.case()
    run.timings(row, 50, processes=1, calls=12)
    ns = run.tables["timings"][0]["ns"]
    answer = ask(open_store(run), data.MINIMA, run_id=run.run_id)
    (turns,) = turn_minima(answer)[row["case_key"]].values()
    assert turns == {turn: min(ns[4 * turn : 4 * turn + 4]) for turn in range(3)}


def test_the_baseline_is_eager_and_plain_and_not_flagged(opened):
    builder, open_store = opened
    run = builder()
    for over in ({"backend": "a"}, {"sparsity": "teal"}, {"routing": "odd"}, {"traffic": "zipf"}, {"backend": "b"}):
        run.timings(run.case(**over), 50, processes=1)
    cases, _ = data.load_cases(open_store(run), run.run_id)
    base = baseline_of(cases)
    assert (base.axes["backend"], base.axes["routing"], base.axes["sparsity"]) == ("eager", "topk", "none")


def test_capped_samples_say_how_many_there_were():
    row = {"case_key": "k", "clock": "wall", "ns": list(range(10)), "turn": [0] * 10}
    kept = thinned(row, limit=4)
    assert (kept["ns"], kept["of"], kept["step"]) == ([0, 3, 6, 9], 10, 3)
    whole = thinned(row, limit=10)
    assert (whole["ns"], whole["of"], whole["step"]) == (row["ns"], 10, 1)


@pytest.mark.parametrize(
    ("suite", "shown"), [("lm_eval", ["cloze.acc", "perplexity"]), ("accuracy", ["perplexity", "bits_per_byte"])]
)
def test_a_case_of_tasks_is_told_by_all_that_has_an_interval(suite, shown):
    given = [
        ("cloze.acc", 0.5, 0.4),
        ("cloze.chance", 0.5, None),
        ("bits_per_byte", 1.0, None),
        ("perplexity", 9.0, 8.0),
    ]
    metrics = tuple({"name": name, "value": value, "lo": lo} for name, value, lo in given)
    case = data.Case("key", {"suite": suite, "status": "ok", "median_ns": None}, {}, metrics=metrics)
    assert [metric["name"] for metric in case.quality] == shown
    assert dataclasses.replace(case, row={**case.row, "median_ns": 1.0}).quality == []
