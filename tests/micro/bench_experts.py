"""The cost of computing: one small layer on each way to execute it, judged by the oracle."""

import pytest
import torch

from moebench.contracts import Scheme
from moebench.moe.oracle import compare, reference

INT8, INT4 = Scheme("rtn", 8.0), Scheme("rtn", 4.0, 32)


def measured(benchmark, layer, name, store, dtype, tokens):
    x_TH, routing = layer.normal(tokens, layer.hidden).to(getattr(torch, dtype)), layer.routing(tokens)
    with torch.no_grad():
        run = layer.executor(name, store, dtype)
    y_TH = benchmark(torch.no_grad()(run), x_TH, *routing.padded())
    check = compare(y_TH, reference(store, routing, x_TH), x_TH.dtype)
    assert check.ok, check.reason


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("name", ["eager", "grouped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense(benchmark, layer, name, dtype, tokens):
    measured(benchmark, layer, name, layer.store(getattr(torch, dtype)), dtype, tokens)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("scheme", [INT8, INT4], ids=["int8", "int4"])
def test_packed(benchmark, layer, scheme, tokens):
    measured(benchmark, layer, "packed", layer.store(torch.bfloat16, scheme), "bfloat16", tokens)
