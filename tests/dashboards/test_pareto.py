"""Fronts from a store: what stands together, what is left out and why, and how it is drawn."""

from __future__ import annotations

import csv
import datetime
import io
import json
import re

import pytest

from moebench.dashboards import pareto_data, pareto_text
from moebench.dashboards.figure_pareto import pareto
from moebench.dashboards.pareto_cap import best_in_all
from moebench.dashboards.pareto_page import render_pareto
from moebench.results.database import connect_parts
from moebench.results.errors import ResultsError
from moebench.results.pareto import Place
from moebench.results.pareto_axes import X_AXES, Y_AXES
from moebench.results.pareto_sql import load_points, quality_axes
from moebench.results.query import reading

NAMES = ("topk", "moepp", "expert_choice")


@pytest.fixture(scope="module")
def many(build, tmp_path_factory):
    return build.pareto_store(tmp_path_factory.mktemp("many") / "store")


@pytest.fixture
def connected(many):
    opened = connect_parts(many)
    yield opened
    opened.close()


def answer(connection, x="tpot", y="ppl", **over):
    return pareto_data.answer(connection, X_AXES[x], quality_axes(connection)[y], **over)


def timed(run, build, methods=NAMES, us=50, sitting=None, **over):
    """Add timed and judged cases; ``sitting`` is where they were taken."""
    for number, routing in enumerate(methods):
        row = run.case(routing=routing, **over)
        run.timings(row, us * (1 + number), processes=1, calls=40)
        for timing in run.tables["timings"][-2:]:
            timing["sitting"] = sitting or timing["sitting"]
        if not any(case["suite"] == "accuracy" and case["routing"] == routing for case in run.tables["cases"]):
            build.judged(run, 0.1 / (1 + number), routing=routing)


# ---------------------------------------------------------------------------------------------------------------------
# What stands together


def test_every_method_stands_on_one_front_with_intervals_on_both_axes(connected):
    found = answer(connected)
    (shown,) = found.fronts
    assert shown.front.methods == 72
    assert len(shown.cases) == 144
    rows = found.rows(shown)
    assert all(row[f"{axis}_lo"] <= row[axis] <= row[f"{axis}_hi"] for row in rows for axis in "xy")
    assert {row["evidence"] for row in rows} == {"measured-cpu"}
    assert shown.front.count(Place.FRONT) >= 2
    assert shown.front.count(Place.DOMINATED) > 40
    assert found.left == ()


@pytest.mark.parametrize("x", ["latency", "tpot", "throughput"])
def test_time_per_call_time_per_token_and_throughput_have_the_same_front(connected, x):
    (shown,) = answer(connected, x).fronts
    (other,) = answer(connected, "latency").fronts
    assert {k: p.place for k, p in shown.front.places.items()} == {k: p.place for k, p in other.front.places.items()}
    ns = {row["case_key"]: row["median_ns"] for row in other.front.rows}
    for row in shown.front.rows:
        value = {"latency": 1, "tpot": 1 / 256, "throughput": 256e9 / ns[row["case_key"]] ** 2}[x] * ns[row["case_key"]]
        assert row["x"] == pytest.approx(value)
    best = max if x == "throughput" else min
    assert shown.front.rows[0]["x"] == best(row["x"] for row in shown.front.rows)


def test_quality_is_joined_by_method(connected):
    quality = dict(connected.execute("SELECT method_key, value FROM metrics WHERE name = 'perplexity'").fetchall())
    rows = answer(connected).fronts[0].front.rows
    assert all(row["y"] == quality[row["method_key"]] for row in rows)


def test_accuracy_is_the_share_of_right_items_with_its_exact_interval(connected):
    found = answer(connected, y="accuracy:cloze")
    assert (found.y.better, found.y.task) == ("higher", "cloze")
    for row in found.fronts[0].front.rows:
        assert row["y"] == pytest.approx(sum(row["y_values"]) / 300)
        assert 0 < row["y_hi"] - row["y_lo"] < 0.13
    assert found.fronts[0].front.count(Place.DOMINATED)


def test_bytes_are_their_own_interval_and_need_no_sitting(build, tmp_path):
    run = build.Builder(tmp_path, "a")
    for number, routing in enumerate(NAMES):
        run.metric(run.case(routing=routing), "expert_bytes", 1e6 * (1 + number), "byte")
        build.judged(run, 0.1 / (1 + number), routing=routing)
    store = run.write()
    later = build.Builder(store, "b")
    later.metric(later.case(routing="topk"), "expert_bytes", 5e5, "byte")
    later.write(build.START + datetime.timedelta(days=1))
    (shown,) = answer(connect_parts(store), "bytes", "kl").fronts
    assert [row["x"] for row in shown.front.rows] == [5e5, 2e6, 3e6]
    assert all(row["x"] == row["x_lo"] == row["x_hi"] for row in shown.front.rows)
    assert shown.front.count(Place.FRONT) == 3


def test_times_of_two_sittings_are_never_on_one_front(build, opened):
    builder, open_store = opened
    run = builder()
    timed(run, build, sitting="one")
    timed(run, build, ("deepseek", "hash"), sitting="two")
    fronts = answer(open_store(run)).fronts
    assert [{row["routing"] for row in shown.front.rows} for shown in fronts] == [set(NAMES), {"deepseek", "hash"}]


def test_an_anchor_counts_in_each_piece_with_the_samples_of_that_piece(build, opened):
    builder, open_store = opened
    run = builder()
    timed(run, build, ("anchor", "b"), us=10, sitting="one")
    timed(run, build, ("c",), us=500, sitting="two")
    anchor = run.tables["timings"][:2]
    run.tables["timings"] += [
        {**row, "process": 1, "sitting": "two", "ns": [ns * 90 for ns in row["ns"]], "median_lo_ns": 1.0}
        for row in anchor
    ]
    fronts = answer(open_store(run), "latency").fronts
    found = {
        frozenset(r["routing"] for r in s.front.rows): {r["routing"]: r["x"] for r in s.front.rows} for s in fronts
    }
    assert set(found) == {frozenset({"anchor", "b"}), frozenset({"anchor", "c"})}
    one, two = (found[frozenset({"anchor", other})]["anchor"] for other in "bc")
    assert two == pytest.approx(90 * one)


def test_of_two_runs_of_a_group_one_is_kept_and_the_other_is_told(build, tmp_path):
    for day, methods in enumerate((NAMES, NAMES[:2])):
        run = build.Builder(tmp_path, f"run{day}")
        timed(run, build, methods)
        run.write(build.START + datetime.timedelta(days=day))
    connection = connect_parts(tmp_path)
    found = answer(connection)
    assert [shown.front.rows[0]["run_id"] for shown in found.fronts] == ["run0"]
    ((rows, reason),) = [(one.rows, one.reason) for one in found.left]
    assert rows == 2
    assert "--where \"run_id = '...'\"" in reason
    (shown,) = answer(connection, where="run_id = 'run1'").fronts
    assert {row["run_id"] for row in shown.front.rows} == {"run1"}


def test_kinds_of_evidence_never_meet(build, opened):
    builder, open_store = opened
    run = builder()
    timed(run, build)
    timed(run, build, evidence="interpreted")
    found = answer(open_store(run))
    assert [{row["evidence"] for row in shown.front.rows} for shown in found.fronts] == [{"measured-cpu"}]
    assert [(one.rows, one.reason.split(":")[0]) for one in found.left] == [
        (3, "their evidence is interpreted and that of their perplexity measured-cpu")
    ]


def test_what_has_no_quality_or_nothing_beside_it_is_counted(build, opened):
    builder, open_store = opened
    run = builder()
    timed(run, build)
    run.timings(run.case(routing="unjudged"), 50, processes=1)
    timed(run, build, ("topk",), tokens=16)
    left = {one.reason.split(";")[0].split(",")[0]: one.rows for one in answer(open_store(run)).left}
    assert left == {
        "no perplexity of their method is in the store": 1,
        "nothing that was judged in the same way was taken in turns with them": 1,
    }


def test_methods_judged_in_different_ways_are_on_different_fronts(build, opened):
    builder, open_store = opened
    run = builder()
    timed(run, build)
    for number, routing in enumerate(NAMES):
        build.judged(run, 0.2 / (1 + number), routing=routing, tokens=512)
    fronts = answer(open_store(run)).fronts
    assert len(fronts) == 2
    assert all(len({row["quality_group"] for row in shown.front.rows}) == 1 for shown in fronts)
    assert len({shown.title for shown in fronts}) == 2


def test_the_latest_evaluation_counts(build, tmp_path):
    run = build.Builder(tmp_path, "a")
    timed(run, build)
    run.write()
    later = build.Builder(tmp_path, "b")
    build.judged(later, 1.0, routing="topk")
    later.write(build.START + datetime.timedelta(days=1))
    rows = answer(connect_parts(tmp_path), y="kl").fronts[0].front.rows
    assert {row["routing"]: (row["y"], row["quality_run"]) for row in rows}["topk"] == (1.0, "b")


def test_flagged_cases_are_shown_and_not_judged(build, opened):
    builder, open_store = opened
    run = builder()
    timed(run, build)
    timed(run, build, ("fast",), us=1, flags=["contended"])
    (shown,) = answer(open_store(run)).fronts
    by_routing = {case.row["routing"]: shown.placed(case) for case in shown.cases}
    assert (by_routing["fast"].place, by_routing["fast"].why) == (Place.UNJUDGED, "contended")
    assert {by_routing[name].place for name in NAMES} == {Place.FRONT}


def test_too_few_samples_for_an_interval_are_not_judged(build, opened):
    builder, open_store = opened
    run = builder()
    timed(run, build)
    row = run.case(routing="few")
    run.timings(row, 1, processes=1, calls=3)
    build.judged(run, 0.01, routing="few")
    (shown,) = answer(open_store(run)).fronts
    few = next(case for case in shown.cases if case.row["routing"] == "few")
    assert (shown.placed(few).place, shown.placed(few).why) == (Place.UNJUDGED, "no interval")


def test_energy_is_told_to_be_absent_and_drawn_where_it_was_read(build, opened):
    builder, open_store = opened
    run = builder()
    timed(run, build)
    assert answer(open_store(run), "energy").none == (
        "no ok row here has a value of energy per call: take --x tpot or --x bytes, because no counter of energy was "
        "read where these rows were measured, and none is guessed."
    )
    for number, row in enumerate([case for case in run.tables["cases"] if case["protocol"] == "timed"]):
        run.metric(row, "energy", 1.0 + number, "J", 0.1)
    other = builder(run_id="other")
    other.tables = {t: [{**row, "run_id": "other"} for row in rows] for t, rows in run.tables.items()}
    (shown,) = answer(open_store(other), "energy", where="run_id = 'other'").fronts
    assert [row["x"] for row in shown.front.rows] == [1.0, 2.0, 3.0]


# ---------------------------------------------------------------------------------------------------------------------
# Conditions


def test_a_condition_filters_by_any_column(connected):
    found = answer(connected, where="backend = 'eager' AND quantization <> 'none' AND y < 18 -- and no more")
    rows = found.fronts[0].front.rows
    assert {row["backend"] for row in rows} == {"eager"}
    assert all(row["quantization"] != "none" and row["y"] < 18 for row in rows)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nonsense = 1", "nonsense"),
        ("backend = 'a", "the SQL cannot be run"),
        ("true); DROP TABLE cases; SELECT (1", "read by one SELECT at a time"),
        ("backend = $backend", "the SQL cannot be run"),
        ("1 = (SELECT count(*) FROM read_csv('/etc/passwd'))", "the SQL cannot be run"),
    ],
)
def test_a_wrong_condition_is_one_sentence(many, where, words):
    with reading(many) as connection, pytest.raises(ResultsError, match=re.escape(words)) as told:
        load_points(connection, X_AXES["tpot"], Y_AXES["ppl"], where)
    assert "\n" not in str(told.value)


def test_a_condition_that_nothing_fits_says_so(connected):
    assert answer(connected, where="tokens = 7").none == (
        "no ok row that fits the condition has a value of time per token: widen the condition, or run a suite of "
        "speed, such as `moebench run suite=throughput`."
    )


@pytest.mark.parametrize("x", X_AXES)
@pytest.mark.parametrize("y", ["ppl", "accuracy:cloze"])
def test_the_query_that_is_shown_gives_the_same_rows(connected, x, y):
    where = "quantization <> '$y'"
    found = load_points(connected, X_AXES[x], quality_axes(connected)[y], where)
    assert where in found.sql
    shown = connected.execute(found.sql)
    at = [column[0] for column in shown.description].index("case_key")
    assert [row[at] for row in shown.fetchall()] == [row["case_key"] for row in found.rows]


def test_a_task_with_a_quote_in_its_name_is_a_name(build, opened):
    builder, open_store = opened
    run = builder()
    timed(run, build)
    task = "it's; DROP TABLE items --"
    for routing in NAMES:
        build.judged(run, 0.1, task=task, routing=routing, tokens=9)
    connection = open_store(run)
    found = answer(connection, y=f"accuracy:{task}")
    assert found.fronts[0].front.methods == 3
    assert connection.execute(found.points.sql).fetchall()


# ---------------------------------------------------------------------------------------------------------------------
# Figures, pages and texts


def test_dominated_marks_are_grey_and_every_mark_has_bars_on_both_axes(connected):
    found = answer(connected)
    (variant,) = pareto("pareto", "Pareto", [found]).variants
    drawn = [trace for trace in variant.figure.data if trace.hovertext]
    colors = [color for trace in drawn for color in trace.marker.color]
    assert len(colors) == 144
    assert colors.count("#848b94") == found.fronts[0].front.count(Place.DOMINATED)
    for trace in drawn:
        for bars in (trace.error_x, trace.error_y):
            assert all(size >= 0 for size in (*bars.array, *bars.arrayminus))
    hover = next(text for trace in drawn for text in trace.hovertext if "dominated" in text)
    assert re.search(r"backend \w+, run 20260314-092653-a1b2c3<br>", hover)
    assert "S-MBU" in hover


def test_marks_say_nothing_as_markup(build, connected):
    (variant,) = pareto("pareto", "Pareto", [answer(connected)]).variants
    texts = [text for trace in variant.figure.data for text in trace.hovertext or ()]
    assert any("&lt;img" in text for text in texts)
    assert not any("<img" in text for text in texts)


def test_the_line_of_the_front_joins_the_marks_that_are_on_it(connected):
    for x, shape in (("latency", "hv"), ("throughput", "vh")):
        found = answer(connected, x)
        line = pareto("p", "P", [found]).variants[0].figure.data[0]
        assert line.line.shape == shape
        assert len(line.x) == found.fronts[0].front.count(Place.FRONT)
        assert list(line.x) == sorted(line.x)


def test_the_page_has_a_section_for_every_axis_and_says_which_are_empty(many):
    with reading(many) as connection:
        html = render_pareto(connection, X_AXES["tpot"], Y_AXES["ppl"], str(many), "tokens > 0", 0.5)
    assert re.findall(r'<section id="([\w-]+)"', html) == [*(f"pareto-{name}" for name in X_AXES), "cap"]
    assert "No ok row that fits the condition has a value of energy per call: widen the condition, or take" in html
    assert html.count("72 methods in 144 cases") >= 15
    assert "<img src=x" not in html
    assert "tokens &gt; 0" in html
    texts = json.loads(re.search(r'id="data-csv">(.*?)</script>', html)[1])
    assert len(list(csv.DictReader(io.StringIO(texts["pareto-tpot"][0])))) == 144
    assert float(next(csv.DictReader(io.StringIO(texts["cap"][0])))["cost_per_million_tokens"]) > 0


def test_the_table_of_costs_says_that_two_of_three_must_do(connected):
    found = answer(connected)
    assert best_in_all(found, found.fronts[0]).startswith("No case is as good as the best in all three")


def test_no_line_is_wider_than_a_hundred_columns_and_numbers_name_the_others(connected):
    lines = pareto_text.pareto_table(answer(connected, price_per_hour=2.0)).splitlines()
    assert max(map(len, lines)) <= 100
    head = next(line for line in lines if line.lstrip().startswith("#"))
    assert head.split() == ["#", "case", "tpot", "ppl", "S-MBU", "S-MFU", "cost/1M", "place"]
    assert any(re.search(r"dominated: \d+, \d+, …$", line) for line in lines)


def test_json_and_csv_say_the_same(connected):
    found = answer(connected)
    told = json.loads(pareto_text.pareto_json(found))
    rows = list(csv.DictReader(io.StringIO(pareto_text.pareto_csv(found))))
    cases = [case for front in told["fronts"] for case in front["cases"]]
    assert [case["case_key"] for case in cases] == [row["case_key"] for row in rows]
    assert [case["x"] for case in cases] == [float(row["x"]) for row in rows]
    assert (told["x"]["name"], told["y"]["name"], told["left_out"]) == ("tpot", "ppl", [])
