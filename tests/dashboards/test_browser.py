"""The page in a real browser, offline."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from moebench.dashboards.pareto_page import render_pareto
from moebench.dashboards.report import write_page, write_report
from moebench.results.pareto_axes import X_AXES, Y_AXES
from moebench.results.query import reading

CHROMIUM = os.environ.get("CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install it, or name one in $CHROMIUM"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open a page offline; at the end nothing was said on the console and nothing was asked of the network."""
    contexts, said, asked = [], [], []

    def go(path: Path, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        context.set_offline(True)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield go
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


def until(tab, expression, arg=None):
    """Wait until an expression is true; Playwright's own wait evaluates strings, which the page forbids."""
    for _ in range(200):
        if tab.evaluate(expression, arg):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"never became true: {expression}")


def column(tab, key):
    """Return the sort values of the visible rows of a column, None where nothing was measured."""
    return tab.evaluate(
        """key => {
            const table = document.getElementById("cases-table");
            const at = table.querySelector(`th[data-key="${key}"]`).cellIndex;
            return [...table.querySelectorAll("tr.case")].filter((row) => !row.hidden)
                .map((row) => row.cells[at].dataset.v ?? null);
        }""",
        key,
    )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_every_chart_is_drawn_and_the_page_does_not_scroll_sideways(visit, page, width, scheme):
    tab = visit(page, width, scheme)
    for place in tab.query_selector_all(".plot"):
        place.scroll_into_view_if_needed()
        until(tab, "place => place.dataset.drawn === 'yes'", place)
        assert place.query_selector("svg.main-svg")
    assert {"summary", "problems", "cases", "compare", "scaling", "roofline", "loads", "pareto", "claims"} <= {
        section.get_attribute("id") for section in tab.query_selector_all("section")
    }
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.title() == "moebench: 20260314-092653-a1b2c3"


def test_headers_sort_both_ways_with_what_was_not_measured_last(visit, page):
    tab = visit(page)
    header = tab.locator('th[data-key="median"]')
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    up = column(tab, "median")
    known = [float(value) for value in up if value is not None]
    assert len(known) > 100
    assert known == sorted(known)
    assert set(up[len(known) :]) == {None}
    header.locator("button").focus()
    tab.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    down = column(tab, "median")
    assert [float(value) for value in down[: len(known)]] == known[::-1]
    assert set(down[len(known) :]) == {None}
    tab.locator('th[data-key="backend"] button').click()
    assert header.get_attribute("aria-sort") == "none"
    names = column(tab, "backend")
    assert names.index("batched") < names.index("compiled") < names.index("triton")


def test_search_and_drop_downs_filter_together(visit, page):
    tab = visit(page)
    total = len(column(tab, "backend"))
    tab.select_option('select[data-filter="backend"]', "grouped")
    assert set(column(tab, "backend")) == {"grouped"}
    tab.fill("#search", "int4 teal")
    found = column(tab, "backend")
    assert 0 < len(found) < total
    assert set(column(tab, "quantization")) == {"rtn_int4"}
    assert set(column(tab, "sparsity")) == {"teal"}
    assert tab.text_content("#shown") == f"{len(found)} of {total} cases"
    tab.click("#filters button[type=reset]")
    until(tab, "total => document.getElementById('shown').textContent === `${total} of ${total} cases`", total)


def test_a_row_opens_to_its_samples_and_closes(visit, page):
    tab = visit(page)
    tab.locator('th[data-key="median"] button').click()
    button = tab.locator("tr.case td.open button").first
    button.focus()
    tab.keyboard.press("Enter")
    until(tab, "() => document.querySelectorAll('tr.detail .plot[data-drawn=yes]').length === 2")
    assert button.get_attribute("aria-expanded") == "true"
    points = tab.evaluate("document.querySelector('tr.detail .plot').data.map((trace) => trace.x.length)")
    assert points == [180, 180, 180, 180]
    assert "Parameters" in tab.text_content("tr.detail")
    button.click()
    assert tab.query_selector("tr.detail") is None
    assert button.get_attribute("aria-expanded") == "false"


def test_the_group_selector_redraws_and_copies_what_is_shown(visit, page):
    tab = visit(page)
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    place = tab.locator("#plot-compare")
    place.scroll_into_view_if_needed()
    until(tab, "() => document.getElementById('plot-compare').dataset.drawn === 'yes'")
    before = tab.evaluate("document.getElementById('plot-compare').data[0].x")
    tab.select_option('select[data-chart="compare"]', "1")
    changed = "before => JSON.stringify(document.getElementById('plot-compare').data[0].x) !== JSON.stringify(before)"
    until(tab, changed, before)
    tab.click('button[data-csv="compare"]')
    until(tab, "() => document.querySelector('button[data-csv=compare]').textContent === 'Copied'")
    copied = tab.evaluate("navigator.clipboard.readText()")
    shown = tab.evaluate("JSON.parse(document.getElementById('data-csv').textContent).compare[1]")
    assert copied.replace("\r\n", "\n") == shown
    assert copied.startswith("case_key,case,backend")


def test_a_page_of_five_hundred_cases_sorts_and_draws(visit, build, tmp_path):
    many = build.full_store(tmp_path / "store", extra=380)
    tab = visit(write_report(many, tmp_path / "many.html"))
    assert len(column(tab, "median")) > 500
    assert len(tab.query_selector_all(".plot[data-drawn=yes]")) < len(tab.query_selector_all(".plot"))
    tab.locator('th[data-key="median"] button').click()
    known = [float(value) for value in column(tab, "median") if value is not None]
    assert known == sorted(known)


def test_an_empty_store_opens_without_an_error(visit, tmp_path):
    tab = visit(write_report(tmp_path / "nothing", tmp_path / "empty.html"))
    assert "There is no run" in tab.text_content("main")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_the_page_of_a_gate_draws_its_pairs_and_runs_nothing_of_its_names(visit, build, tmp_path, width, scheme):
    path = write_report(build.gate_store(tmp_path / "store"), tmp_path / "gate.html")
    tab = visit(path, width, scheme)
    place = tab.locator("#plot-gate-pairs")
    place.scroll_into_view_if_needed()
    until(tab, "() => document.getElementById('plot-gate-pairs').dataset.drawn === 'yes'")
    traces = tab.evaluate("document.getElementById('plot-gate-pairs').data.map((one) => [one.name, one.x.length])")
    assert [length for name, length in traces if name.endswith("by pair")] == [20, 20]
    assert {name for name, _ in traces} >= {"regressed", "improved", "equivalent", "inconclusive"}
    assert tab.locator("#gate-table tbody tr").count() == 6
    assert "<script>document.title=3</script>" in tab.text_content("#gate-table")
    assert tab.title() == "moebench: 20260315-101010-9a7e00"
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_the_page_of_the_fronts_draws_every_method_offline(visit, build, tmp_path, width, scheme):
    store = build.pareto_store(tmp_path / "store")
    with reading(store) as connection:
        page = render_pareto(connection, X_AXES["tpot"], Y_AXES["ppl"], str(store))
    tab = visit(write_page(page, tmp_path / "pareto.html"), width, scheme)
    for place in tab.query_selector_all(".plot"):
        place.scroll_into_view_if_needed()
        until(tab, "place => place.dataset.drawn === 'yes'", place)
        assert place.query_selector("svg.main-svg")
    assert tab.query_selector("#plot-pareto-tpot")
    marks = "() => document.querySelectorAll('#plot-pareto-tpot .scatterlayer .points path').length"
    assert tab.evaluate(marks) >= 144
    for bars in ("xerror", "yerror"):
        assert tab.evaluate(f"() => document.querySelectorAll('#plot-pareto-tpot .{bars}').length") >= 144
    assert tab.locator("#cap-table tbody tr").count() == 144
    assert tab.title() == "moebench: Pareto fronts"
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_what_sparsity_buys_is_drawn_in_two_panels_and_told(visit, build, tmp_path, width, scheme):
    store = build.saving_run(build.Builder(tmp_path / "store")).write()
    tab = visit(write_report(store, tmp_path / "saving.html"), width, scheme)
    place = tab.locator("#plot-saving")
    place.scroll_into_view_if_needed()
    until(tab, "() => document.getElementById('plot-saving').dataset.drawn === 'yes'")
    panels = tab.evaluate("document.getElementById('plot-saving').data.map((one) => one.xaxis)")
    assert (panels.count("x"), panels.count("x2")) == (6, 3)
    assert tab.locator("#plot-saving .yerror").count() == 18
    assert "break-even density 0.52 against dense grouped, the fastest" in tab.text_content("#saving figcaption")
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
