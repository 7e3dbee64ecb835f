"""What every test gets: one thread, and a store of its own below the system's temporary folder."""

from __future__ import annotations

import gc
import os
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402 - the threads are read when torch is imported


def pytest_collection_finish():
    """Keep the collector off the million objects of imported packages: it took a sixth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_STORE", str(tmp_path / "store"))


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
