"""Every timed suite gives ok rows through real processes."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def store(engine, tmp_path_factory):
    store = tmp_path_factory.mktemp("suites")
    few = ("axes.backend=[eager,grouped]", "engine.processes=1", "engine.seconds=0.05", "engine.min_calls=20")
    for settings in (
        ("suite=latency", "model=tiny", "axes.tokens=[1,32]", "axes.residency=warm", *few),
        ("suite=training", "model=tiny", "axes.tokens=16", *few),
        ("suite=throughput", "model=tiny", "axes.tokens=32", "axes.sparsity=teal", "axes.quantization=int8", *few),
        (
            "suite=roofline",
            "suite.size=64",
            "suite.levels={L2: 65536}",
            "engine.processes=1",
            "suite.dram_factor=0.001",
        ),
    ):
        result = engine(store, "run", *settings, "--quiet")
        assert result.returncode == 0, result.stderr
    return store


@pytest.mark.parametrize("suite", ["latency", "training", "throughput", "roofline"])
def test_a_suite_gives_ok_rows_with_samples_and_intervals(suite, store, query):
    rows = query(store, f"SELECT status, n, median_ns, median_lo_ns, median_hi_ns FROM timings WHERE suite = '{suite}'")
    assert rows
    for status, n, median, lo, hi in rows:
        assert status == "ok"
        assert n >= 20
        assert lo <= median <= hi


def test_percentiles_are_null_where_n_does_not_bear_them(store, query):
    rows = query(store, "SELECT n, p90_ns, p99_ns FROM timings WHERE suite = 'latency' AND clock = 'wall'")
    for n, p90, p99 in rows:
        assert (p90 is not None) == (n >= 36)
        assert (p99 is not None) == (n >= 368)


def test_training_tells_its_bytes_and_roofline_its_rates(store, query):
    names = {name for (name,) in query(store, "SELECT DISTINCT name FROM metrics")}
    assert {"saved_tensor_bytes", "peak_step_bytes", "peak_flops", "bandwidth_L2", "density_hidden"} <= names
