"""Real processes, really killed: nothing is lost, doubled or half-written. ``tests/chaos.py`` is the long form."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

CHAOS = runpy.run_path(str(Path(__file__).parent.parent / "chaos.py"), run_name="chaos")
KINDS = {"moment": 4, "fault write": 2, "fault fsync": 2, "fault rename": 2, "fault ingest": 2}


@pytest.fixture(scope="module")
def results(engine, small, tmp_path_factory):
    """Two groups, of which one holds only refused cases and needs no worker: see test_resume for two that do."""
    folder = tmp_path_factory.mktemp("chaos")
    settings = [*small, "axes.backend=eager", "axes.residency=[warm,cold]"]
    command = CHAOS["Command"](settings, engine.env(folder), 120.0)
    return CHAOS["chaos"](command, folder, moments=KINDS["moment"], seed=3, lanes=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_loses_and_doubles_nothing(kind, results):
    mine = {name: wrong for name, wrong in results.items() if name.startswith(kind)}
    assert len(mine) == KINDS[kind]
    assert not {name: wrong for name, wrong in mine.items() if wrong}
