import base64
import datetime
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.dashboards import data, tables
from moebench.dashboards.chart import Style, figure_json, safe, script_json
from moebench.dashboards.page import SECTIONS, make_charts, render
from moebench.dashboards.report import write_report
from moebench.results.database import connect_parts
from moebench.results.errors import ResultsError

RUN = "20260314-092653-a1b2c3"


class Elements(HTMLParser):
    """Collects what a browser would see: elements with attributes, and the text of scripts by id."""

    def __init__(self, html):
        super().__init__()
        self.found, self.scripts, self._script = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
            self._script = self.scripts[-1]

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self._script[1] += data

    def tags(self, name):
        return [attrs for tag, attrs in self.found if tag == name]


@pytest.fixture(scope="session")
def html(page):
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def elements(html):
    return Elements(html)


@pytest.fixture
def charts(connection):
    cases, answer = data.load_cases(connection, RUN)
    return {chart.key: chart for chart in make_charts(connection, RUN, cases, answer)}


def test_every_section_is_there_and_named(elements):
    sections = {attrs["id"]: attrs["aria-labelledby"] for attrs in elements.tags("section")}
    headings = {attrs["id"] for attrs in elements.tags("h2")}
    assert set(SECTIONS) <= set(sections)
    assert set(sections.values()) == headings


def test_the_page_refers_to_nothing_outside_itself(elements):
    places = [
        attrs[name] for _, attrs in elements.found for name in ("src", "href", "srcset", "action") if name in attrs
    ]
    assert all(place.startswith("#") or place == "data:," for place in places), places


def test_each_script_is_pinned_by_the_hash_of_what_runs(elements):
    policy = next(attrs["content"] for attrs in elements.tags("meta") if "http-equiv" in attrs)
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    code = [text for attrs, text in elements.scripts if attrs.get("type") != "application/json"]
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code} == allowed
    assert len(code) == 3
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_hostile_names_and_reasons_stay_text(build, elements, html):
    assert not elements.tags("img")
    assert not [attrs for _, attrs in elements.found if any(name.startswith("on") for name in attrs)]
    assert "<script>document.title" not in html
    assert tables.esc(build.HOSTILE) in html
    assert tables.esc(build.HOSTILE_REASON) in html


def test_payloads_are_json_and_hold_every_case(build, elements, connection):
    payloads = {attrs["id"]: json.loads(text) for attrs, text in elements.scripts if attrs.get("type")}
    details = payloads["data-details"]
    keys = {row[0] for row in connection.execute("SELECT case_key FROM cases").fetchall()}
    assert set(details) == keys
    hostile = connection.execute("SELECT case_key FROM cases WHERE backend = ?", [build.HOSTILE]).fetchone()[0]
    found = json.loads(zlib.decompress(base64.b64decode(details[hostile])))
    assert found["facts"]["reason"] == build.HOSTILE_REASON
    assert found["timings"] == []


def test_the_samples_in_the_page_are_those_of_the_parts(elements, connection):
    details = json.loads(next(text for attrs, text in elements.scripts if attrs.get("id") == "data-details"))
    key, ns, turn = connection.execute(
        "SELECT case_key, ns, turn FROM timings WHERE clock = 'wall' ORDER BY case_key, process LIMIT 1"
    ).fetchone()
    timings = json.loads(zlib.decompress(base64.b64decode(details[key])))["timings"]
    wall = next(row for row in timings if row["clock"] == "wall" and row["process"] == 0)
    assert (wall["ns"], wall["turn"], wall["step"]) == (ns, turn, 1)


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_in_a_script_can_neither_end_it_nor_change(value):
    text = script_json({"value": value})
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"value": value}


@given(st.text())
def test_plotly_gets_no_markup_from_data(text):
    assert not set(safe(text)) & set("<>")


def test_figures_carry_no_template_of_their_own_colours():
    content = json.loads(figure_json(go.Figure(go.Scatter(x=[1, 2], y=[3, 4])), {}))
    assert "template" not in content["layout"]


def test_every_disclosed_query_runs_as_it_is_shown(html, connection):
    queries = re.findall(r"<pre><code>(.*?)</code></pre>", html, re.S)
    assert len(queries) >= 8
    for query in queries:
        for name, sign in (("&lt;", "<"), ("&gt;", ">"), ("&#x27;", "'"), ("&quot;", '"'), ("&amp;", "&")):
            query = query.replace(name, sign)
        connection.execute(query).fetchall()


def test_what_was_not_measured_is_a_dash_that_says_so(elements, html):
    assert 'title="not measured"' in html
    assert tables.text(None) == tables.NOT_MEASURED
    assert tables.text(0) == "0"


def test_what_is_not_ok_stands_first_in_the_table_and_in_its_box(html):
    statuses = re.findall(r'<tr class="case [^>]*data-f-status="(\w+)"', html)
    assert statuses[:7] == ["wrong", "crashed", "failed", "timed_out", "fell_back", "skipped", "skipped"]
    assert set(statuses[8:]) == {"ok"}
    box = html[html.index('<section id="problems"') : html.index('<section id="cases"')]
    assert "SIGSEGV" in box
    assert "3 cases" in box
    for flag in ("contended", "not_steady"):
        assert tables.esc(tables.FLAG_ADVICE[flag][1]) in box


def test_filters_exist_for_columns_with_more_than_one_value_only(elements):
    named = [attrs["data-filter"] for attrs in elements.tags("select") if "data-filter" in attrs]
    assert {"status", "backend", "routing", "quantization", "sparsity", "tokens", "evidence", "flags"} <= set(named)
    assert not {"dtype", "threads", "boundary"} & set(named)


def test_no_figure_mixes_kinds_of_evidence(charts):
    seen = 0
    for chart in charts.values():
        for variant in chart.variants:
            kinds = {row["evidence"] for row in variant.rows if "evidence" in row}
            assert len(kinds) <= 1
            seen += len(kinds)
    assert seen > 5


def test_flagged_rows_are_hollow_and_dominate_nothing(charts):
    variant = next(v for v in charts["compare"].variants if any(row["flags"] for row in v.rows))
    hollow = sum(str(symbol).endswith("-open") for trace in variant.figure.data for symbol in trace.marker.symbol or ())
    flagged = sum(bool(row["flags"]) for row in variant.rows)
    with_ratio = sum(bool(row["flags"]) and row["ratio"] is not None for row in variant.rows)
    assert flagged > 0
    assert hollow == flagged + with_ratio


def test_the_ratio_in_the_compare_chart_is_time_over_baseline(charts):
    rows = {row["case"]: row for row in charts["compare"].variants[0].rows}
    base = rows[next(iter(rows.values()))["baseline"]]
    assert base["ratio"] is None
    assert base["backend"] == "eager"
    for row in rows.values():
        if row is not base:
            assert row["ratio"] == pytest.approx(row["median_ns"] / base["median_ns"], rel=0.05)
            assert row["ratio_lo"] <= row["ratio"] <= row["ratio_hi"]


def test_scaling_divides_by_tokens(charts):
    rows = charts["scaling"].variants[0].rows
    assert {row["tokens"] for row in rows} >= {16, 256, 1024}
    assert all(row["ns_per_token"] == row["median_ns"] / row["tokens"] for row in rows)


def test_roofline_points_and_ceilings(charts, opened):
    variant = charts["roofline"].variants[0]
    row = variant.rows[0]
    assert row["flop_per_s"] == pytest.approx(row["flops"] / row["median_ns"] * 1e9)
    names = {trace.hovertext for trace in variant.figure.data if trace.mode == "lines+text"}
    assert names == {"L1: 290 GB/s", "L2: 130 GB/s", "L3: 62.0 GB/s", "dram: 14.0 GB/s", "peak float32: 71.0 Gflop/s"}
    builder, open_store = opened
    run = builder()
    case = run.case()
    run.timings(case, 50)
    run.metric(case, "flops", 1e6, "flop")
    run.metric(case, "bytes", 1e5, "byte")
    connection = open_store(run)
    cases, answer = data.load_cases(connection, run.run_id)
    alone = next(c for c in make_charts(connection, run.run_id, cases, answer) if c.key == "roofline")
    assert "No ceilings" in alone.variants[0].note


def test_expert_load_is_a_share_and_backends_share_a_row(charts):
    for variant in charts["loads"].variants:
        for shares in variant.figure.data[0].z:
            assert sum(shares) == pytest.approx(100)
        assert len(set(variant.figure.data[0].y)) == len(variant.figure.data[0].y)
    assert {row["expert"] for row in charts["requested"].variants[0].rows} == set(range(64))


def test_the_report_draws_the_fronts_of_its_run_in_the_colours_of_its_backends(charts, connection):
    variants = charts["pareto"].variants
    rows = [row for variant in variants for row in variant.rows]
    assert {row["x_axis"] for row in rows} == {"tpot"}
    assert {row["y_axis"] for row in rows} == {"ppl", "kl"}
    assert {row["run_id"] for row in rows} == {RUN}
    flagged = [row for row in rows if row["flags"]]
    assert flagged
    assert {row["place"] for row in flagged} == {"unjudged"}
    backends = [row[0] for row in connection.execute("SELECT DISTINCT backend FROM cases").fetchall()]
    style = Style.of(backends)
    legend = {trace.name: trace.marker.color for trace in variants[0].figure.data if trace.name}
    assert legend == {name: style.color(name) for name in legend}
    assert len(legend) > 3


def test_colours_are_the_same_wherever_a_backend_stands():
    style = Style.of(["b", "a", "b"])
    assert style == Style.of(["a", "b"])
    assert style.color("a") != style.color("b")
    assert style.symbol("a", flagged=True) == style.symbol("a") + "-open"


# ---- little or nothing in the store


def test_an_empty_store_gives_a_page_that_says_so(tmp_path):
    page = write_report(tmp_path / "nothing", tmp_path / "out" / "report.html")
    assert "There is no run" in page.read_text(encoding="utf-8")
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_a_run_without_an_ok_row_says_so_in_every_section(opened):
    builder, open_store = opened
    run = builder()
    run.case(status="skipped", reason="no compiler here", error=None, error_bound=None)
    html = render(open_store(run), None, "store")
    assert "No case of this run is ok" in html
    assert "no compiler here" in html
    empty = [attrs for attrs in Elements(html).tags("p") if attrs.get("class") == "empty"]
    assert len(empty) >= 7


def test_the_front_says_which_half_is_missing(opened, build, tmp_path):
    builder, open_store = opened
    run = builder()
    run.timings(run.case(), 50)
    assert "run `moebench run suite=accuracy` on the same methods" in render(open_store(run), None, "store")
    other = build.Builder(tmp_path / "other")
    row = other.case(suite="accuracy", protocol="once")
    other.metric(row, "perplexity", 17.0, "")
    page = render(connect_parts(other.write()), None, "store")
    assert "No ok row here has a value of time per token: run a suite of speed" in page


def test_an_unknown_run_is_one_sentence_with_those_that_exist(connection):
    with pytest.raises(ResultsError, match=r"^run 'nope' is not in .*20260314"):
        render(connection, "nope", "store")


def test_other_runs_are_listed_and_probes_of_the_same_host_are_used(build, tmp_path):
    build.full_store(tmp_path)
    run = build.Builder(tmp_path, "later")
    case = run.case()
    run.timings(case, 50)
    run.metric(case, "flops", 1e6, "flop")
    run.metric(case, "bytes", 1e5, "byte")
    run.write(build.START + datetime.timedelta(days=1))
    html = render(connect_parts(tmp_path), None, "store")
    assert "<h1>Run later</h1>" in html
    assert "Other runs in this store (1)" in html
    assert f"Taken on this host in another run: {RUN}." in html


def test_a_damaged_part_is_named_in_the_page(build, tmp_path):
    build.full_store(tmp_path)
    run = build.Builder(tmp_path, "damaged")
    run.case()
    run.write()
    (tmp_path / "runs" / "damaged" / "part" / "cases.parquet").write_bytes(b"no parquet")
    html = render(connect_parts(tmp_path), RUN, "store")
    assert "Not in this page" in html
    assert "damaged" in html


def test_a_claim_of_another_run_is_shown_with_that_run(build, tmp_path):
    build.full_store(tmp_path)
    run = build.Builder(tmp_path, "later")
    run.case()
    run.write(build.START + datetime.timedelta(days=1))
    html = render(connect_parts(tmp_path), None, "store")
    assert f"3 seeds · run {RUN}" in html
    assert "· run " not in render(connect_parts(tmp_path), RUN, "store")


def test_the_quality_of_a_case_without_a_time_stands_in_its_row(opened):
    builder, open_store = opened
    run = builder()
    row = run.case(suite="accuracy", protocol="once")
    run.metric(row, "perplexity", 17.25, "1")
    assert "<div>perplexity 17.25</div>" in render(open_store(run), None, "store")


def test_active_parameters_have_a_column(opened):
    builder, open_store = opened
    run = builder()
    run.metric(run.case(), "active_params_per_token", 794_624.0, "")
    page = render(open_store(run), None, "store")
    assert "active params/token" in page
    assert '<td data-v="794624.0" class=number>794.6 k</td>' in page
