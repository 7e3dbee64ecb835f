"""What the interpreted tests share; without TRITON_INTERPRET=1 none is collected (see test_triton_interpreted.py)."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.contracts import load_file

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

_backends = load_file(Path(__file__).parents[2] / "backends" / "conftest.py")
lab = _backends.lab


def _run(experts, x_TH, some_routing, boundary="topk", **plan):
    """Return the output of the kernels, into NaN, under a plan of small tiles; each may be given."""
    import torch

    from moebench.kernels.triton import layer
    from moebench.kernels.triton.tiles import Tiles

    out_TH = torch.full_like(x_TH, float("nan"))
    small = Tiles(16, 32, 16)
    values = {"gate_up": small, "down": small, "decode": Tiles(1, 32, 16), **plan}
    inputs = _backends.inputs(some_routing, boundary)
    run = layer.sorted_layer if boundary == "sorted" else layer.topk_layer
    run(x_TH, *inputs, experts, out_TH, layer.Plan(**values))
    return out_TH


def _dense(store, turned=False, **sites):
    """Return the experts of a dense store as the kernels read them."""
    from moebench.kernels.triton.grouped import Experts
    from moebench.kernels.triton.weights import Matrices

    make = Matrices.turned if turned else Matrices.dense
    return Experts(make(store.gate_up), make(store.down), store.activation, store.gated, **sites)


@pytest.fixture(scope="session")
def kernels():
    """``run`` a call of the kernels, and make their ``dense`` experts of a store."""
    return SimpleNamespace(run=_run, dense=_dense)


@pytest.fixture(autouse=True)
def _unwritten_is_nan():
    """Fill what is allocated and not written with NaN, or the largest integer: reading it must be seen."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
