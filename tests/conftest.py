"""What every test gets: one thread, and a store of its own below the system's temporary folder."""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402 - the threads are read when torch is imported

LONGEST = (
    "bench/test_chaos.py",
    "bench/test_gate_devices.py",
    "bench/test_gate_run.py",
    "bench/test_pytest_plugin.py",
    "bench/test_resume.py",
    "bench/test_hostile.py",
    "suites/test_accuracy.py",
    "test_docs.py",
    "bench/test_gate_once.py",
    "bench/test_multirun.py",
    "bench/test_suites.py",
)
"""Files of few tests that take long, most of them in processes of their own."""


def pytest_configure(config):
    """Deal files out in the order below: xdist would put those of the fewest tests last, among them our longest."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Begin with the longest files, so that no process is alone with one of them in the end."""
    here = Path(__file__).parent
    ranks = {here / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish():
    """Keep the collector off what imports have made: walking it was a sixth of the time where much is allocated."""
    gc.collect()
    gc.freeze()


NUMBERS = itertools.count()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_store(request, tmp_path_factory, monkeypatch):
    """Name a store that is not there yet, in the test's own folder where it has one: making thousands is not free."""
    own = "tmp_path" in request.fixturenames
    folder = request.getfixturevalue("tmp_path") if own else tmp_path_factory.getbasetemp() / f"own-{next(NUMBERS)}"
    monkeypatch.setenv("MOEBENCH_STORE", str(folder / "store"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of artefacts for tests that must not see the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def smoke(cache, tmp_path_factory):
    """The settings of model tinymoe in its smallest variant, trained into ``cache`` on a text of its own."""
    pytest.importorskip("transformers")
    from moebench.contracts import load_file

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBENCH_CACHE", str(cache))
        return load_file(Path(__file__).parent / "smoke_model.py").train(tmp_path_factory.mktemp("data"))
