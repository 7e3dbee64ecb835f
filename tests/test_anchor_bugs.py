"""Bugs that other harnesses have had, where no other test would see them here; docs/anchor-bugs.md has all twenty."""

from __future__ import annotations

import ast
import base64
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moebench
from moebench.bench.config import EngineConfig, load
from moebench.bench.plan import make_plan
from moebench.bench.rows import case_row, measured_rows
from moebench.bench.sampling import Member, Phases, Sitting
from moebench.bench.worker import _Held
from moebench.contracts import Case, Check, Choice, Evidence, Registry, Status, canonical_json
from moebench.dashboards.query import parse_json
from moebench.dashboards.report import write_report
from moebench.results.database import DATABASE, connect_parts, ingest, open_database
from moebench.results.gate import Exit, GateResult, Judged, Noise, Skipped
from moebench.results.parts import write_part
from moebench.results.rows import arrow_table
from moebench.results.schema import TABLES
from moebench.results.verdict import Verdict
from moebench.suites.layer import LayerTrial

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(moebench.__file__).resolve().parent
PAGE = ROOT / "docs" / "anchor-bugs.md"
REGISTRY = Registry.load()


def make_case(**changes):
    """A Case of the smallest model on eager, with some fields replaced."""
    named = {axis: Choice("none") for axis in ("structure", "quantization", "sparsity")}
    values = {
        **{"suite": "selftest", "suite_version": "1", "protocol": "timed", "layers": (2,), "tokens": 32},
        **{"model": Choice("tiny"), "routing": Choice("topk"), "backend": Choice("eager"), **named},
        **{"traffic": Choice("gaussian"), "dtype": "float32", "pass_": "forward", "boundary": "topk"},
        **{"threads": 1, "device": "cpu", "residency": "cold", "evidence": Evidence.MEASURED_CPU},
        **{"seed": 0, "weights_sha256": "0" * 64},
    }
    return Case(**{**values, **changes})


def measured(wall, **fields):
    """A measured member with these wall times in ns, all in one turn."""
    member = Member(make_case(), wall_ns=list(wall), cpu_ns=list(wall), turns=[0] * len(wall), **fields)
    member.facts = {"metrics": [], "series": [], "items": [], "notes": {}}
    return member


def planned(*settings):
    (case,) = make_plan(load(settings, REGISTRY, 2.0**32, 2.0**20), REGISTRY, 2.0**32).cases
    return case


@pytest.fixture
def layer_trial(cache, monkeypatch):
    """Return a function that makes a trial of the smallest model."""
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))
    return lambda *settings: LayerTrial(planned("suite=throughput", "model=tiny", *settings), REGISTRY)


# ---------------------------------------------------------------------------------------------------------------------
# 1: samples of an earlier pass, or the gap between passes, counted again


class Clock:
    """Stands for module ``time``; it moves only when it is told to."""

    def __init__(self):
        self.now = 0
        self.perf_counter_ns = self.process_time_ns = lambda: self.now
        self.perf_counter = lambda: self.now / 1e9


class Paced:
    """A trial whose calls take 7 ns, and everything around them a second."""

    steps = 3

    def __init__(self, clock):
        self.clock = clock

    def begin_turn(self):
        self.clock.now += 10**9

    def run(self, step):
        self.clock.now += 7
        return object()

    def device_ns(self):
        return 5

    def verify(self, step, output):
        self.clock.now += 10**9
        return Check(True)


def test_a_turn_tells_its_own_calls_and_nothing_between_them(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("moebench.bench.worker.time", clock)
    held = _Held(Paced(clock), make_case())
    for turn in range(4):
        reply = held.turn(6 * turn, 6)
        assert reply["ns"] == reply["cpu_ns"] == [7] * 6
        assert reply["device_ns"] == [5] * 6
        held.verify()


# ---------------------------------------------------------------------------------------------------------------------
# 5: a slow mode taken for outliers and dropped

FAST_NS, SLOW_NS = 10_000_000, 20_000_000
TWO_MODES = ([FAST_NS] * 50 + [SLOW_NS] * 12) * 8


class Modal:
    """A worker that answers with the two modes."""

    def request(self, op, timeout, **arguments):
        if op == "verify":
            return {"check": {"ok": True, "error": 0.0}}
        times = {"ns": TWO_MODES, "cpu_ns": TWO_MODES, "device_ns": TWO_MODES}
        return {**times, "switches": 0, "warm_s": 0.0, "ready_s": 0.0}


def test_two_modes_stay_two_modes_from_the_worker_to_the_page(tmp_path):
    member = measured([], calls=len(TWO_MODES))
    ring = SimpleNamespace(worker=lambda environment: Modal())
    Sitting(ring, EngineConfig(), 0, Phases(), lambda text: None).sampled_turn(member, 0)
    tables = measured_rows("r", [member], [], ["s"])
    wall = tables["timings"][0]
    assert (wall["ns"], member.device_ns) == (TWO_MODES, TWO_MODES)
    assert (wall["n"], wall["min_ns"], wall["median_ns"], wall["p90_ns"]) == (496, FAST_NS, FAST_NS, SLOW_NS)

    write_part(tmp_path / "store" / "runs" / "r", "part", tables)
    (tmp_path / "store" / "runs" / "r" / "run.json").write_text('{"run_id": "r", "status": "finished"}')
    html = write_report(tmp_path / "store", tmp_path / "report.html").read_text()
    details = json.loads(re.search(r'<script[^>]*id="data-details"[^>]*>(.*?)</script>', html, re.DOTALL)[1])
    shown = json.loads(zlib.decompress(base64.b64decode(details[member.case.case_key])))["timings"]
    assert [row["ns"] for row in shown] == [TWO_MODES] * 2


# ---------------------------------------------------------------------------------------------------------------------
# 10, 14: nothing measured is no zero; a cost counted once is in no sample, and every number keeps its name and unit


def metrics_of(**fields):
    rows = measured_rows("r", [measured([1000] * 30, **fields)], [], ["s"])
    return {row["name"]: (row["value"], row["unit"]) for row in rows["metrics"]}, rows["timings"]


@pytest.mark.parametrize("table", TABLES)
def test_what_nobody_wrote_is_null_in_every_column(table):
    rows = [{}, dict.fromkeys(TABLES[table])]
    assert arrow_table(table, rows).to_pylist() == [dict.fromkeys(TABLES[table])] * 2


def test_a_cost_that_nobody_told_is_absent_and_not_zero():
    assert metrics_of(cost={"flops": 1.0})[0] == {"flops": (1.0, "flop"), "prepare_seconds": (0.0, "s")}


def test_what_is_paid_once_is_in_no_sample_and_costs_keep_their_names_and_units():
    cost = {"flops": 2.0, "bytes": 3.0, "footprint": 5.0, "distinct_experts": 7, "assignments": 11}
    metrics, timings = metrics_of(cost=cost, seconds=100.0, peak_rss=13)
    assert metrics == {
        **{"flops": (2.0, "flop"), "bytes": (3.0, "byte"), "footprint": (5.0, "byte")},
        **{"distinct_experts": (7, "1"), "assignments": (11, "1")},
        **{"prepare_seconds": (100.0, "s"), "worker_peak_rss": (13, "byte")},
    }
    assert {row["mean_ns"] for row in timings} == {1000.0}


@pytest.mark.parametrize(("per", "expected"), [("flops", (2e9, "flop/s")), ("bytes", (3e9, "byte/s"))])
def test_a_rate_is_of_what_it_names(per, expected):
    member = measured([1000], cost={"flops": 2e3, "bytes": 3e3})
    member.facts["notes"] = {"rate": "probe", "per": per}
    rows = measured_rows("r", [member], [], ["s"])["metrics"]
    assert [(row["value"], row["unit"]) for row in rows if row["name"] == "probe"] == [expected]


# ---------------------------------------------------------------------------------------------------------------------
# 11, 19: checks that -O strips, and code that results bring along

UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
UNSAFE_ATTRIBUTES = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load")}


def sources():
    """Yield (path, tree) of every module of the package; tests and scripts are no part of it."""
    folders = sorted(path.parent for path in PACKAGE.glob("[a-z]*/__init__.py"))
    for path in [*PACKAGE.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def unsafe(node):
    """Tell whether a node runs or unpickles what it is given."""
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in UNSAFE_MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        return (node.module or "").split(".")[0] in UNSAFE_MODULES and names != {"UnpicklingError"}
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            return node.func.id in UNSAFE_CALLS
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            tensors_alone = any(
                word.arg == "weights_only" and getattr(word.value, "value", False) is True for word in node.keywords
            )
            return (node.func.value.id, node.func.attr) in UNSAFE_ATTRIBUTES and not tensors_alone
    return isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True) is True


def test_nothing_depends_on_assert_and_nothing_is_evaluated_or_unpickled():
    found = [
        f"{path}:{getattr(node, 'lineno', 0)}"
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) or unsafe(node)
    ]
    assert found == []
    assert len(list(sources())) > 80


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import pickle", True),
        ("from pickle import loads", True),
        ("value = eval(cell)", True),
        ("from pickle import UnpicklingError", False),
        ("from pickle import UnpicklingError, loads", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, allow_pickle=False)", False),
        ("model.eval()", False),
        ("yaml.safe_load(text)", False),
    ],
)
def test_the_test_sees_what_is_unsafe(line, expected):
    assert any(unsafe(node) for node in ast.walk(ast.parse(line))) == expected


OPTIMISED = """
import torch
from moebench.moe.oracle import Reference, compare
assert False, "python -O strips this"
reference = Reference(torch.ones(2, 4).double(), torch.zeros(2).double(), 0, 2 * torch.ones(2).double())
good, bad = compare(torch.ones(2, 4), reference, torch.float32), compare(2 * torch.ones(2, 4), reference, torch.float32)
print(good.ok, bad.ok)
"""


def test_a_wrong_answer_is_wrong_under_python_o_too():
    command = [sys.executable, "-O", "-c", OPTIMISED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_text_that_is_code_stays_text_in_store_and_page(tmp_path):
    target = tmp_path / "run"
    code = f"__import__('pathlib').Path({str(target)!r}).touch()"
    row = case_row("r", make_case(), Status.FAILED, code)
    row["executed"] = json.dumps({"kernels": [code]})
    write_part(tmp_path / "store" / "runs" / "r", "part", {"cases": [row]})
    (tmp_path / "store" / "runs" / "r" / "run.json").write_text(json.dumps({"run_id": "r", "command": code}))
    ingest(tmp_path / "store")
    for connection in (connect_parts(tmp_path / "store"), open_database(tmp_path / "store" / DATABASE, read_only=True)):
        assert connection.execute("SELECT reason FROM cases").fetchall() == [(code,)]
        connection.close()
    write_report(tmp_path / "store", tmp_path / "report.html")
    assert parse_json(code) is None  # as a JSON column of a file that somebody else wrote might hold it
    assert not target.exists()


# ---------------------------------------------------------------------------------------------------------------------
# 12: the call that is checked is not the one that was timed


class Outputs:
    """A trial that keeps every output which it returned, and every one which it was asked to check."""

    steps = 2

    def __init__(self):
        self.returned, self.checked = [], []

    def begin_turn(self):
        self.returned = []

    def run(self, step):
        self.returned.append(object())
        return self.returned[-1]

    def verify(self, step, output):
        self.checked.append(output)
        return Check(True)


def test_what_is_checked_is_what_the_timed_calls_returned():
    trial = Outputs()
    held = _Held(trial, make_case())
    held.turn(0, 2)
    timed = list(trial.returned)
    assert held.verify().ok
    assert trial.checked == trial.returned == timed  # and no call was made for the check


# ---------------------------------------------------------------------------------------------------------------------
# 13: data in parameters


@pytest.mark.parametrize("data", [torch.zeros(3), np.zeros(3), b"weights", range(3)], ids=lambda data: str(type(data)))
def test_data_in_parameters_is_refused_and_never_stored(data):
    case = make_case(model=Choice("tiny", {"weights": data}))
    with pytest.raises(TypeError, match=f"a {type(data).__name__} has no canonical JSON form"):
        case_row("r", case, Status.OK, "")


def test_a_model_of_many_gigabytes_is_a_few_bytes_in_its_row():
    cases = make_plan(load(["suite=throughput", "model=mixtral-8x7b"], REGISTRY, 1e12, 1e7), REGISTRY, 1e12).cases
    assert cases
    for case in cases:
        assert len(canonical_json(case_row("r", case, Status.OK, "")["params"])) < 4096


# ---------------------------------------------------------------------------------------------------------------------
# 15: bytes of distinct experts, not of min(T k, E)


@pytest.mark.parametrize(("tokens", "fraction"), [(64, 0.5), (64, 0.75), (3, 0.75)])
def test_bytes_count_the_experts_that_the_routing_touches(tokens, fraction, layer_trial):
    traffic = ("axes.traffic=dead", f"params.traffic.dead.fraction={fraction}")
    trial = layer_trial(*traffic, f"axes.tokens={tokens}", "axes.backend=eager", "axes.residency=warm")
    counts_E = trial.batches[0].routing.counts_E
    touched, slots = int((counts_E > 0).sum()), int(counts_E.sum())
    assert touched < min(slots, len(counts_E))
    cost = trial.cost(0)
    assert (cost.distinct_experts, cost.assignments) == (touched, slots)
    assert cost.bytes == touched * trial.subject.layer.store.nbytes / len(counts_E) + 2 * trial.x[0].nbytes


# ---------------------------------------------------------------------------------------------------------------------
# 16: a regression that exits 0


def judged(verdict, kind="time"):
    return Judged("case", "k", "b", kind, kind, verdict)


def gate_exit(*judged_, skipped=(), detectable=None):
    noise = Noise(0.02, 0.02, detectable, 0.05, 5)
    return GateResult("r", "a", "b", judged_, tuple(skipped), noise, 1.0, len(judged_)).exit


FINE = judged(Verdict.EQUIVALENT)
BROKEN = Skipped("case", "k", "broken", "wrong on the candidate's side alone")


@pytest.mark.parametrize("kind", ["time", "metric", "accuracy"])
@pytest.mark.parametrize("detectable", [None, 0.01, 0.5])
def test_any_regression_exits_with_1_whatever_stands_beside_it(kind, detectable):
    others = [FINE, judged(Verdict.IMPROVED), judged(Verdict.INCONCLUSIVE)]
    assert gate_exit(*others, judged(Verdict.REGRESSED, kind), detectable=detectable) == Exit.REGRESSED == 1
    assert gate_exit(*others, skipped=[BROKEN], detectable=detectable) == 1


def test_doubt_noise_and_nothing_at_all_do_not_exit_with_0():
    assert gate_exit(FINE, judged(Verdict.IMPROVED)) == Exit.NOT_REGRESSED == 0
    assert gate_exit(FINE, judged(Verdict.INCONCLUSIVE)) == 3
    assert gate_exit(FINE, detectable=0.5) == 4
    assert gate_exit() == 3  # 9: zero cases judged
    assert gate_exit(skipped=[Skipped("case", "k", "skipped", "not in base")]) == 3


# ---------------------------------------------------------------------------------------------------------------------
# 20: an assumption that every call starts the same kernels


def test_calls_that_start_different_numbers_of_kernels_are_measured_alike(layer_trial):
    settings = ("axes.traffic=zipf", "axes.tokens=3", "axes.backend=eager", "axes.residency=warm")
    trial = layer_trial(*settings)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[step] = counts.get(step, 0) + 1
            return func(*args, **(kwargs or {}))

    counts: dict[int, int] = {}
    trial.begin_turn()
    for step in range(trial.steps):
        with Count():
            trial.run(step)
    assert len(set(counts.values())) > 1
    held = _Held(trial, trial.case)
    assert len(held.turn(0, 2 * trial.steps)["ns"]) == 2 * trial.steps
    assert held.verify().ok


def test_an_excluded_operator_is_found_however_often_it_runs():
    class Uneven:
        def begin_turn(self): ...

        def run(self, step):
            x = torch.ones(2, 2)
            for _ in range(5):
                x = x @ x
            return x + x

    excludes = ("aten.mm.default", "aten.add.Tensor", "aten.addmm.default")
    case = make_case()
    held = _Held(Uneven(), make_case(execution=type(case.execution)(excludes=excludes)))
    assert held.excluded_operators() == ["aten.add.Tensor", "aten.mm.default"]


# ---------------------------------------------------------------------------------------------------------------------
# The page

ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_the_page_has_twenty_rows_and_names_tests_that_exist():
    rows = ROW.findall(PAGE.read_text())
    assert [int(number) for number, *_ in rows] == list(range(1, 21))
    for number, _, tests, verified in rows:
        named = TEST.findall(tests)
        assert named, f"row {number} names no test"
        assert verified.strip()
        assert not TEST.sub("", tests).strip(" ,;"), f"row {number}: {tests} is not a list of path::name"
        for path, name in named:
            defined = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)}
            assert name in defined, f"row {number}: {path} has no {name}"
