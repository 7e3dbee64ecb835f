"""Activations per token, and integer products that are exact whoever computes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Scheme
from moebench.moe.blocks.activations import fake_quantize, float_matmul, int_linear, int_matmul, quantize_tokens
from moebench.moe.quantization import quantize

seeds = st.integers(0, 2**32 - 1)


def codes_of(seed, *shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(0, 5), st.integers(1, 70), st.integers(1, 9))
def test_the_kernel_and_the_floats_are_the_integers(seed, tokens, width, out):
    codes_TI, codes_OI = codes_of(seed, tokens, width), codes_of(seed + 1, out, width)
    wanted = (codes_TI.long() @ codes_OI.long().T).to(torch.int32)
    assert torch.equal(int_matmul(codes_TI, codes_OI), wanted)
    assert torch.equal(float_matmul(codes_TI, codes_OI), wanted)


def test_a_single_row_may_have_any_stride():
    row, codes_OI = codes_of(0, 1, 64), codes_of(1, 5, 64)
    wanted = (row.long() @ codes_OI.long().T).to(torch.int32)
    strange = row.as_strided((1, 64), (0, 1))
    assert torch.equal(int_matmul(strange, codes_OI), wanted)
    assert torch.equal(int_matmul(codes_OI, strange), wanted.T)


@pytest.mark.parametrize("width", [1024, 1025, 4096])
@pytest.mark.parametrize("code", [-128, 127])
def test_the_largest_sums_stay_exact(width, code):
    codes_OI = torch.full((3, width), code, dtype=torch.int8)
    codes_OI[1, ::2] = 1
    codes_OI[2, 0] = 101
    wanted = (codes_OI.long() @ codes_OI.long().T).to(torch.int32)
    assert torch.equal(int_matmul(codes_OI, codes_OI), wanted)
    assert torch.equal(float_matmul(codes_OI, codes_OI), wanted)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_codes_are_within_half_a_step_of_their_token(seed, bits, dtype):
    x_TI = (normal(seed, 5, 33) * 2.0 ** torch.arange(-8, 12, 4)[:, None]).to(dtype)
    x_TI[2] = 0
    codes_TI, scale_T1 = quantize_tokens(x_TI, bits)
    top = 2 ** (bits - 1) - 1
    assert codes_TI.dtype == torch.int8
    assert codes_TI.abs().amax(1).tolist() == [top, top, 0, top, top]
    assert torch.equal(scale_T1[:, 0], x_TI.float().abs().amax(1) / top)
    error = (codes_TI.double() * scale_T1.double() - x_TI.double()).abs()
    assert (error <= scale_T1 * (0.5 + 2.0**-16)).all()
    again = fake_quantize(x_TI, bits)
    assert again.dtype == dtype
    assert torch.equal(again, (codes_TI.float() * scale_T1).to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_do_not_know_each_other(bits):
    x_TI = normal(0, 6, 48)
    assert torch.equal(fake_quantize(x_TI, bits)[2:4], fake_quantize(x_TI[2:4], bits))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_integer_product_is_the_product_of_the_quantized_sides(bits, dtype):
    """W8A8 and W4A4: integers times scales, against float64 on dequantized activations and weights."""
    x_TI, weight_OI = normal(1, 7, 256).to(dtype), normal(2, 24, 256)
    weight = quantize(weight_OI, Scheme("rtn", float(bits), None, True, bits))
    codes_OI = (weight.unpack() - weight.offset).to(torch.int8)
    y_TO = int_linear(x_TI, codes_OI, weight.scales[:, 0], bits)
    codes_TI, scale_T1 = quantize_tokens(x_TI, bits)
    wanted = (codes_TI.double() * scale_T1.double()) @ weight.dequantize(torch.float64).T
    assert y_TO.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert ((y_TO.double() - wanted).abs() <= 2 * unit * wanted.abs() + 1e-30).all()
    plain = x_TI.double() @ weight_OI.double().T
    assert (y_TO.double() - plain).norm() < {8: 0.02, 4: 0.3}[bits] * plain.norm()


@pytest.mark.parametrize("bits", [1, 9])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="use 8 or 4"):
        quantize_tokens(normal(0, 2, 8), bits)
