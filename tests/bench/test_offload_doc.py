"""The page of offloading: its tables by hand, and that it names what there is and nothing else."""

from __future__ import annotations

import re

import pytest

from moebench.backends.offload.names import (
    EXECUTIONS,
    POLICIES,
    PREFETCHERS,
    make_execution,
    make_policy,
    make_prefetcher,
)
from moebench.backends.plugins import Offload
from moebench.bench.config import load
from moebench.bench.offload_doc import METRICS, PAPERS, offload_page
from moebench.bench.offload_results import COMMAND, EXPERIMENT, SYSTEMS, Figures, predictions, table, told
from moebench.bench.plan import make_plan
from moebench.contracts import Registry, plain

READ_ME = dict(SYSTEMS)["Read-ME"]


def row(
    seed, setting=None, backend="offload", evidence="measured-cpu", status="ok", flags=(), capacity=0.25, **metrics
):
    return {
        **{"seed": seed, "backend": backend, "evidence": evidence, "status": status, "flags": list(flags)},
        **{"setting": dict(setting or {}), "capacity": capacity, "reason": "the disk is full."},
        **{"p50_ns": 2e6, "p95_ns": None, "metrics": metrics},
    }


def cells(lines):
    """Return the cells of the rows of a table by its heads."""
    head, _, *rows = [[cell.strip() for cell in line.strip().split("|")[1:-1]] for line in lines]
    return [dict(zip(head, one, strict=True)) for one in rows]


ROWS = [
    *(row(seed, stall_per_step=100.0, hit_rate=0.5, step_time=2e6) for seed in (1, 2, 3)),
    *(
        row(seed, READ_ME, stall_per_step=stall, hit_rate=0.75, step_time=1e6)
        for seed, stall in ((1, 20.0), (2, 30.0), (3, 40.0))
    ),
    *(row(seed, READ_ME, evidence="model", predicted_step_time=1.1e6) for seed in (1, 2, 3)),
    row(1, {"policy": "eam", "prefetch": "eam"}, status="failed", stall_per_step=1.0),
]


def test_means_have_intervals_from_three_seeds_on():
    assert told({}, str) == "–"  # noqa: RUF001 - not measured
    assert told({1: 2.0, 2: 4.0}, str) == "3.0"
    assert re.fullmatch(r"2\.0 \[-0\.4.*, 4\.4.*\]", told({1: 1.0, 2: 2.0, 3: 3.0}, str))


def test_hidden_stall_is_that_of_the_same_seed():
    entries = [("Read-ME", READ_ME, 0.25), ("LRU", {}, 0.25), ("MoE-Infinity", dict(SYSTEMS)["MoE-Infinity"], 0.25)]
    read_me, lru, failed = cells(table(Figures(ROWS), entries))
    assert read_me["stall hidden"].startswith("70 % [45 %, 95 %]")
    assert lru["stall hidden"] == "0 % [0 %, 0 %]"
    assert read_me["hit rate"] == "75 % [75 %, 75 %]"
    assert read_me["TPOT p50, ms"] == "2.0 [2.0, 2.0]"
    assert read_me["TPOT p95, ms"] == read_me["KL, nat"] == "–"  # noqa: RUF001
    assert failed[""] == "MoE-Infinity; **failed** (seed 1): the disk is full."
    assert failed["stall hidden"] == failed["hit rate"] == "–"  # noqa: RUF001 - no number of what failed


def test_a_capacity_without_a_baseline_hides_nothing_that_is_known():
    (found,) = cells(table(Figures(ROWS), [("Read-ME", READ_ME, 0.5)]))
    assert found["stall hidden"] == found["hit rate"] == "–"  # noqa: RUF001


def test_doubts_stand_beside_figures():
    (found,) = cells(table(Figures([row(1, hit_rate=0.5, flags=["contended"])]), [("LRU", {}, 0.25)]))
    assert found[""] == "LRU (contended)"


def test_predictions_stand_beside_what_was_measured():
    (found,) = cells(predictions(Figures(ROWS), [("Read-ME", READ_ME, 0.25)]))
    assert found["off by"] == "10 % [10 %, 10 %]"
    assert found["predicted, ms a step (`model`)"] == "1.1 [1.1, 1.1]"


def test_the_experiment_has_every_system_of_the_page_in_one_sitting(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))
    assert COMMAND.split()[2] == f"experiment={EXPERIMENT}"
    registry = Registry.load()
    plan = make_plan(load([f"experiment={EXPERIMENT}", "model=tiny"], registry, 2.0**32, 2.0**20), registry, 2.0**32)
    assert not plan.refused
    measured, predicted = plan.groups
    assert [case.backend.name for case in measured.cases].count("eager") == 1
    defaults = plain(Offload())
    planned = {
        tuple(sorted((name, value) for name, value in case.backend.params.items() if value != defaults[name]))
        for case in measured.cases
        if case.backend.name == "offload"
    }
    assert {tuple(sorted(setting.items())) for _, setting in SYSTEMS} <= planned
    assert {case.case_key for case in predicted.cases}.isdisjoint(case.case_key for case in measured.cases)
    assert len(predicted.cases) == len(measured.cases) - 1


def test_the_page_names_what_there_is():
    page = offload_page(None)
    assert "Not measured yet." in page
    for names in (POLICIES, PREFETCHERS, EXECUTIONS):
        assert all(f"| `{name}` | " in page for name in names)
    assert PAPERS["policy"].keys() <= POLICIES.keys()
    assert PAPERS["prefetch"].keys() <= PREFETCHERS.keys()
    assert PAPERS["execution"].keys() <= EXECUTIONS.keys()
    for _, setting in SYSTEMS:
        make_policy(setting.get("policy", "lru"))
        make_prefetcher(setting.get("prefetch", "none"))
        make_execution(setting.get("execution", "fetch"))


@pytest.fixture(scope="module")
def told_metrics():
    return {name for names in METRICS for name in names.split(", ")}


def test_every_metric_of_the_suite_is_told(told_metrics):
    """Those that the sources name; a new one must be explained."""
    from importlib.resources import files

    sources = [path.read_text() for path in files("moebench.suites.offload").iterdir() if path.name.endswith(".py")]
    named = set(re.findall(r'Metric\("(\w+)"', "".join(sources))) | {"switch_step_time", "steady_step_time"}
    assert named == told_metrics
