from hypothesis import given
from hypothesis import strategies as st

from moebench.dashboards.text import clean, fit, summary_table, width

GOLDEN = [
    "case       status           median  note",
    "-" * 45,
    "throughput · smollm2 · layer 5 · recorded · T=256 · float32 · warm",
    "  eager    ok      50.00 µs ± 0.10",
    "  batched  ok         70.00 µs ± ?",
    "  grouped  ok      2.000 ms ± 0.10  contended",
    "what did not run, and why",
    "  skipped: triton",
    "    triton needs a GPU, and none is visible here.",
    f"  crashed: {'x' * 60}",
    "    killed by SIGSEGV �[31mred, and so on and so on and so on and so on and so on and so on and so",
    "    on and so on and so on",
    "",
    "3 ok, 1 skipped, 1 crashed, 1 flagged",
]


def timed(run, row, ns, lo, hi):
    run.add(
        "timings", case_key=row["case_key"], process=0, clock="wall", sitting="s", mode="interleaved",
        ns=[ns] * 9, turn=[0] * 9, n=9, min_ns=ns, median_ns=float(ns), median_lo_ns=lo, median_hi_ns=hi,
    )  # fmt: skip


def test_the_summary_is_what_a_terminal_shows(opened):
    builder, open_store = opened
    run = builder()
    timed(run, run.case(), 50_000, 49_900.0, 50_050.0)
    timed(run, run.case(backend="grouped", flags=["contended"]), 2_000_000, 1_900_000.0, 2_000_500.0)
    timed(run, run.case(backend="batched"), 70_000, None, None)
    run.case(backend="triton", status="skipped", reason="triton needs a GPU, and none is visible here.")
    run.case(backend="x" * 60, status="crashed", reason="killed by SIGSEGV\n\x1b[31mred, " + "and so on " * 9)
    assert summary_table(open_store(run), run.run_id).splitlines() == GOLDEN


def test_quality_is_shown_where_there_is_no_time(opened):
    builder, open_store = opened
    run = builder()
    row = run.case(suite="accuracy", protocol="once", evidence="simulated")
    run.metric(row, "perplexity", 17.25, "")
    assert "simulated, perplexity 17.25" in summary_table(open_store(run), run.run_id)


def test_active_parameters_stand_beside_times_where_routings_do(opened):
    builder, open_store = opened
    run = builder()
    for routing, tokens in (("topk", 16), ("moepp", 16), ("topk", 32)):
        row = run.case(routing=routing, tokens=tokens)
        timed(run, row, 50_000, 49_900.0, 50_050.0)
        run.metric(row, "active_params_per_token", 794_624.0, "")
    lines = summary_table(open_store(run), run.run_id).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("50.00 µs ± 0.10  794.6 k params active")] == [
        "moepp",
        "topk",
    ]
    assert sum("active" in line for line in lines) == 2


def test_a_group_says_which_variant_of_the_model_it_is(opened):
    builder, open_store = opened
    run = builder()
    for size in (256, 512):
        run.case(params={"model": {"width": size}}, group_key=f"g{size}", case_key=f"c{size}")
    titles = [line for line in summary_table(open_store(run), run.run_id).splitlines() if line.startswith("throughput")]
    assert [title.split(" · ")[1] for title in titles] == ["smollm2(width=256)", "smollm2(width=512)"]


def test_a_run_without_cases_says_so(opened):
    builder, open_store = opened
    run = builder()
    assert summary_table(open_store(run), "none\x1b[2J") == "run none�[2J has no cases"


def test_no_line_is_wider_than_a_hundred_columns(connection):
    lines = summary_table(connection, "20260314-092653-a1b2c3").splitlines()
    assert len(lines) > 141
    assert max(map(width, lines)) <= 100


@given(st.text(), st.integers(1, 40))
def test_what_is_fitted_fits_and_drives_no_terminal(text, columns):
    short = fit(clean(text), columns)
    assert width(short) <= columns
    assert not set(map(ord, short)) & {*range(32), *range(127, 160)}
