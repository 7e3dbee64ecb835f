"""RTN codes: error bounds, packing, exact sizes, and what torch's packed matmuls make of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Scheme
from moebench.moe.codecs.integer import IntTensor
from moebench.moe.codecs.packing import pack_codes
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore, QTensor
from moebench.moe.plugins import Int2, Int4, Int8, NoQuantization
from moebench.moe.quantization import coded, keep

BF16_ROUNDING = 2.0**-8
FLOAT32_SLACK = 2.0**-20

schemes = st.builds(
    Scheme, st.just("rtn"), st.sampled_from([2.0, 4.0, 8.0]), st.sampled_from([2, 4, 8, None]), st.booleans()
)
values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False).map(lambda v: 0.0 if abs(v) < 1e-20 else v)
matrices = st.lists(values, min_size=16, max_size=16).map(lambda v: torch.tensor(v).reshape(2, 8))


def per_weight(tensor, width):
    """Scales or zeros [out, groups] spread to [out, in]."""
    return tensor.float().repeat_interleave(width // tensor.shape[1], dim=1)


def q4_1_weights(seed=0, rows=48, width=576):
    """Weights as GGUF Q4_1 stores them: blocks of 32, w = d q + m with float16 d and m, both end codes in use."""
    g = torch.Generator().manual_seed(seed)
    d = (0.001 + 0.01 * torch.rand(rows, width // 32, 1, generator=g)).half().float()
    m = (-d * (4 + 7 * torch.rand(d.shape, generator=g))).half().float()
    q = torch.randint(0, 16, (rows, width // 32, 32), generator=g)
    q[..., 3], q[..., 17] = 0, 15
    return (d * q + m).flatten(1), q.flatten(1)


def relative_error(tensor, weight):
    return ((tensor.dequantize() - weight).norm() / weight.norm()).item()


@settings(deadline=None, max_examples=150)
@given(matrices, schemes)
def test_error_is_half_a_step_plus_what_bfloat16_cuts_off(weight, scheme):
    tensor = round_to_nearest(weight, scheme)
    step = per_weight(tensor.scales, 8)
    zero = torch.zeros_like(step) if tensor.zeros is None else per_weight(tensor.zeros, 8)
    top = 2 ** (scheme.bits - 1)
    ends = BF16_ROUNDING * (zero.abs() + top * step) / (1 - BF16_ROUNDING)
    error = (tensor.dequantize() - weight).abs()
    assert (error <= torch.maximum(step / 2, ends) + FLOAT32_SLACK * (weight.abs() + zero.abs())).all()


@settings(deadline=None, max_examples=100)
@given(matrices, st.sampled_from([2, 4, 8, None]), st.booleans())
def test_four_bits_stay_within_half_a_step_where_a_group_holds_zero(weight, group, symmetric):
    weight[:, ::2] = 0
    tensor = round_to_nearest(weight, Scheme("rtn", 4.0, group, symmetric))
    error = (tensor.dequantize() - weight).abs()
    assert (error <= per_weight(tensor.scales, 8) * (0.5 + 2.0**-15)).all()


@settings(deadline=None, max_examples=100)
@given(matrices, schemes)
def test_dequantize_is_code_times_scale_plus_zero(weight, scheme):
    tensor = round_to_nearest(weight, scheme)
    codes = tensor.unpack()
    assert codes.dtype == torch.int32
    if scheme.bits < 8:
        assert codes.min() >= 0
        assert codes.max() < 2**scheme.bits
        codes = codes - 2 ** (int(scheme.bits) - 1)
    wanted = codes.float() * per_weight(tensor.scales, 8)
    if not scheme.symmetric:
        wanted = wanted + per_weight(tensor.zeros, 8)
    assert torch.equal(tensor.dequantize(), wanted)
    assert torch.equal(tensor.dequantize(torch.bfloat16), wanted.bfloat16())
    assert (tensor.zeros is None) == scheme.symmetric
    assert isinstance(tensor, QTensor)


@settings(deadline=None, max_examples=100)
@given(matrices, st.sampled_from([2.0, 4.0, 8.0]), st.sampled_from([2, 4, 8, None]))
def test_symmetric_quantization_of_the_result_changes_nothing(weight, bits, group):
    scheme = Scheme("rtn", bits, group, True)
    once = round_to_nearest(weight, scheme)
    twice = round_to_nearest(once.dequantize(), scheme)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(once.scales, twice.scales)


@settings(deadline=None, max_examples=100)
@given(matrices, st.sampled_from([2, 4, 8, None]))
def test_asymmetric_four_bits_of_the_result_change_nothing_but_the_last_digits_of_the_offset(weight, group):
    weight[:, ::2] = 0
    scheme = Scheme("rtn", 4.0, group, False)
    once = round_to_nearest(weight, scheme)
    twice = round_to_nearest(once.dequantize(), scheme)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(once.scales, twice.scales)
    assert ((once.zeros - twice.zeros).abs().float() <= FLOAT32_SLACK * once.scales.float()).all()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 4]), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_codes_round_trip(bits, rows, width, seed):
    q = torch.randint(0, 2**bits, (rows, width), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(q, bits)
    assert packed.shape == (rows, -(-width * bits // 8))
    assert packed.dtype == torch.uint8
    tensor = IntTensor(packed, torch.ones(rows, 1).bfloat16(), None, Scheme("rtn", float(bits)), (rows, width))
    assert torch.equal(tensor.unpack(), q.int())
    assert torch.equal(tensor.dequantize(), q.float() - 2 ** (bits - 1))


def test_the_first_code_lies_lowest_in_a_byte():
    assert pack_codes(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]
    assert pack_codes(torch.tensor([[0, 1, 2, 3, 1]]), 2).tolist() == [[0b11_10_01_00, 0b01]]


@pytest.mark.parametrize(
    ("scheme", "bytes_"),
    [
        (Scheme("rtn", 8.0, None, True), 6 * 64 + 6 * 2),
        (Scheme("rtn", 8.0, 32, False), 6 * 64 + 6 * 2 * 2 * 2),
        (Scheme("rtn", 4.0, 32, True), 6 * 32 + 6 * 2 * 2),
        (Scheme("rtn", 4.0, 16, False), 6 * 32 + 6 * 4 * 2 * 2),
        (Scheme("rtn", 2.0, 32, True), 6 * 16 + 6 * 2 * 2),
        (Scheme("rtn", 2.0, 16, False), 6 * 16 + 6 * 4 * 2 * 2),
    ],
)
def test_nbytes_is_codes_scales_and_zeros(scheme, bytes_):
    tensor = round_to_nearest(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), scheme)
    assert tensor.nbytes == bytes_
    stored = [tensor.codes, tensor.scales] + ([] if tensor.zeros is None else [tensor.zeros])
    assert sum(t.untyped_storage().nbytes() for t in stored) == bytes_


@settings(deadline=None, max_examples=30)
@given(schemes)
def test_a_group_of_zeros_is_exact(scheme):
    weight = torch.zeros(2, 8)
    weight[1] = torch.arange(8) - 3.5
    assert torch.count_nonzero(round_to_nearest(weight, scheme).dequantize()[0]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_not_finite_are_refused(bad, symmetric):
    weight = torch.ones(2, 8)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        round_to_nearest(weight, Scheme("rtn", 4.0, 4, symmetric))


def test_group_that_does_not_divide_names_groups_that_do():
    with pytest.raises(ValueError, match="group=128 does not divide the input width 576; use 72, 96, 144, 192") as info:
        round_to_nearest(torch.ones(2, 576), Scheme("rtn", 4.0, 128))
    assert str(info.value).count(".") == 1
    store = ExpertStore(torch.ones(1, 384, 576), torch.ones(1, 576, 192), ("ffn",))
    with pytest.raises(ValueError, match="576 and 192; use 48, 64, 96, 192"):
        coded(Int4(group=128))(store, None)
    for group in (48, 64, 96, 192):
        coded(Int4(group=group))(store, None)


def test_asymmetric_groups_of_32_are_free_on_weights_that_came_from_q4_1():
    weight, q = q4_1_weights()
    exact = round_to_nearest(weight, Scheme("rtn", 4.0, 32, False), scale_dtype=torch.float32)
    assert torch.equal(exact.dequantize(), weight)
    assert torch.equal(exact.unpack(), q.int())
    stored = round_to_nearest(weight, Scheme("rtn", 4.0, 32, False))
    assert torch.equal(stored.unpack(), q.int())
    assert relative_error(stored, weight) < BF16_ROUNDING
    for scheme in (Scheme("rtn", 4.0, 32, True), Scheme("rtn", 4.0, 192, False), Scheme("rtn", 4.0, 576, False)):
        assert relative_error(round_to_nearest(weight, scheme), weight) > 20 * relative_error(stored, weight)


def test_a_finer_code_is_nearer():
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    order = [Int2(group=None), Int2(group=32), Int4(group=None), Int4(group=32), Int8(), Int8(group=32)]
    errors = [relative_error(round_to_nearest(weight, params.scheme()), weight) for params in order]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.2 < errors[1]
    assert errors[-1] < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_torch_int4_matmul_computes_with_the_dequantized_weights(group, symmetric):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    tensor = round_to_nearest(weight, Scheme("rtn", 4.0, group, symmetric))
    zeros = torch.zeros_like(tensor.scales) if tensor.zeros is None else tensor.zeros
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(tensor.unpack(), 1)
    scales_and_zeros = torch.stack([tensor.scales.T, zeros.T], dim=-1).contiguous()
    identity = torch.eye(128, dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, packed, group, scales_and_zeros)
    assert torch.equal(product.T, tensor.dequantize(torch.bfloat16))


def test_torch_int8_matmul_computes_with_the_dequantized_weights():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    tensor = round_to_nearest(weight, Int8().scheme())
    identity = torch.eye(128, dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int8pack_mm(identity, tensor.codes, tensor.scales.flatten())
    assert torch.equal(product.T, tensor.dequantize(torch.bfloat16))


def make_store(dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    gate_up, down = torch.randn(3, 16, 32, generator=g), torch.randn(3, 32, 8, generator=g)
    return ExpertStore(gate_up.to(dtype), down.to(dtype), ("ffn", "zero", "ffn", "ffn"))


def test_none_returns_the_store_itself():
    store = make_store()
    assert keep(NoQuantization())(store, None) is store


@pytest.mark.parametrize("params", [Int8(), Int8(4, False), Int4(8), Int4(None, True), Int2(8), Int2(None, True)])
def test_rtn_quantizes_every_expert_of_a_store(params):
    store = make_store(torch.bfloat16)
    quantized = coded(params)(store, None)
    assert quantized.quantized
    assert quantized.kinds == store.kinds
    assert quantized.schemes == (params.scheme(),) * 3
    gate_up, down = quantized.dense()
    assert (gate_up.shape, down.shape) == (store.gate_up.shape, store.down.shape)
    assert torch.equal(gate_up[1], round_to_nearest(store.gate_up[1].float(), params.scheme()).dequantize())
    assert quantized.nbytes == sum(t.nbytes for t in (*quantized.gate_up, *quantized.down))
    assert quantized.nbytes < 2 * store.nbytes
    with pytest.raises(ValueError, match="quantized already"):
        coded(params)(quantized, None)
