"""A run of suite ``offload`` from the command line to the rows: measured, predicted, and of a damaged file."""

from __future__ import annotations

import json

import pytest

from moebench.bench import offload_results
from moebench.bench.offload_doc import offload_page
from moebench.bench.offload_results import Figures
from moebench.contracts import MoebenchError

STEPS = 5
SETTINGS = (
    "suite=offload",
    "model=tiny",
    f"suite.steps={STEPS}",
    "suite.prompt=3",
    "engine.processes=1",
    "engine.seconds=0.02",
    "engine.min_calls=8",
    "params.backend.offload.policy=[lru,belady]",
    "--quiet",
)


@pytest.fixture(scope="module")
def run(engine, tmp_path_factory):
    """Return the store of a run, and the cache that it left."""
    store, cache = tmp_path_factory.mktemp("offload"), tmp_path_factory.mktemp("offload_cache")
    done = engine(store, "run", *SETTINGS, MOEBENCH_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    return store, cache


def test_measured_rows_have_whole_turns_of_samples(run, query):
    rows = query(run[0], "SELECT backend, status, evidence, error, ns, turn FROM timings WHERE clock = 'wall'")
    assert sorted(backend for backend, *_ in rows) == ["eager", "offload", "offload"]
    for _, status, evidence, error, ns, turn in rows:
        assert (status, evidence, error) == ("ok", "measured-cpu", 0.0)
        assert len(ns) >= 8
        assert [turn.count(number) for number in set(turn)] == [STEPS] * len(set(turn))


def test_predicted_rows_stand_beside_them_without_a_time(run, query):
    sql = "SELECT params->>'$.backend.policy', status, evidence FROM cases WHERE evidence = 'model' ORDER BY ALL"
    assert query(run[0], sql) == [("belady", "ok", "model"), ("lru", "ok", "model")]
    assert query(run[0], "SELECT count(*) FROM timings WHERE evidence = 'model'") == [(0,)]
    names = dict(query(run[0], "SELECT name, list(DISTINCT evidence) FROM metrics WHERE value IS NOT NULL GROUP BY 1"))
    assert names["step_time"] == names["prediction_error"] == names["stall_per_step"] == ["measured-cpu"]
    assert sorted(names["predicted_step_time"]) == sorted(names["hit_rate"]) == ["measured-cpu", "model"]


def test_measured_means_are_those_of_the_samples(run, query):
    """Both clocks are read around the same calls, the engine's outside."""
    sql = """SELECT t.mean, m.value FROM metrics m JOIN (SELECT case_key, list_avg(ns) AS mean FROM timings
             WHERE clock = 'wall') t USING (case_key) WHERE m.name = 'step_time'"""
    for engine_mean, own in query(run[0], sql):
        assert 0.5 * engine_mean < own <= engine_mean


def test_the_page_is_made_of_the_rows_of_the_experiment_alone(run, monkeypatch):
    with pytest.raises(MoebenchError, match="no run of experiment offloading"):
        offload_results.offload_results(run[0])
    monkeypatch.setattr(offload_results, "CONFIG", "SELECT 'offloading' AS experiment, $run_id AS run_id")
    results = json.loads(json.dumps(offload_results.offload_results(run[0])))
    figures = Figures(results["rows"])
    (lru,), (model,) = figures.of({}, 0.25), figures.of({}, 0.25, predicted=True)
    (eager,) = figures.of(None, 1.0)
    assert (lru["status"], eager["backend"], results["runs"]["0"]["steps"]) == ("ok", "eager", STEPS)
    assert "step_time" in lru["metrics"]
    assert (model["p50_ns"], "step_time" in model["metrics"]) == (None, False)
    page = offload_page(results)
    assert "| least recently used" in page
    assert "- Seed 0: run " in page


def test_a_damaged_file_gives_a_status_and_no_number(run, engine, query, tmp_path):
    _, cache = run
    (path,) = (cache / "offload").glob("*.safetensors")
    spoilt = bytearray(path.read_bytes())
    for place in range(8 + int.from_bytes(spoilt[:8], "little"), len(spoilt), 512):  # behind the header
        spoilt[place] ^= 1
    path.write_bytes(spoilt)
    done = engine(
        tmp_path, "run", *SETTINGS, "axes.backend=offload", "suite.predicted=false", MOEBENCH_CACHE=str(cache)
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for status, reason in query(tmp_path, "SELECT status, reason FROM cases"):
        assert status == "failed"
        assert "do not match their checksum; write the file anew" in json.dumps(reason)
    assert query(tmp_path, "SELECT (SELECT count(ns) FROM timings), (SELECT count(value) FROM metrics)") == [(0, 0)]
