"""What sparsity buys: curves, break-even densities in words, the chart, and what may not be judged."""

import textwrap

import pytest

from moebench.dashboards import data
from moebench.dashboards.page import make_charts, render
from moebench.dashboards.query import ask
from moebench.dashboards.ratios import Ratio, paired_ratio, turn_minima
from moebench.dashboards.saving_data import break_even, savings
from moebench.dashboards.saving_text import saving_lines
from moebench.dashboards.text import WIDTH, summary_table, width

GOLDEN = """\
what skipping buys
  column_skip · cats (skip): break-even density 0.68 against dense column_skip: 0.970 of its time
  [0.968, 0.971] there; break-even density 0.45 against dense grouped, the fastest: 0.953 of its
  time [0.952, 0.956] there.
  column_skip · teal (skip): break-even density 0.76 against dense column_skip: 0.900 of its time
  [0.898, 0.901] there; break-even density 0.52 against dense grouped, the fastest: 0.753 of its
  time [0.753, 0.753] there.
"""


def found(connection, run_id):
    cases, _ = data.load_cases(connection, run_id)
    turns = turn_minima(ask(connection, data.MINIMA, run_id=run_id))
    return savings(cases, lambda base, case: paired_ratio(turns.get(base.key, {}), turns.get(case.key, {})))


@pytest.fixture
def run(build, opened):
    return build.saving_run(opened[0]())


@pytest.fixture
def open_run(opened, run):
    return opened[1](run), run.run_id


def test_the_break_even_is_told_in_words(open_run):
    lines = summary_table(*open_run).splitlines()
    at = lines.index("what skipping buys")
    assert "\n".join(lines[at : at + 7]) == GOLDEN.rstrip("\n")
    assert max(map(width, lines)) <= WIDTH


def test_curves_are_of_one_method_on_one_backend_by_rising_density(open_run):
    (one,) = found(*open_run)
    assert [(curve.backend, curve.executed, len(curve.points)) for curve in one.curves] == [
        ("column_skip", "skip", 3),
        ("column_skip", "skip", 3),
        ("eager", "mask", 3),
    ]
    for curve in one.curves:
        densities = [point.density for point in curve.points]
        assert densities == sorted(densities)
        assert curve.own.axes["backend"] == curve.backend
        assert curve.best.axes["backend"] == "grouped"
        for point in curve.points:
            saved = 1 / point.density if curve.executed == "skip" else 1.0
            assert (point.bytes_saving, point.flops_saving) == (pytest.approx(saved), pytest.approx(saved))


def test_a_mask_that_is_slower_everywhere_has_no_break_even(open_run):
    (one,) = found(*open_run)
    (mask,) = [curve for curve in one.curves if curve.executed == "mask"]
    assert break_even(mask, "best").density is None
    words = " ".join(saving_lines([one]))
    assert "eager · teal (mask): break-even density 0.22 against dense eager" in words
    assert "break-even density none against dense grouped, the fastest: slower, or not known to be as fast" in words


def test_a_density_above_one_that_is_slower_does_not_count_however_fast(build, opened):
    """A lucky point beyond a slow one is no break-even: all below it must hold."""
    builder, open_store = opened
    run = builder()
    build.decoded(run, 100.0, backend="column_skip")
    build.skipping(run, ((0.8, 0.2, 0.5), (0.5, 0.5, 1.2), (0.25, 0.75, 0.9)), "teal")
    (one,) = found(open_store(run), run.run_id)
    assert break_even(one.curves[0], "own").density == 0.2
    assert saving_lines([one])[0].endswith("no dense backend is faster.")


def test_what_carries_a_flag_or_was_not_timed_together_is_not_judged(build, opened):
    builder, open_store = opened
    run = builder()
    build.decoded(run, 100.0, backend="column_skip")
    build.skipping(run, build.TEAL, "teal", flags=["contended"])
    build.skipping(run, build.TEAL, "cats")
    (one,) = found(open_store(run), run.run_id)
    cats, teal = sorted(one.curves, key=lambda curve: curve.label)
    assert break_even(teal, "own").density is None
    assert "not judged against dense column_skip, since every density carries a flag" in saving_lines([one])[1]
    assert break_even(cats, "own").density == 0.76
    apart = [point.__class__(**{**vars(point), "own": None}) for point in cats.points]
    assert break_even(cats.__class__(**{**vars(cats), "points": tuple(apart)}), "own").density is None


def test_an_interval_that_reaches_beyond_one_is_not_known_to_be_as_fast(build, opened):
    builder, open_store = opened
    run = builder()
    build.decoded(run, 100.0, backend="column_skip")
    build.skipping(run, build.TEAL, "teal")
    (one,) = found(open_store(run), run.run_id)
    curve = one.curves[0]
    for hi, holds in ((1.0, True), (1.01, False), (None, False)):
        ratio = Ratio(0.9, None if hi is None else 0.8, hi, 9)
        points = tuple(point.__class__(**{**vars(point), "own": ratio}) for point in curve.points)
        changed = curve.__class__(**{**vars(curve), "points": points})
        assert (break_even(changed, "own").density is not None) == holds


def test_a_flagged_dense_case_judges_nothing_and_is_not_the_fastest(build, opened):
    builder, open_store = opened
    run = builder()
    build.decoded(run, 100.0, backend="column_skip", flags=["not_steady"])
    build.decoded(run, 120.0, backend="grouped")
    build.skipping(run, build.TEAL, "teal")
    (one,) = found(open_store(run), run.run_id)
    assert one.curves[0].best.axes["backend"] == "grouped"
    (line,) = saving_lines([one])
    assert "not judged against dense column_skip, which carries a flag; break-even density 0.76" in line


def test_without_a_dense_case_of_the_backend_there_is_no_curve(build, opened):
    builder, open_store = opened
    run = builder()
    build.decoded(run, 100.0, backend="eager")
    build.skipping(run, build.TEAL, "teal")
    assert found(open_store(run), run.run_id) == []


def test_the_chart_has_both_panels_predictions_as_dashes_and_rows_for_its_csv(open_run):
    connection, run_id = open_run
    cases, answer = data.load_cases(connection, run_id)
    chart = next(one for one in make_charts(connection, run_id, cases, answer) if one.key == "saving")
    (variant,) = chart.variants
    traces = variant.figure.data
    assert len(traces) == 9
    predicted = [trace for trace in traces if trace.marker.symbol == "line-ew-open"]
    assert [list(trace.y) for trace in predicted if "eager" in trace.name] == [[1.0, 1.0, 1.0]]
    assert len(variant.rows) == 9
    row = next(row for row in variant.rows if row["curve"] == "column_skip · teal" and row["weight_density"] == 0.22)
    assert row["own_ratio"] == pytest.approx(0.31, rel=0.01)
    assert row["predicted_by_bytes"] == pytest.approx(1 / 0.22)
    assert (row["own_break_even"], row["best_break_even"], row["best_backend"]) == (0.76, 0.52, "grouped")
    assert "break-even density 0.52 against dense grouped, the fastest" in variant.note


def test_the_page_says_it_in_words_and_an_empty_run_why_not(open_run, connection):
    page = render(*open_run, "store")
    assert 'id="saving"' in page
    assert "break-even density 0.76 against dense column_skip" in page
    quiet = render(connection, "20260314-092653-a1b2c3", "store")
    assert "so nothing was saved" in quiet


def test_a_run_without_skipping_says_nothing_of_it(connection):
    assert "what skipping buys" not in summary_table(connection, "20260314-092653-a1b2c3")


def test_sentences_fit_a_terminal(open_run):
    for line in saving_lines(found(*open_run)):
        assert all(width(part) <= WIDTH - 2 for part in textwrap.wrap(line, WIDTH - 2))
