"""Real processes, really killed: nothing is lost, doubled or half-written. ``tests/chaos.py`` is the long form."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

CHAOS = runpy.run_path(str(Path(__file__).parent.parent / "chaos.py"), run_name="chaos")
LANES = 2


@pytest.fixture(scope="module")
def kill(engine, small, tmp_path_factory):
    """Run ``chaos`` on the small run with more settings."""

    def run(*settings, **how):
        folder = tmp_path_factory.mktemp("chaos")
        command = CHAOS["Command"]([*small, *settings], engine.env(folder), 120.0)
        return CHAOS["chaos"](command, folder, lanes=LANES, seed=3, **how)

    return run


def test_nothing_is_lost_or_doubled_at_ten_random_moments(kill):
    results = kill("axes.tokens=[16,32]", "axes.residency=warm", moments=10, points=())
    assert len(results) == 10
    assert not {name: wrong for name, wrong in results.items() if wrong}


def test_nothing_is_lost_or_doubled_at_the_fault_points(kill):
    """Two groups again, of which one holds only refused cases and so needs no worker."""
    results = kill("axes.backend=eager", "axes.residency=[warm,cold]", moments=0)
    assert {name.split()[1].split(":")[0] for name in results} == {"write", "fsync", "rename", "ingest"}
    assert not {name: wrong for name, wrong in results.items() if wrong}
