import csv
import io
import json
import math
import statistics

import pytest

from moebench.dashboards import tables
from moebench.dashboards.figure_gate import MARKS, paired_ratios
from moebench.dashboards.gate_data import load_gate
from moebench.dashboards.page import render
from moebench.results.database import connect_parts

RUN = "20260315-101010-9a7e00"


@pytest.fixture
def gate_connection(build, tmp_path):
    opened = connect_parts(build.gate_store(tmp_path / "gate"))
    yield opened
    opened.close()


@pytest.fixture
def html(gate_connection):
    return render(gate_connection, None, "store")


@pytest.fixture
def variant(gate_connection):
    return paired_ratios(load_gate(gate_connection, RUN)).variants[0]


def sections(html):
    return [part.split('"')[0] for part in html.split('<section id="')[1:]]


def part(html, key):
    """Return the text of one section."""
    return html.split(f'<section id="{key}"')[1].split("</section>")[0]


def payload(html, name):
    return json.loads(html.split(f'id="{name}">')[1].split("</script>")[0])


def rows_of(html):
    return part(html, "gate").split("<tbody>")[1].split("<tr>")[1:]


# ---- which sections there are


def test_a_gate_without_cases_has_no_empty_sections(html):
    assert sections(html) == ["summary", "gate", "gate-pairs"]
    main = html.split("<main")[1].split("</main>")[0]
    assert 'class="empty"' not in main
    assert "has no cases" not in main
    assert "Evidence" not in main
    assert "6 comparisons" in html
    assert "0 cases" not in html
    links = html.split("<nav")[1].split("</nav>")[0]
    assert links.count("<a ") == 3
    assert '<a href="#gate">Gate</a>' in links


def test_a_run_of_cases_says_nothing_of_a_gate(page):
    html = page.read_text(encoding="utf-8")
    assert "gate" not in sections(html)
    assert 'href="#gate"' not in html


def test_a_gate_in_a_run_with_cases_stands_beside_them(build, tmp_path):
    run = build.Builder(tmp_path)
    row = run.case()
    run.timings(row, 50)
    build.compared(run, "a", "equivalent", ratio=1.0, lo=0.99, hi=1.01)
    html = render(connect_parts(run.write()), None, "store")
    assert sections(html)[:5] == ["summary", "gate", "gate-pairs", "problems", "cases"]
    assert "1 case · 1 comparison" in html


def test_a_run_with_neither_cases_nor_comparisons_says_so(build, tmp_path):
    run = build.Builder(tmp_path)
    run.add("series", case_key="k", name="load", values=[1.0])
    html = render(connect_parts(run.write()), None, "store")
    assert "This run has no cases." in html
    assert "0 cases" in html


# ---- the table


def test_every_comparison_is_a_row_and_the_worst_come_first(html):
    rows = rows_of(html)
    assert len(rows) == 6
    verdicts = [next(name for name in MARKS if f">{name}</span>" in row) for row in rows]
    assert verdicts == ["regressed", "inconclusive", "inconclusive", "improved", "equivalent", "equivalent"]
    first = rows[0]
    assert "1.120 [1.098, 1.142]" in first
    assert "50.00 µs" in first
    assert "56.00 µs" in first
    assert "5 / 200" in first
    assert "0.004 / 0.008" in first
    assert "<li>environment: torch 2.12 -&gt; 2.13</li>" in first


def test_an_accuracy_is_a_difference_and_a_metric_is_exact(html):
    accuracy = next(row for row in rows_of(html) if "lambada" in row)
    assert "-0.012 [-0.03, +0.006]<small>candidate - base</small>" in accuracy
    metric = next(row for row in rows_of(html) if "bytes" in row)
    assert metric.count("1234567 byte") == 2
    assert "exact" in metric
    assert "1.000" not in metric


def test_sides_and_noise_are_told(build, html, tmp_path):
    section = part(html, "gate")
    for name in build.GATE_SIDES.values():
        assert name in section
    assert "machine: tau 1.5 % over 20 A/A pairs; detects 3.1 %, asked for 5 %" in section
    noisy = render(connect_parts(build.gate_store(tmp_path / "noisy", detectable=0.09)), None, "store")
    assert "<b>too noisy: can detect only 9 %, asked for 5 %; tau 1.5 % over 20 A/A pairs</b>" in part(noisy, "gate")


def test_names_and_reasons_stay_text(build, html):
    for text in (build.HOSTILE_LABEL, build.HOSTILE_REASON, build.HOSTILE):
        assert text not in html
        assert tables.esc(text) in part(html, "gate")
    assert "<script>document.title" not in html


# ---- the figure


def test_pairs_are_medians_over_the_turns_that_both_sides_have(gate_connection, variant):
    assert len(variant.rows) == 4 * 2 * 5
    for row in variant.rows:
        found = gate_connection.execute(
            "SELECT side, ns, turn FROM turns WHERE case_key = ? AND pair = ? AND clock = 'cpu'",
            [row["case_key"], row["pair"]],
        ).fetchall()
        least = {side: {} for side, _, _ in found}
        for side, ns, turns in found:
            for one, turn in zip(ns, turns, strict=True):
                least[side][turn] = min(one, least[side].get(turn, one))
        common = least["base"].keys() & least[row["side"]].keys()
        logs = [math.log(least[row["side"]][turn] / least["base"][turn]) for turn in common]
        assert row["turns"] == len(common) == (39 if row["side"] == "candidate" else 40)
        assert row["ratio"] == pytest.approx(math.exp(statistics.median(logs)), rel=1e-12)
        assert row["quarter"] < row["ratio"] < row["three_quarters"]


def test_only_the_clock_that_was_judged_is_drawn(gate_connection, variant):
    assert variant.label == "cpu time"
    assert {row["clock"] for row in variant.rows} == {"cpu"}
    clocks = gate_connection.execute("SELECT DISTINCT clock FROM turns").fetchall()
    assert sorted(clocks) == [("cpu",), ("wall",)]


def test_every_verdict_has_its_mark_and_the_base_against_itself_is_hollow(variant):
    traces = {trace.name: trace for trace in variant.figure.data}
    assert list(traces) == ["candidate / base, by pair", "base / base, by pair", *MARKS]
    assert traces["base / base, by pair"].marker.symbol == "circle-open"
    assert traces["regressed"].x == (1.12,)
    assert traces["regressed"].error_x.array == pytest.approx([1.12 * 0.02])
    lines = [shape.x0 for shape in variant.figure.layout.shapes]
    assert lines == pytest.approx([1.0, 1.01, 1.05])
    assert [note.text for note in variant.figure.layout.annotations] == ["1", "margin 1 %", "asked 5 %"]


def test_names_in_the_figure_are_text_without_control_characters(variant):
    shown = json.dumps(variant.figure.to_plotly_json()["layout"]["yaxis"]["ticktext"])
    assert "<script>" not in shown
    assert "\\u001b" not in shown
    assert "&lt;script&gt;" in shown
    hover = next(trace for trace in variant.figure.data if trace.name == "inconclusive").hovertext[0]
    assert "<script>" not in hover


def test_table_and_figure_carry_their_sql_and_rows(gate_connection, html):
    texts = payload(html, "data-csv")
    table = list(csv.DictReader(io.StringIO(texts["gate"][0])))
    assert len(table) == 6
    assert table[0]["moved"].startswith('["environment')
    pairs = list(csv.DictReader(io.StringIO(texts["gate-pairs"][0])))
    assert len(pairs) == 40
    assert {row["estimate"] for row in pairs if row["verdict"] == "regressed"} == {"1.12"}
    gate = load_gate(gate_connection, RUN)
    for answer in (gate.comparisons, gate.pairs):
        assert tables.esc(answer.sql) in html
        assert gate_connection.execute(answer.sql).fetchall() == [tuple(row.values()) for row in answer.rows]


def test_a_time_without_interval_or_turns_and_a_gate_without_times_are_shown(build, tmp_path):
    run = build.Builder(tmp_path / "one")
    build.compared(run, "alone", "inconclusive", clock="wall", ratio=1.2)
    html = render(connect_parts(run.write()), None, "store")
    assert ">~</td>" in part(html, "gate")
    assert "1.2" not in rows_of(html)[0]
    assert payload(html, "figure-gate-pairs-0")["data"] == []
    run = build.Builder(tmp_path / "two")
    build.compared(run, "a", "regressed", kind="metric", metric="bytes", base_value=1.0, candidate_value=2.0)
    html = render(connect_parts(run.write()), None, "store")
    assert "This gate judged no times" in part(html, "gate-pairs")
    assert "no time was judged" in part(html, "gate")
