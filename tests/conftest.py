"""What every test gets: one thread, and a store of its own below the system's temporary folder."""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402 - the threads are read when torch is imported


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
