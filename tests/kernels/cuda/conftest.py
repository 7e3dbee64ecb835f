"""The layers, the replay of launches and the mutants of this folder, under one name each."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cuda_mutants as mutants
import cuda_problems as problems
import cuda_replay as replay


@pytest.fixture(scope="session", autouse=True)
def _cache():
    """Keep what is built between runs, outside the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        if "MOEBENCH_CACHE" not in os.environ:
            patch.setenv("MOEBENCH_CACHE", str(Path(tempfile.gettempdir()) / "moebench-tests-cache"))
        yield


@pytest.fixture(scope="session")
def lab():
    """Everything that the tests of this folder share."""
    return SimpleNamespace(problems=problems, replay=replay, mutants=mutants)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The program of each rung, with all mutants in it, built when it is first asked for."""
    folder = mutants.mutate(tmp_path_factory.mktemp("mutants") / "cuda")
    return lambda rung: replay.program(rung, problems.SMALL, folder)
