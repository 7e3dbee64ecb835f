"""The cost of quantizing and of reading back, and of one product with packed codes."""

import pytest
import torch

from moebench.backends.packing import pack
from moebench.contracts import Scheme
from moebench.moe.codecs.packing import pack_codes
from moebench.moe.codecs.rtn import round_to_nearest

SCHEMES = {
    "int8": Scheme("rtn", 8.0),
    "int4": Scheme("rtn", 4.0, 32),
    "int4-asymmetric": Scheme("rtn", 4.0, 32, symmetric=False),
    "int2": Scheme("rtn", 2.0, 32, symmetric=False),
}
by_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
of_products = pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.bits > 2], ids=list(SCHEMES)[:3])


@by_scheme
def test_quantize(benchmark, layer, scheme):
    weight = layer.normal(256, 256)
    codes, scales = (
        benchmark(lambda: vars(round_to_nearest(weight, scheme))["codes"]),
        round_to_nearest(weight, scheme).scales,
    )
    made = round_to_nearest(weight, scheme)
    assert torch.equal(codes, made.codes)
    step = scales.float().repeat_interleave(256 // scales.shape[1], dim=1)
    assert ((made.dequantize() - weight).abs() <= step).all()


@by_scheme
def test_dequantize(benchmark, layer, scheme):
    made = round_to_nearest(layer.normal(256, 256), scheme)
    dense = benchmark(made.dequantize)
    codes = made.unpack().double() - made.offset
    group = 256 // made.scales.shape[1]
    expected = codes * made.scales.double().repeat_interleave(group, dim=1)
    if made.zeros is not None:
        expected += made.zeros.double().repeat_interleave(group, dim=1)
    assert torch.allclose(dense.double(), expected, rtol=1e-6, atol=1e-7)


def test_pack_codes(benchmark, layer):
    q = (layer.normal(256, 256) * 4 + 8).clamp(0, 15).to(torch.uint8)
    packed = benchmark(pack_codes, q, 4)
    assert torch.equal(packed & 15, q[:, ::2])
    assert torch.equal(packed >> 4, q[:, 1::2])


@pytest.mark.parametrize("tokens", [1, 64])
@of_products
def test_packed_product(benchmark, layer, scheme, tokens):
    weight = round_to_nearest(layer.normal(256, 256), scheme)
    x_TI = layer.normal(tokens, 256, seed=tokens).bfloat16()
    store = layer.store(torch.bfloat16, SCHEMES["int8"])
    y_TO = benchmark(layer.executor("packed", store, "bfloat16").product, x_TI, pack(weight))
    expected = x_TI.double() @ weight.dequantize().double().T
    assert (y_TO.double() - expected).norm() < 2**-8 * expected.norm()
