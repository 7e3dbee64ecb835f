"""Packed codes: the kernels compute what ``dequantize`` says, and nothing else runs."""

import pytest
import torch

from moebench.backends.packed import MATMULS
from moebench.backends.packing import pack
from moebench.contracts import MoebenchError, Scheme
from moebench.moe.codecs.rtn import round_to_nearest

SCHEMES = [
    Scheme("rtn", 8.0),
    *(Scheme("rtn", 4.0, group, symmetric) for group in (32, 64, 128, 256) for symmetric in (True, False)),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 17])
def test_a_packed_product_is_the_product_with_the_dequantized_matrix(lab, scheme, count):
    generator = torch.Generator().manual_seed(count)
    weight = round_to_nearest(torch.randn(48, 256, generator=generator), scheme)
    x_TI = torch.randn(count, 256, generator=generator).bfloat16()
    store = lab.store(0, torch.bfloat16, Scheme("rtn", 8.0))
    product = lab.executor("packed", store, lab.spec(store, "bfloat16")).product
    expected = x_TI.double() @ weight.dequantize().double().T
    error = (product(x_TI, pack(weight)).double() - expected).norm() / expected.norm()
    assert error < 2**-8


@pytest.mark.parametrize("scheme", [Scheme("rtn", 8.0), Scheme("rtn", 4.0, 32)], ids=str)
def test_no_excluded_operator_is_seen_and_the_packed_one_is(lab, scheme):
    store = lab.store(0, torch.bfloat16, scheme)
    spec = lab.spec(store, "bfloat16")
    execution = lab.backend("packed").supports(spec)
    assert (execution.weights, execution.excludes) == ("packed", MATMULS)
    session = lab.backend("packed").load({0: store}, {0: spec})
    inputs = lab.inputs(lab.routing("dynamic_k", 17, 0), "topk")
    with lab.operators() as operators:
        session.layer(0)(lab.tokens(17, torch.bfloat16), *inputs)
    assert not operators.seen & set(execution.excludes)
    assert any(session.executed().kernels[0].removeprefix("aten::") in name for name in operators.seen)
    assert session.executed().weights == "packed"
    fallback = lab.backend("eager").load({0: store}, {0: spec})
    with lab.operators() as operators:
        fallback.layer(0)(lab.tokens(17, torch.bfloat16), *inputs)
    assert operators.seen & set(execution.excludes)


def test_packed_weights_are_as_small_as_they_say(lab):
    for scheme, bits in ((Scheme("rtn", 8.0), 8 + 16 / 32), (Scheme("rtn", 4.0, 32), 4 + 32 / 32)):
        store = lab.store(0, torch.bfloat16, scheme)
        session = lab.backend("packed").load({0: store}, {0: lab.spec(store, "bfloat16")})
        assert session.resident_bytes() == 6 * 3 * 32 * 32 * bits / 8


def test_float32_scales_are_refused(lab):
    with pytest.raises(MoebenchError, match="quantize with bfloat16 scales"):
        pack(round_to_nearest(torch.randn(32, 32), Scheme("rtn", 8.0), torch.float32))
