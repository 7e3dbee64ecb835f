"""Suite ``static`` end to end: kernels in workers that do not interpret, against the stored figures; and its gate."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest

from moebench.bench.gate.cases import Cases
from moebench.bench.gate.command import run_gate
from moebench.bench.gate.config import GateConfig, PairedCase
from moebench.bench.gate.sides import Side
from moebench.bench.run import planned
from moebench.contracts import Registry
from moebench.kernels.isa import resources
from moebench.kernels.targets import TARGETS
from moebench.kernels.triton.tiles import BARRED, SPACE
from moebench.results.query import reading
from moebench.suites.static_compile import cuda_code
from moebench.suites.static_kernels import HALF, KERNELS, kernel_named, parse_tile

pytest.importorskip("triton")

STORED = json.loads((Path(__file__).parents[3] / "docs" / "gpu-static.json").read_text())
FIGURES = [row for row in STORED["rows"] if row["evidence"] == "static-compile"]
GOOD, BAD = "64x64x32-w4-s3", "128x128x64-w8-s3"
SETTINGS = (
    "suite.kernel=[gate_up]",
    "suite.target=[sm_80,gfx942]",
    f"suite.tile=[{GOOD},{BAD}]",
    "suite.device=[h100-sxm]",
    "axes.tokens=[4096]",
)
CASES = """
SELECT backend, params->'backend'->>'tile' AS tile, params->'workload'->>'target' AS target, evidence, status, reason,
       (SELECT map_from_entries(list((name, value))) FROM metrics m
        WHERE m.case_key = c.case_key AND NOT starts_with(name, 'worker_')) AS metrics
FROM cases c
"""


def same_compilers(package):
    """Skip where the stored figures are another compiler's."""
    told = {run["packages"].get(package) for run in STORED["runs"].values()}
    if told != {metadata.version(package)}:
        pytest.skip(f"the stored figures are those of {package} {told}")


def stored(kernel, target, tile, dtype="bfloat16"):
    names = {"kernel": kernel, "target": target, "tile": tile, "dtype": dtype}
    return next(row for row in FIGURES if names.items() <= row.items())


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return {"MOEBENCH_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def rows(caches, tmp_path_factory):
    """The rows of a run, started by somebody whose own Triton interprets, by target and tile."""
    folder = tmp_path_factory.mktemp("static")
    environment = {**os.environ, **caches, "MOEBENCH_STORE": str(folder), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "moebench.bench", "run", "suite=static", *SETTINGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # two tiles break a bar
    with reading(folder) as connection:
        found = connection.execute(CASES)
        names = [column[0] for column in found.description]
        told = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    return {(row["target"], row["tile"]): row for row in told}


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_what_is_compiled_anew_is_what_the_page_tells(rows, target):
    same_compilers("triton")
    row = rows[target, GOOD]
    assert (row["status"], row["evidence"], row["backend"]) == ("ok", "static-compile", "triton")
    assert row["metrics"] == stored("gate_up", target, GOOD)["metrics"]


def test_code_that_breaks_a_bar_is_wrong_and_has_no_numbers(rows):
    spilling, large = rows["sm_80", BAD], rows["gfx942", BAD]
    assert (spilling["status"], large["status"]) == ("wrong", "wrong")
    assert "spills" in spilling["reason"]
    assert "more than the 65536 of a block on gfx942" in large["reason"]
    assert not spilling["metrics"]
    assert not large["metrics"]
    assert all(parse_tile(BAD) not in tiles for tiles in SPACE.values())


def test_a_bound_is_a_model_and_says_so(rows):
    bound = rows[None, None]
    assert (bound["status"], bound["evidence"], bound["backend"]) == ("ok", "model", "roofline")
    assert bound["reason"].startswith("a roofline bound, no measurement")
    assert bound["metrics"]["time_bound"] > 0


def test_cuda_code_compiled_anew_is_what_the_page_tells():
    same_compilers("nvidia-cuda-nvrtc")
    shape = Registry.load().get("model", "olmoe-1b-7b").params_from().shape()
    told = stored("moe_gate_up", "sm_120", "64x64x32-w4-s3")["metrics"]
    found = resources(cuda_code("moe_gate_up", shape, "bfloat16", TARGETS["sm_120"]))
    assert (found.registers, found.stack, found.spills) == (told["registers"], told["stack"], told["spills"])
    assert (found.shared, found.instructions) == (told["shared_memory"], told["instructions"])
    assert found.kinds == {kind: told[f"{kind}_instructions"] for kind in found.kinds}


def test_no_shipped_configuration_spills():
    shipped = [row for row in FIGURES if row["status"] != "skipped"]
    assert {row["status"] for row in shipped} == {"ok"}
    assert {row["metrics"]["spills"] + row["metrics"]["stack"] for row in shipped} == {0.0}
    for row in shipped:
        needed = kernel_named(row["kernel"]).needs(row["dtype"])
        on = TARGETS[row["target"]]
        assert all(row["metrics"][f"{kind}_instructions"] for kind in needed if kind == "tensor" or on.async_copy)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", "half"), ("float32", "single")])
def test_every_tile_has_figures_or_is_left_out_and_those_that_spill_are_the_barred(dtype, size):
    products = [kernel.name for kernel in KERNELS if kernel.backend == "triton" and kernel.matrices]
    space = {*SPACE[size, "small"], *SPACE[size, "large"]}
    told = {
        (row["kernel"], row["target"], parse_tile(row["tile"])): row["reason"] or ""
        for row in FIGURES
        if row["dtype"] == dtype and row["kernel"] in products
    }
    assert set(told) == set(product(products, TARGETS, space))
    spilling = {(target, tiles) for (_, target, tiles), reason in told.items() if "code spills" in reason}
    assert spilling == {(target, tiles) for target, barred in BARRED.items() for tiles in barred if tiles in space}


def test_the_page_has_every_kernel_on_every_target_with_many_tiles():
    half = [row for row in FIGURES if row["dtype"] in HALF]
    assert {(row["kernel"], row["target"]) for row in half} == {
        (kernel.name, target) for kernel in KERNELS for target in TARGETS
    }
    tiles = {(kernel.name, target): 0 for kernel in KERNELS for target in TARGETS}
    for row in half:
        tiles[row["kernel"], row["target"]] += row["status"] == "ok"
    assert [tiles["down", target] >= 8 for target in TARGETS].count(True) >= 4
    assert [tiles["gate_up", target] >= 8 for target in TARGETS].count(True) >= 3
    assert min(tiles["gate_up", target] for target in TARGETS) >= 4


@functools.cache
def cases():
    plan = planned(["suite=static", *SETTINGS], Registry.load())[0]
    return {
        (case.workload.get("target"), case.backend.params.get("tile")): case
        for group in plan.groups
        for case in group.cases
    }


def test_the_gate_judges_what_is_compiled_exactly(rows, caches, tmp_path, monkeypatch):
    for name, value in caches.items():
        monkeypatch.setenv(name, value)
    sides = {side: Side(side, sys.executable, {}, None, side) for side in ("base", "candidate")}
    same, other, spilling = (cases()[key] for key in (("gfx942", GOOD), ("sm_80", GOOD), ("sm_80", BAD)))
    labelled = {"same": (same, same), "other": (same, other), "spilling": (other, spilling)}
    pairs = Cases((), (), tuple(PairedCase(label, *both) for label, both in labelled.items()))
    result = run_gate(sides, pairs, GateConfig(), tmp_path / "store", ())
    told = {(one.label, one.metric): one for one in result.judged}
    (broken,) = result.skipped
    assert (broken.label, broken.status) == ("spilling", "broken")
    assert "the code spills" in broken.reason
    names = {"registers", "stack", "spills", "shared_memory", "occupancy"}
    assert {metric for label, metric in told if label == "same"} == names
    assert {told["same", name].verdict for name in names} == {"equivalent"}
    assert told["other", "registers"].verdict == "regressed"
    assert told["other", "registers"].base_value == rows["gfx942", GOOD]["metrics"]["registers"]
    assert told["other", "registers"].candidate_value == rows["sm_80", GOOD]["metrics"]["registers"]
