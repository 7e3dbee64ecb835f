"""The fake device and cases for it, for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moebench.bench.config import load
from moebench.bench.plan import make_plan
from moebench.contracts import Registry, load_file, measured_on

REGISTRY = Registry.load()
MEMORY = 2.0**32


def planned(*settings):
    """Return the plan of a run with these settings."""
    return make_plan(load(list(settings), REGISTRY, MEMORY, 2.0**20), REGISTRY, MEMORY)


def case_on(device, *settings):
    """Return the one case of these settings, as if it had been planned for ``device``."""
    (case,) = planned(*settings).cases
    if device == "cpu":
        return case
    workload = {"l2": "flushed" if case.residency == "cold" else "kept", "cuda_graph": False}
    return replace(case, device=device, evidence=measured_on(device), workload=workload)


@pytest.fixture(scope="session")
def registry():
    return REGISTRY


@pytest.fixture(scope="session")
def plan_of():
    return planned


@pytest.fixture(scope="session")
def make_case():
    return case_on


@pytest.fixture(scope="session")
def fake():
    """The module of the fake device."""
    return load_file(Path(__file__).parent / "fake_device.py")


@pytest.fixture(scope="session")
def virtual():
    """The module of the device of virtual time."""
    return load_file(Path(__file__).parent / "virtual.py")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))
