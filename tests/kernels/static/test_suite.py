"""Suite ``static`` end to end: real kernels in worker processes that do not interpret, its gate, and the stored page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.bench.gate.cases import Cases
from moebench.bench.gate.config import GateConfig, PairedCase
from moebench.bench.gate.record import run_gate
from moebench.bench.gate.sides import Side
from moebench.bench.run import planned
from moebench.contracts import Registry
from moebench.results.query import run_sql

pytest.importorskip("triton")

FIGURES = Path(__file__).parents[3] / "docs" / "gpu-static.json"
SETTINGS = (
    "model=tiny",
    "axes.tokens=[64]",
    "suite.kernel=[gate_up]",
    "suite.target=[sm_80,gfx942]",
    "suite.tile=[32x32x32-w4-s3,64x256x32-w2-s2]",
    "suite.device=[h100-sxm]",
)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return {"MOEBENCH_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def store(caches, tmp_path_factory):
    """The store of a run, started by somebody whose own Triton interprets."""
    folder = tmp_path_factory.mktemp("static")
    environment = {**os.environ, **caches, "MOEBENCH_STORE": str(folder), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "moebench.bench", "run", "suite=static", *SETTINGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # one tile spills
    return folder
