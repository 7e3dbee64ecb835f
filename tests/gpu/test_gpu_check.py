"""The checks for a machine with a GPU, run without one: on a fake device, with programs that are played."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import moebench
from moebench.backends.eager import Eager
from moebench.contracts import Availability
from moebench.results.database import connect_parts
from moebench.suites.static_kernels import KERNELS

FOLDER = Path(__file__).resolve().parents[1] / "gpu_check"


@pytest.fixture(scope="module")
def tools():
    """The modules of the checks, which import each other by their plain names as scripts do."""
    names = ("checks", "conformance", "programs", "registers", "timing", "check")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: __import__(name) for name in names})
        for name in names:
            sys.modules.pop(name)


def statuses(results):
    return [result.status for result in results]


# ---------------------------------------------------------------------------------------------------------------------
# The runner


def test_what_fails_makes_the_command_fail_and_stops_nothing(tools):
    passed, skipped = tools.checks.Result("a", "passed"), tools.checks.Result("b", "skipped", "absent")

    def raises():
        yield passed
        raise ValueError("out of memory")

    told = []
    checks = {"one": lambda: [passed, skipped], "two": raises, "none": list, "last": lambda: [passed]}
    results = tools.checks.run_all(checks, told.append)
    assert statuses(results) == ["passed", "skipped", "passed", "failed", "failed", "passed"]
    assert results[3].reason == "ValueError: out of memory"
    assert results[4].reason == "it looked at nothing"
    assert tools.checks.exit_code(results) == 1
    assert "skipped  b: absent" in told
    assert tools.checks.document({"device": "x"}, results)["counts"] == {"passed": 3, "failed": 2, "skipped": 1}


def test_only_a_pass_is_a_pass(tools):
    passed, skipped = tools.checks.Result("a", "passed"), tools.checks.Result("b", "skipped")
    assert tools.checks.exit_code([passed, skipped]) == 0
    assert tools.checks.exit_code([skipped]) == 1
    assert tools.checks.exit_code([]) == 1


def test_what_the_time_did_not_reach_is_a_failure(tools):
    times = iter([0.0, 1.0, 16 * 60.0])
    passed = tools.checks.Result("a", "passed")
    checks = {"soon": lambda: [passed], "late": lambda: [passed]}
    results = tools.checks.run_all(checks, lambda line: None, lambda: next(times))
    assert statuses(results) == ["passed", "failed"]
    assert "not run: 15 minutes were spent before it" in results[1].reason


# ---------------------------------------------------------------------------------------------------------------------
# Conformance


@pytest.fixture
def few(tools, monkeypatch):
    monkeypatch.setattr(tools.conformance, "COUNTS", (0, 5))
    monkeypatch.setattr(tools.conformance, "SIZES", ((32, 32),))


class Wrong(Eager):
    """Loses the last token where there are several."""

    def load(self, layers, specs):
        session = super().load(layers, specs)

        def run(x_TH, *inputs, out_TH=None):
            session.layer(0)(x_TH, *inputs, out_TH=out_TH)
            out_TH[len(x_TH) - 1 :].zero_()

        return SimpleNamespace(layer=lambda index: run)


def test_a_right_backend_passes_on_the_fake_device_and_a_wrong_one_does_not(tools, fake, few):
    with fake.Elsewhere():
        good = tools.conformance.conformance("eager", Eager(), "float32", fake.NAME)
        bad = tools.conformance.conformance("wrong", Wrong(), "float32", fake.NAME)
    assert good.status == "passed", good
    assert good.data["layers"] == 6 * 2 * 2  # archetypes, counts, boundaries
    assert 0 < good.data["worst_share_of_bound"] <= 1
    assert bad.status == "failed"
    assert "rows are off" in bad.reason


def test_backends_that_are_not_there_are_shown_as_skipped(tools, registry):
    results = list(tools.conformance.checks(registry, "cuda", ("grouped", "of_the_future")))
    reasons = {result.name.split()[1]: result.reason for result in results}
    assert reasons["of_the_future"] == "no backend of this name is registered"
    if "cuda" not in registry.get("backend", "grouped").create().availability().devices:
        assert reasons["grouped"].startswith("not on cuda")
        assert set(statuses(results)) == {"skipped"}


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def test_a_sanitizer_that_finds_something_is_a_failure_and_an_absent_one_a_skip(tools):
    said = {"memcheck": (0, "0 errors"), "racecheck": (9, "hazard\n2 hazards")}
    commands = []

    def run(command, timeout):
        commands.append(command)
        return said[command[command.index("--tool") + 1]]

    found = list(tools.programs.sanitizers(run, lambda name: f"/bin/{name}"))
    assert statuses(found) == ["passed", "failed"]
    assert found[1].reason == "it found errors: 2 hazards"
    assert all(command[-2:] == ["--only", "triton,cuda_fused,grouped"] for command in commands)
    assert all(command[:2] == ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"] for command in commands)
    assert statuses(tools.programs.sanitizers(run, lambda name: None)) == ["skipped", "skipped"]


@pytest.mark.parametrize(("code", "status"), [(0, "passed"), (1, "failed"), (3, "failed"), (4, "failed")])
def test_an_a_a_gate_passes_only_if_the_gate_does(tools, tmp_path, code, status):
    (result,) = tools.programs.a_a_gate(tmp_path, lambda command, timeout: (code, "the verdict"))
    assert result.status == status


def test_a_program_that_does_not_end_is_told(tools):
    code, said = tools.programs.run_program([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert (code, said) == (124, "it took longer than 0.2 s")


ROW = {"backend": "grouped", "tokens": 16, "status": "ok", "reason": None, "flags": [], "evidence": "measured-gpu"}
TIMES = {"clock": "device", "n": 40, "median_ns": 5, "median_lo_ns": 4, "median_hi_ns": 6}


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "passed", ""),
        ({"status": "skipped", "reason": "vllm is not installed"}, "skipped", "vllm is not installed"),
        ({"status": "wrong", "reason": "2 rows are off"}, "failed", "wrong: 2 rows are off"),
        ({"evidence": "interpreted"}, "failed", "no time on a device's clock"),
        ({"median_ns": None}, "failed", "no time on a device's clock"),
    ],
)
def test_a_row_of_the_store_is_a_time_only_if_it_is_ok_and_measured_there(tools, changes, status, words):
    result = tools.timing.of_row({**ROW, **TIMES, **changes})
    assert result.status == status
    assert words in result.reason
    assert ("median_ns" in result.data) == (status == "passed")


def test_the_table_asks_for_what_a_store_has(tools, tmp_path):
    found = connect_parts(tmp_path).execute(tools.timing.QUERY)
    assert {*ROW, *TIMES} <= {column[0] for column in found.description}


def test_a_table_that_is_not_there_is_a_failure(tools, tmp_path):
    (result,) = tools.timing.table(tmp_path, ["grouped"], lambda command, timeout: (1, "no store"))
    assert result.status == "failed"


STATIC = FOLDER.parents[1] / "docs" / "gpu-static.json"


def rows_of(kernel, target):
    rows = json.loads(STATIC.read_text())["rows"]
    return [row for row in rows if (row.get("kernel"), row.get("target")) == (kernel, target)]


def test_a_kernel_that_spills_fails_beside_its_static_figures(tools, tmp_path):
    static = tmp_path / "gpu-static.json"
    rows = rows_of("place", "sm_90") + rows_of("combine", "sm_120") + rows_of("moe_fused", "sm_90")
    static.write_text(json.dumps({"runs": {}, "rows": rows}))
    kernels = [("place_kernel", 32, 0), ("down_kernel", 255, 0), ("down_kernel", 64, 12)]
    found = {one.name: one for one in tools.registers.checks(iter(kernels), static, "sm_90")}
    told = [int(row["metrics"]["registers"]) for row in rows_of("place", "sm_90")]
    assert found["registers place_kernel"].data == {"registers": [32], "static_registers": told}
    assert found["registers down_kernel"].status == "failed"
    assert found["registers down_kernel"].reason == "1 of 2 binaries spill"
    (absent,) = tools.registers.checks(iter(()), static, "sm_90")
    assert absent.status == "skipped"
    told = list(tools.registers.checks(iter(kernels), static, "sm_80"))
    assert told[-1].reason == "gpu-static.json holds no figures for sm_80"


def test_every_kernel_of_the_stored_figures_is_found_by_its_name_in_code(tools):
    written = "".join(path.read_text() for path in Path(moebench.__file__).parent.glob("kernels/triton/*.py"))
    names = {f"{kernel.name.removesuffix('_atomic')}_kernel" for kernel in KERNELS if kernel.backend == "triton"}
    for target in ("sm_80", "sm_90", "sm_100", "sm_120"):
        assert names == tools.registers.static_registers(json.loads(STATIC.read_text()), target).keys()
    assert all(f"def {name}(" in written for name in names)
    both = {row["metrics"].get("registers") for row in (*rows_of("down", "sm_90"), *rows_of("down_atomic", "sm_90"))}
    assert tools.registers.static_registers(json.loads(STATIC.read_text()), "sm_90")["down_kernel"] == both - {None}


def test_binaries_are_those_that_the_driver_loaded_each_kernel_once(tools, monkeypatch):
    binaries = {"a": SimpleNamespace(n_regs=64, n_spills=0), "b": SimpleNamespace(n_regs=80, n_spills=2)}
    kernel = SimpleNamespace(__name__="down_kernel", device_caches={0: (binaries, {}, "target", "backend", "binder")})
    module = SimpleNamespace(down_kernel=kernel, again=kernel, other=len)
    monkeypatch.setitem(sys.modules, f"{tools.registers.PACKAGE}.played", module)
    monkeypatch.setattr(tools.registers, "PACKAGE", f"{tools.registers.PACKAGE}.played")
    assert list(tools.registers.loaded_kernels(0)) == [("down_kernel", 64, 0), ("down_kernel", 80, 2)]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_without_a_gpu_the_command_says_so_loudly_and_writes_nothing(tools, tmp_path):
    if not tools.check.absent():
        pytest.skip("there is a GPU here")
    (tmp_path / "moebench").symlink_to(Path(moebench.__file__).resolve().parent)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(FOLDER / "check.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("gpu_check: NOT RUN, nothing was checked: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_document_is_named_by_device_and_day(tools, tmp_path):
    machine = {"device": {"name": "NVIDIA H100 80GB HBM3"}, "date": "2030-01-02T03:04:05+00:00"}
    found = tools.checks.document(machine, [tools.checks.Result("a", "skipped", "absent")])
    path = tools.check.write(tmp_path, found)
    assert path.name == "nvidia-h100-80gb-hbm3-2030-01-02.json"
    assert json.loads(path.read_text())["results"][0]["reason"] == "absent"


def test_peers_are_backends_that_say_what_they_need(tools):
    from moebench.contracts import load_file

    (descriptor,) = load_file(FOLDER / "peers.py").DESCRIPTORS
    found = descriptor.create().availability()
    assert isinstance(found, Availability)
    assert found.available or found.reason
    assert found.devices == ("cuda",)
