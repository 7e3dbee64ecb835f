"""Integer codecs: the bytes of 1 to 8 bits, and what RTN, GPTQ, AWQ and HQQ promise about their errors."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Scheme
from moebench.moe.channel_stats import ChannelStats
from moebench.moe.codecs import awq, gptq, hqq, rtn
from moebench.moe.codecs.awq import AwqTensor
from moebench.moe.codecs.calibrated import row_errors
from moebench.moe.codecs.grid import Grid, in_groups
from moebench.moe.codecs.integer import IntTensor
from moebench.moe.codecs.integer_params import Awq, Gptq, Hqq, Rtn
from moebench.moe.codecs.packing import pack_codes, unpack_codes
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import QTensor

BF16_ROUNDING = 2.0**-8
FLOAT32_SLACK = 2.0**-20

bits_1_8 = st.integers(1, 8)
seeds = st.integers(0, 2**31)
groups = st.sampled_from([4, 6, 12, None])


def make_weights(seed=0, rows=8, columns=24, scale=1.0):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def make_stats(x_NI):
    return ChannelStats(x_NI.double().T @ x_NI.double(), x_NI.abs().amax(0), x_NI.abs().mean(0), len(x_NI), len(x_NI))


def make_inputs(seed=0, columns=24, tokens=200):
    """Correlated inputs whose channels differ in size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=g)
    return torch.randn(tokens, columns, generator=g) @ mix * torch.randn(columns, generator=g).exp()


def identity_stats(columns):
    return ChannelStats(torch.eye(columns, dtype=torch.float64), torch.ones(columns), torch.ones(columns), 1, 1.0)


def output_error(tensor, weight, stats):
    return row_errors(tensor.dequantize() - weight, stats.second_moment_II)


def same_bytes(a, b):
    return a.parts().keys() == b.parts().keys() and all(torch.equal(a.parts()[k], b.parts()[k]) for k in a.parts())


def every_codec(weight, stats, bits=3, group=12):
    return [
        rtn.encode(weight, Rtn(bits, group), stats),
        rtn.encode(weight, Rtn(bits, group, True), stats),
        gptq.encode(weight, Gptq(bits, group), stats),
        awq.encode(weight, Awq(bits, group), stats),
        hqq.encode(weight, Hqq(bits, group), stats),
    ]


# --- bytes -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 40), seeds)
def test_a_row_is_one_little_endian_bit_stream(bits, rows, columns, seed):
    q = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert packed.is_contiguous()
    for row, codes in zip(packed, q.tolist(), strict=True):
        stream = int.from_bytes(bytes(row.tolist()), "little")
        assert stream == sum(code << (bits * place) for place, code in enumerate(codes))
    assert torch.equal(unpack_codes(packed, bits, columns), q.int())


def test_three_bits_cross_bytes():
    assert pack_codes(torch.tensor([[1, 2, 7]]), 3).tolist() == [[0b11_010_001, 0b1]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [5, None])
def test_nbytes_is_the_arithmetic_of_the_format(bits, symmetric, group):
    tensor = rtn.encode(make_weights(columns=35), Rtn(bits, group, symmetric))
    row = -(-35 * bits // 8) + (7 if group else 1) * 2 * (1 if symmetric else 2)
    assert tensor.nbytes == 8 * row
    assert sum(part.untyped_storage().nbytes() for part in tensor.parts().values()) == 8 * row


def test_channel_scales_of_awq_count():
    weight, stats = make_weights(), make_stats(make_inputs())
    tensor = awq.encode(weight, Awq(4, 12), stats)
    assert tensor.nbytes == rtn.encode(weight, Rtn(4, 12)).nbytes + 24 * 2
    assert sum(part.untyped_storage().nbytes() for part in tensor.parts().values()) == tensor.nbytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_tensors_come_back_from_their_parts(bits):
    for tensor in every_codec(make_weights(), make_stats(make_inputs()), bits):
        back = type(tensor).of(tensor.parts(), tensor.scheme, tensor.shape)
        assert same_bytes(back, tensor)
        assert torch.equal(back.dequantize(), tensor.dequantize())
        assert (back.nbytes, back.shape, back.scheme) == (tensor.nbytes, (8, 24), tensor.scheme)
        assert isinstance(tensor, QTensor)


def test_linear_is_the_product_with_the_dequantized_weights():
    for dtype in (torch.float32, torch.bfloat16):
        x = make_inputs(tokens=6).to(dtype).view(2, 3, 24)
        for tensor in every_codec(make_weights(), make_stats(make_inputs())):
            assert torch.equal(tensor.linear(x), x @ tensor.dequantize(dtype).T)
            assert tensor.dequantize(dtype).dtype == dtype


# --- rounding to nearest ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([2.0, 4.0, 8.0]), groups, st.booleans(), seeds)
def test_the_settings_int8_int4_and_int2_are_rtn(bits, group, symmetric, seed):
    scheme, weight = Scheme("rtn", bits, group, symmetric), make_weights(seed)
    assert same_bytes(round_to_nearest(weight, scheme), rtn.encode(weight, scheme))


@settings(deadline=None, max_examples=100)
@given(bits_1_8, groups, st.booleans(), seeds, st.sampled_from([1e-3, 1.0, 1e3]))
def test_every_code_is_the_nearest_level(bits, group, symmetric, seed, scale):
    """Half a step inside the range; at its ends what the rounding of scale and offset to bfloat16 cut off."""
    symmetric = symmetric and bits > 1
    weight = make_weights(seed, scale=scale)
    tensor = rtn.encode(weight, Rtn(bits, group, symmetric))
    step = tensor.scales.float()[:, :, None]
    zero = tensor.grid.offsets_OG.float()[:, :, None]
    ends = BF16_ROUNDING * (zero.abs() + 2 ** (bits - 1) * step) / (1 - BF16_ROUNDING)
    error = in_groups((tensor.dequantize() - weight).abs(), group)
    assert (error <= torch.maximum(step / 2, ends) + FLOAT32_SLACK * scale * 10).all()
    levels = tensor.grid.levels(torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).expand(*tensor.scales.shape, -1))
    nearest = (in_groups(weight, group)[..., None] - levels[:, :, None]).abs().amin(-1)
    assert (error <= nearest + FLOAT32_SLACK * scale * 10).all()


@pytest.mark.parametrize(("symmetric", "fewest"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("group", [32, None])
def test_the_error_falls_with_every_bit(symmetric, fewest, group):
    weight = make_weights(3, 32, 128)
    tensors = [rtn.encode(weight, Rtn(bits, group, symmetric)) for bits in range(fewest, 9)]
    errors = [(tensor.dequantize() - weight).norm().item() for tensor in tensors]
    assert all(after < 0.7 * before for before, after in pairwise(errors))
    assert errors[-1] < 0.01 * weight.norm()


@settings(deadline=None, max_examples=30)
@given(groups, seeds)
def test_one_symmetric_bit_is_the_mean_size_times_the_sign(group, seed):
    weight = make_weights(seed)
    tensor = rtn.encode(weight, Rtn(1, group, True))
    alpha = in_groups(weight, group).abs().mean(-1, keepdim=True).bfloat16().float()
    assert torch.equal(tensor.dequantize(), (alpha * in_groups(weight, group).sign()).flatten(1))
    assert torch.equal(tensor.unpack(), (weight > 0).int())
    assert tensor.zeros is None
    for other in (0.95, 1.05):
        worse = (other * tensor.dequantize() - weight).square().sum()
        assert (tensor.dequantize() - weight).square().sum() < worse


def test_one_asymmetric_bit_is_the_least_or_the_largest():
    weight = torch.tensor([[-1.0, -0.75, 0.5, 1.0], [2.0, 3.25, 4.0, 2.5]])
    assert rtn.encode(weight, Rtn(1, None)).dequantize().tolist() == [[-1, -1, 1, 1], [2, 4, 4, 2]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(bits, symmetric):
    weight = torch.cat([torch.zeros(1, 24), make_weights(rows=1)])
    stats = make_stats(make_inputs())
    for tensor in (rtn.encode(weight, Rtn(bits, 12, symmetric)), gptq.encode(weight, Gptq(bits, 12, symmetric), stats)):
        assert torch.count_nonzero(tensor.dequantize()[0]) == 0
    assert torch.count_nonzero(awq.encode(weight, Awq(bits, 12, symmetric), stats).dequantize()[0]) == 0
    assert torch.count_nonzero(hqq.encode(weight, Hqq(bits, 12)).dequantize()[0]) == 0


# --- GPTQ ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(bits_1_8, groups, st.booleans(), st.booleans(), seeds)
def test_gptq_of_inputs_that_do_not_correlate_is_rtn_bit_for_bit(bits, group, symmetric, desc_act, seed):
    weight = make_weights(seed)
    tensor = gptq.encode(weight, Gptq(bits, group, symmetric, desc_act=desc_act), identity_stats(24))
    assert same_bytes(tensor, rtn.encode(weight, Rtn(bits, group, symmetric)))
    assert tensor.scheme == Scheme("gptq", float(bits), group, symmetric)


def compensated_by_solving(weight, hessian, bits, symmetric):
    """Codes of whole-row GPTQ from its definition: with columns 0..j fixed, the rest minimises e H e^T, solved anew."""
    grid = Grid.fit(weight[:, None], bits, symmetric)
    fixed, codes = weight.double().clone(), []
    current = weight.double()
    for j in range(weight.shape[1]):
        codes.append(grid.codes(current[:, j, None, None]))
        fixed[:, j] = grid.levels(codes[-1])[:, 0, 0]
        error, rest = weight.double()[:, : j + 1] - fixed[:, : j + 1], slice(j + 1, None)
        current = weight.double().clone()
        current[:, rest] += torch.linalg.solve(hessian[rest, rest], (error @ hessian[: j + 1, rest]).T).T
    return IntTensor.pack(torch.cat(codes, dim=2), grid, Scheme("gptq", float(bits), None, symmetric))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.booleans(), seeds)
def test_gptq_is_what_solving_for_the_remaining_columns_gives(bits, symmetric, seed):
    weight, stats = make_weights(seed, 5, 12), make_stats(make_inputs(seed, 12))
    hessian = 2 * stats.second_moment_II
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    wanted = compensated_by_solving(weight, damped, bits, symmetric)
    assert same_bytes(gptq.encode(weight, Gptq(bits, None, symmetric), stats, block=5), wanted)


def test_a_groups_scales_are_those_of_the_compensated_weights():
    """The second group, given the first: the same problem with the first group's error moved over beforehand."""
    weight, stats = make_weights(7), make_stats(make_inputs(7))
    tensor = gptq.encode(weight, Gptq(3, 12, damp=0.0), stats)
    hessian, first, rest = stats.second_moment_II, slice(None, 12), slice(12, None)
    error = (weight - tensor.dequantize()).double()[:, first]
    moved = weight[:, rest].double() + torch.linalg.solve(hessian[rest, rest], (error @ hessian[first, rest]).T).T
    other = ChannelStats(hessian[rest, rest], stats.absmax_I[rest], stats.mean_abs_I[rest], stats.tokens, stats.weight)
    second = gptq.encode(moved, Gptq(3, 12, damp=0.0), other)
    assert torch.equal(second.scales, tensor.scales[:, 1:])
    assert torch.equal(second.zeros, tensor.zeros[:, 1:])
    assert torch.equal(second.unpack(), tensor.unpack()[:, rest])


@settings(deadline=None, max_examples=25)
@given(groups, st.sampled_from([1, 5, 7, 9, 24, 100]), st.booleans(), seeds)
def test_the_block_of_gptq_changes_nothing(group, block, desc_act, seed):
    weight, stats = make_weights(seed), make_stats(make_inputs(seed))
    params = Gptq(4, group, desc_act=desc_act)
    assert same_bytes(gptq.encode(weight, params, stats, block), gptq.encode(weight, params, stats, 24))


def test_the_factor_of_gptq_is_that_of_the_inverse():
    hessian = make_stats(make_inputs()).second_moment_II
    upper = gptq.inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(24, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(upper, torch.linalg.cholesky(torch.linalg.inv(damped), upper=True), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_keeps_outputs_nearer_than_rtn(seed, bits, desc_act):
    weight, stats = make_weights(seed, 32, 96), make_stats(make_inputs(seed, 96, 400))
    for symmetric in (True, False):
        ours = gptq.encode(weight, Gptq(bits, 32, symmetric, desc_act=desc_act), stats)
        theirs = rtn.encode(weight, Rtn(bits, 32, symmetric))
        assert output_error(ours, weight, stats).sum() < 0.9 * output_error(theirs, weight, stats).sum()
        assert (ours.dequantize() - weight).norm() > (theirs.dequantize() - weight).norm()


def test_with_two_bits_only_desc_act_is_nearer_than_rtn():
    weight, stats = make_weights(0, 32, 96, 0.02), make_stats(make_inputs(0, 96, 400))
    theirs = output_error(rtn.encode(weight, Rtn(2, 32)), weight, stats).sum()
    plain, ordered = (gptq.encode(weight, Gptq(2, 32, desc_act=desc_act), stats) for desc_act in (False, True))
    assert output_error(ordered, weight, stats).sum() < 0.8 * theirs < 0.8 * output_error(plain, weight, stats).sum()


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 8), seeds)
def test_with_desc_act_the_order_of_the_channels_does_not_matter(bits, seed):
    weight, stats = make_weights(seed), make_stats(make_inputs(seed))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    moment = stats.second_moment_II[order][:, order]
    moved = ChannelStats(moment, stats.absmax_I[order], stats.mean_abs_I[order], stats.tokens, stats.weight)
    params = Gptq(bits, None, desc_act=True)
    once, other = gptq.encode(weight, params, stats), gptq.encode(weight[:, order], params, moved)
    assert torch.equal(once.unpack()[:, order], other.unpack())


def test_channels_without_inputs_are_rounded_to_nearest():
    x = make_inputs(2)
    x[:, 12:] = 0
    weight = make_weights(2)
    tensor, nearest = gptq.encode(weight, Gptq(3, 12), make_stats(x)), rtn.encode(weight, Rtn(3, 12))
    assert torch.equal(tensor.dequantize()[:, 12:], nearest.dequantize()[:, 12:])
    assert not torch.equal(tensor.unpack()[:, :12], nearest.unpack()[:, :12])
    untouched = ChannelStats(torch.zeros(24, 24, dtype=torch.float64), torch.zeros(24), torch.zeros(24), 0, 0.0)
    assert same_bytes(gptq.encode(weight, Gptq(3, 12), untouched), nearest)
    assert torch.equal(awq.encode(weight, Awq(3, 12), untouched).dequantize(), nearest.dequantize())


def test_fewer_tokens_than_channels_need_damping():
    weight, stats = make_weights(), make_stats(make_inputs(tokens=5))
    ours, theirs = gptq.encode(weight, Gptq(4, 12), stats), rtn.encode(weight, Rtn(4, 12))
    assert output_error(ours, weight, stats).sum() < output_error(theirs, weight, stats).sum()
    singular = ChannelStats(torch.ones(24, 24).double(), torch.ones(24), torch.ones(24), 1, 1.0)
    with pytest.raises(ValueError, match=r"singular with damp=0; use a larger damp, such as 0\.01\.$"):
        gptq.encode(weight, Gptq(4, 12, damp=0.0), singular)


# --- AWQ -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(bits_1_8, groups, st.booleans(), seeds)
def test_awq_with_exponent_0_is_rtn(bits, group, symmetric, seed):
    weight, scheme = make_weights(seed), Scheme("awq", float(bits), group, symmetric)
    ones = awq.channel_scales(make_stats(make_inputs(seed)).mean_abs_I, 0.0)
    assert torch.equal(ones, torch.ones(24).bfloat16())
    tensor, nearest = awq.scaled(weight, ones, scheme), rtn.encode(weight, Rtn(bits, group, symmetric))
    assert same_bytes(tensor.integer, nearest)
    assert torch.equal(tensor.dequantize(), nearest.dequantize())


@settings(deadline=None, max_examples=15)
@given(bits_1_8, groups, st.booleans(), st.sampled_from([0.0, 0.5]), seeds)
def test_awq_is_never_worse_than_rtn_nor_clipping_than_none(bits, group, symmetric, clip, seed):
    weight, stats = make_weights(seed), make_stats(make_inputs(seed))
    ours = awq.encode(weight, Awq(bits, group, symmetric, clip=clip), stats)
    nearest = rtn.encode(weight, Rtn(bits, group, symmetric))
    assert output_error(ours, weight, stats).sum() <= output_error(nearest, weight, stats).sum()
    unclipped = awq.encode(weight, Awq(bits, group, symmetric, clip=0.0), stats)
    assert torch.equal(ours.channel_scales, unclipped.channel_scales)
    assert (output_error(ours, weight, stats) <= output_error(unclipped, weight, stats)).all()


def test_awq_protects_channels_of_large_inputs():
    x = make_weights(1, 500, 64)
    x[:, [3, 40]] *= 50
    weight, stats = make_weights(2, 32, 64), make_stats(x)
    ours, nearest = awq.encode(weight, Awq(3, 32), stats), rtn.encode(weight, Rtn(3, 32))
    assert output_error(ours, weight, stats).sum() < 0.1 * output_error(nearest, weight, stats).sum()
    assert ours.channel_scales.topk(2).indices.sort().values.tolist() == [3, 40]
    assert torch.equal(ours.dequantize(), ours.integer.dequantize() / ours.channel_scales.float())


def test_awq_scales_channels_by_a_power_of_their_mean_size():
    mean = torch.tensor([1.0, 4.0, 0.25, 16.0])
    ratio = awq.channel_scales(mean, 0.5).float()
    assert torch.allclose(ratio / ratio[0], mean.sqrt(), rtol=2 * BF16_ROUNDING)
    assert torch.allclose(ratio.max() * ratio.min(), torch.tensor(1.0), rtol=2 * BF16_ROUNDING)
    assert torch.equal(awq.channel_scales(8 * mean, 0.5), awq.channel_scales(mean, 0.5))


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_clipping_takes_the_best_of_all_cuts_of_a_row(ratio):
    weight, stats = make_weights(5, 16, 24), make_stats(make_inputs(5))
    params, moment = Awq(3, None), stats.second_moment_II
    scales = awq.channel_scales(stats.mean_abs_I, ratio)
    start = awq.scaled(weight, scales, params.scheme())
    ours = awq.clipped(weight, start, moment, params)
    scaled = weight * scales.float()
    cuts = [scaled.abs().amax(1, keepdim=True) * (1 - step / 20) for step in range(11)]
    tried = [rtn.encode(scaled.clamp(-cut, cut), Rtn(3, None)).dequantize() / scales.float() for cut in cuts]
    least = torch.stack([row_errors(made - weight, moment) for made in tried]).amin(0)
    assert torch.allclose(row_errors(ours.dequantize() - weight, moment), least, rtol=1e-9)
    assert (least < row_errors(start.dequantize() - weight, moment)).any()


# --- HQQ -------------------------------------------------------------------------------------------------------------


def p_norms(tensor, weight, group, p=0.7):
    return in_groups(tensor.dequantize() - weight, group).abs().pow(p).sum(-1)


@settings(deadline=None, max_examples=30)
@given(bits_1_8, groups, seeds)
def test_hqq_is_nowhere_worse_than_rtn_in_its_norm(bits, group, seed):
    weight = make_weights(seed)
    nearest = rtn.encode(weight, Rtn(bits, group))
    tensor = hqq.encode(weight, Hqq(bits, group))
    assert torch.equal(tensor.scales, nearest.scales)
    assert (p_norms(tensor, weight, group) <= p_norms(nearest, weight, group) * (1 + 1e-6)).all()
    assert same_bytes(hqq.encode(weight, Hqq(bits, group, iterations=0)), nearest)


def test_hqq_lowers_its_norm_on_the_whole():
    weight = make_weights(4, 64, 128)
    for bits in (2, 3, 4):
        before = p_norms(rtn.encode(weight, Rtn(bits, 64)), weight, 64).sum()
        assert p_norms(hqq.encode(weight, Hqq(bits)), weight, 64).sum() < 0.98 * before


def offset_by_description(weight, bits, iterations, beta, kappa, p=0.7):
    """The best offset of one group: in turns the error beyond the threshold split off, and the mean of what is left."""
    grid = Grid.fit(weight[None, None], bits, False)
    scale, zero, top = float(grid.scales_OG), float(grid.zeros_OG), 2 ** (bits - 1)
    best = None
    for step in range(iterations + 1):
        codes = [min(max(round((w - zero) / scale), -top), top - 1) for w in weight.tolist()]
        errors = [w - (code * scale + zero) for w, code in zip(weight.tolist(), codes, strict=True)]
        norm = sum(abs(error) ** p for error in errors)
        if best is None or norm < best[0]:
            best = (norm, zero)
        sizes = [abs(error) / scale for error in errors]
        kept = [max(0.0, size - size ** (p - 1) / (beta * kappa**step)) if size else 0.0 for size in sizes]
        outliers = [scale * size * (1 if error > 0 else -1) for size, error in zip(kept, errors, strict=True)]
        fitted = [w - o - code * scale for w, o, code in zip(weight.tolist(), outliers, codes, strict=True)]
        zero = float(torch.tensor(sum(fitted) / len(fitted)).bfloat16())
    return best[1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_hqq_takes_the_steps_of_its_description(bits, iterations):
    weight = make_weights(bits, 12, 16)
    zeros = hqq.encode(weight, Hqq(bits, None, iterations=iterations, beta=4.0, kappa=1.5)).zeros
    wanted = [offset_by_description(row, bits, iterations, 4.0, 1.5) for row in weight]
    assert zeros[:, 0].tolist() == wanted
    assert zeros[:, 0].tolist() != rtn.encode(weight, Rtn(bits, None)).zeros[:, 0].tolist()


@settings(deadline=None, max_examples=20)
@given(bits_1_8, st.integers(-6, 6), seeds)
def test_hqq_does_not_care_for_the_unit_of_the_weights(bits, power, seed):
    weight = make_weights(seed)
    once, other = hqq.encode(weight, Hqq(bits, 12)), hqq.encode(weight * 2.0**power, Hqq(bits, 12))
    assert torch.equal(once.codes, other.codes)
    assert torch.equal(once.zeros * 2.0**power, other.zeros)


def test_shrinking_with_p_1_is_the_soft_threshold():
    error = torch.linspace(-1, 1, 21)
    assert torch.allclose(hqq.shrink(error, 10.0, 1.0), torch.nn.functional.softshrink(error, 0.1), atol=1e-7)
    assert hqq.shrink(torch.zeros(3), 10.0, 0.7).tolist() == [0, 0, 0]


UNIFORM_ERRORS = {8: 0.0036, 4: 0.063, 3: 0.130, 2: 0.307, 1: 0.913}
"""Relative errors of the hqq library (0.2.8, groups of 64) on uniform weights, measured once."""


def uniform_weights():
    return (torch.rand(64, 1024, generator=torch.Generator().manual_seed(0)) * 2 - 1) / 32


@pytest.mark.parametrize("bits", UNIFORM_ERRORS)
def test_hqq_errs_as_much_as_the_library_was_measured_to(bits):
    weight = uniform_weights()
    error = (hqq.encode(weight, Hqq(bits)).dequantize() - weight).norm() / weight.norm()
    assert error == pytest.approx(UNIFORM_ERRORS[bits], rel=0.05)


@pytest.mark.parametrize("bits", UNIFORM_ERRORS)
def test_hqq_beside_the_library(bits):
    library = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = uniform_weights()
    codes, meta = library.quantize(weight, bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    theirs = library.dequantize(codes, {**meta, "compute_dtype": torch.float32})
    ours = hqq.encode(weight, Hqq(bits)).dequantize()
    assert float((ours - weight).norm()) == pytest.approx(float((theirs - weight).norm()), rel=0.02)
    assert (ours - weight).abs().pow(0.7).sum() < 1.01 * (theirs - weight).abs().pow(0.7).sum()


# --- parameters and refusals -----------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_papers():
    assert Rtn().scheme() == Scheme("rtn", 4.0, 128, False)
    assert Gptq().scheme() == Scheme("gptq", 4.0, 128, False)
    assert (Gptq().damp, Gptq().desc_act) == (0.01, False)
    assert Awq().scheme() == Scheme("awq", 4.0, 128, False)
    assert Awq().grid == 20
    assert Hqq().scheme() == Scheme("hqq", 4.0, 64, False)
    assert (Hqq().p, Hqq().iterations) == (0.7, 20)


@pytest.mark.parametrize("params", [Rtn(3, 12, True), Gptq(5, None), Awq(1, 6), Hqq(2, 4)])
def test_a_scheme_stands_for_the_defaults(params):
    assert type(params).of(params) is params
    assert type(params).of(params.scheme()) == params


def test_encoding_by_scheme_is_encoding_with_the_defaults():
    weight, stats = make_weights(), make_stats(make_inputs())
    for codec, params in ((rtn, Rtn(3, 12)), (gptq, Gptq(3, 12)), (awq, Awq(3, 12)), (hqq, Hqq(3, 12))):
        tensor = codec.encode(weight, params.scheme(), stats)
        assert same_bytes(tensor, codec.encode(weight, params, stats))
        assert tensor.scheme == params.scheme()
        assert isinstance(tensor, AwqTensor if codec is awq else IntTensor)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rtn(0), "bits=0 must be a whole number from 1 to 8"),
        (lambda: Gptq(9), "bits=9 must be a whole number from 1 to 8"),
        (lambda: Awq(4, 0), "group=0 must be at least 1"),
        (lambda: Gptq(damp=-1), "damp=-1 must be at least 0"),
        (lambda: Awq(grid=0), "grid=0 must be at least 1"),
        (lambda: Awq(clip=1.0), r"clip=1.0 must lie in \[0, 1\)"),
        (lambda: Hqq(symmetric=True), "use symmetric=false"),
        (lambda: Hqq(p=1.5), r"p=1.5 must lie in \(0, 1\]"),
        (lambda: Hqq(beta=0), "beta and kappa above 0"),
        (lambda: Rtn.of(Scheme("gptq", 4.0, 128)), "the scheme is one of gptq"),
        (lambda: Rtn.of(Scheme("rtn", 2.5, 128)), "bits=2.5 must be a whole number"),
        (lambda: Rtn.of(Scheme("rtn", 4.0, 128, act_bits=4)), "leave act_bits=4 out"),
    ],
)
def test_impossible_parameters_are_refused_in_a_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


CODECS = [(rtn, Rtn(3, 12)), (gptq, Gptq(3, 12)), (awq, Awq(3, 12)), (hqq, Hqq(3, 12))]


@pytest.mark.parametrize(("codec", "params"), CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(codec, params, bad):
    weight = make_weights()
    weight[1, 20] = bad
    with pytest.raises(ValueError, match=r"NaN or infinity and cannot be quantized; repair the checkpoint\.$"):
        codec.encode(weight, params, make_stats(make_inputs()))


@pytest.mark.parametrize(("codec", "params"), CODECS)
def test_groups_that_do_not_divide_are_refused(codec, params):
    with pytest.raises(ValueError, match=r"group=12 does not divide the input width 20; use .*\.$"):
        codec.encode(make_weights(columns=20), params, make_stats(make_inputs(columns=20)))


@pytest.mark.parametrize(("codec", "params"), [CODECS[1], CODECS[2]])
def test_statistics_that_are_missing_or_do_not_fit_are_refused(codec, params):
    weight, stats = make_weights(), make_stats(make_inputs())
    with pytest.raises(ValueError, match=r"needs statistics .*; calibrate first, or use rtn or hqq without any\.$"):
        codec.encode(weight, params, None)
    with pytest.raises(ValueError, match=r"of 36 input channels and the weights have 24; give each matrix its own\.$"):
        codec.encode(weight, params, make_stats(make_inputs(columns=36)))
    stats.second_moment_II[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"statistics contain NaN or infinity; calibrate anew .*\.$"):
        codec.encode(weight, params, stats)


def test_parameters_import_no_torch():
    code = "import sys, moebench.moe.codecs.integer_params\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("codec", ["gptq", "awq"])
def test_statistics_without_second_moments_are_refused_by_those_that_read_them(codec):
    full = make_stats(make_inputs())
    bare = ChannelStats(None, full.absmax_I, full.mean_abs_I, full.tokens, full.weight)
    with pytest.raises(ValueError, match=rf"{codec} needs the second moment .* calibrate with moments=True"):
        {"gptq": gptq, "awq": awq}[codec].encode(make_weights(), {"gptq": Gptq, "awq": Awq}[codec](3, None), bare)
