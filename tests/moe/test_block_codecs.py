"""Block codecs: exact bytes and values against libraries, exhaustive tables, and what each codec promises."""

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from moebench.contracts import MoebenchError, Scheme
from moebench.moe.blocks import codebook, microscaling
from moebench.moe.blocks.codecs import encode, tensor_of
from moebench.moe.blocks.gguf import decodable, from_blocks, read_matrices
from moebench.moe.blocks.params import GGUF_BLOCKS, Binary, Fp4, Fp8, Gguf, Mxfp4, Nf4, Nvfp4, Ternary
from moebench.moe.blocks.ternary import pack_trits, unpack_trits
from moebench.moe.experts import QTensor

ROWS, WIDTH = 6, 512
BITS_PER_WEIGHT = [
    (Nf4(), 4.5),
    (Nf4(128), 4.25),
    (Fp4(), 4.5),
    (Mxfp4(), 4.25),
    (Nvfp4(), 4.5 + 32 / (ROWS * WIDTH)),
    (Fp8("e4m3"), 8 + 32 / WIDTH),
    (Fp8("e5m2"), 8 + 32 / WIDTH),
    (Gguf("Q4_0"), 4.5),
    (Gguf("Q5_0"), 5.5),
    (Gguf("Q8_0"), 8.5),
    (Gguf("TQ2_0"), 2.0625),
    (Gguf("MXFP4"), 4.25),
    (Ternary(), 8 * 103 / 512 + 32 / (ROWS * WIDTH)),
    (Binary(), 1.125),
    (Binary(None), 1 + 16 / WIDTH),
]
CODECS = [params for params, _ in BITS_PER_WEIGHT]
every_codec = pytest.mark.parametrize("params", CODECS, ids=str)


def normal(rows=ROWS, width=WIDTH, seed=0, scale=0.02):
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


seeds = st.integers(0, 2**32 - 1)
scales = st.integers(-60, 60).map(lambda exponent: 2.0**exponent)


def same_bytes(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# --- every codec -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("params", "bits"), BITS_PER_WEIGHT, ids=str)
def test_bytes_are_the_arithmetic_of_the_format(params, bits):
    tensor = encode(normal(), params.scheme())
    assert 8 * tensor.nbytes == bits * ROWS * WIDTH
    assert isinstance(tensor, QTensor)


@every_codec
def test_parts_in_a_file_rebuild_the_matrix(params):
    tensor = encode(normal(), params.scheme())
    kept = load(save({name: part.contiguous() for name, part in tensor.parts().items()}))
    again = tensor_of(kept, tensor.scheme, tensor.shape)
    assert type(again) is type(tensor)
    assert sum(part.nbytes for part in kept.values()) == tensor.nbytes
    assert torch.equal(again.dequantize(), tensor.dequantize())
    stacked = {name: torch.stack([part, part]) for name, part in kept.items()}
    assert all(same_bytes(stacked[name][1], part) for name, part in kept.items())


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_the_product_with_the_dequantized_matrix(params, dtype):
    tensor = encode(normal(), params.scheme())
    x_TI = normal(3, seed=1, scale=1.0).to(dtype)
    assert torch.equal(tensor.linear(x_TI), x_TI @ tensor.dequantize().to(dtype).T)
    assert torch.equal(tensor.dequantize(dtype), tensor.dequantize().to(dtype))
    assert tensor.dequantize(dtype).shape == tensor.shape == (ROWS, WIDTH)


@every_codec
def test_zeros_stay_zeros(params):
    weight = normal()
    weight[0] = 0
    for codes in (encode(weight, params.scheme()).dequantize()[0], encode(0 * weight, params.scheme()).dequantize()):
        assert (codes == 0).all()


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_codec_takes_what_is_not_finite(params, bad):
    weight = normal()
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="repair the checkpoint"):
        encode(weight, params.scheme())


@pytest.mark.parametrize(
    ("params", "block"),
    [(Nf4(), 64), (Fp4(), 64), (Mxfp4(), 32), (Nvfp4(), 16), (Gguf("Q8_0"), 32), (Gguf("TQ2_0"), 256)],
    ids=str,
)
def test_a_width_without_whole_blocks_is_refused_with_widths_that_work(params, block):
    with pytest.raises(ValueError, match=rf"multiple of {block} \(the nearest: {block} or {2 * block}\)"):
        encode(normal(2, block + 8), params.scheme())
    with pytest.raises(ValueError, match=rf"the nearest: {block}\)"):
        encode(normal(2, 8), params.scheme())


def test_other_refusals_name_the_remedy():
    with pytest.raises(ValueError, match="group=48 does not divide the input width 512; use 16, 32, 64, 128"):
        encode(normal(), Binary(48).scheme())
    with pytest.raises(ValueError, match="64 is usual"):
        Nf4(63)
    with pytest.raises(ValueError, match="128 is usual"):
        Binary(0)
    with pytest.raises(MoebenchError, match="did you mean 'mxfp4'"):
        encode(normal(), Scheme("mxfp5"))
    with pytest.raises(MoebenchError, match="Q4_K can be read but not written"):
        encode(normal(), Scheme("gguf_q4_k"))


ONCE_IS_ENOUGH = [*(params for params in CODECS if params.scheme().codec not in ("nvfp4", "ternary", "fp4"))]


@pytest.mark.parametrize("params", ONCE_IS_ENOUGH, ids=str)
def test_quantizing_the_result_changes_no_byte(params):
    once = encode(normal(), params.scheme())
    twice = encode(once.dequantize(), params.scheme())
    for name, part in once.parts().items():
        assert same_bytes(part, twice.parts()[name])


def test_quantizing_the_result_changes_no_code_where_scales_move():
    """FP4 has two codes for zero, and a ternary mean counts the zeros that it made: values, and codes, stay."""
    once = encode(normal(), Fp4().scheme())
    assert torch.equal(encode(once.dequantize(), once.scheme).dequantize(), once.dequantize())
    once = encode(normal(), Ternary().scheme())
    assert same_bytes(encode(once.dequantize(), once.scheme).codes, once.codes)


GOLDEN = [
    (Nf4(), 0.091),
    (Fp4(), 0.111),
    (Gguf("Q8_0"), 0.0038),
    (Gguf("Q5_0"), 0.031),
    (Gguf("Q4_0"), 0.065),
    (Gguf("MXFP4"), 0.144),
    (Mxfp4(), 0.144),
    (Gguf("TQ2_0"), 0.497),
    (Binary(None), 0.5),
]


@pytest.mark.parametrize(("params", "wanted"), GOLDEN, ids=str)
def test_error_on_uniform_weights_is_the_known_one(params, wanted):
    """Golden values for uniform weights; for a sign and a mean, E(|w| - 1/2)^2 / E w^2 = 1/4 makes it a half."""
    weight = 2 * torch.rand(256, 1024, generator=torch.Generator().manual_seed(0)) - 1
    error = (encode(weight, params.scheme()).dequantize() - weight).norm() / weight.norm()
    assert error.item() == pytest.approx(wanted, rel=0.03)


def test_parameters_import_no_torch():
    code = "import sys, moebench.moe.blocks.params\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# --- NF4 and FP4 -----------------------------------------------------------------------------------------------------


def test_nf4_values_are_quantiles_of_a_normal():
    """Eight evenly spread probabilities above one half and seven below, the outermost at 0.9677083."""
    offset = 0.9677083

    def side(n):
        return torch.special.ndtri(torch.linspace(offset, 0.5, n, dtype=torch.float64)[:-1])

    values = torch.cat([side(9), -side(8), torch.zeros(1, dtype=torch.float64)]).sort().values
    assert torch.allclose(torch.tensor(codebook.NF4, dtype=torch.float64), values / values.max(), rtol=0, atol=2e-6)


@settings(deadline=None, max_examples=30)
@given(seeds, scales, st.sampled_from([Nf4(), Fp4(), Nf4(32), Fp4(256)]))
def test_every_weight_takes_its_nearest_value(seed, scale, params):
    weight = normal(2, seed=seed, scale=scale)
    scheme = params.scheme()
    tensor = encode(weight, scheme)
    absmax = weight.double().abs().reshape(2, -1, scheme.group).amax(-1).repeat_interleave(scheme.group, dim=1)
    values = codebook.table(scheme.codec, weight.device).double()
    distances = (values * absmax[:, :, None] - weight.double()[:, :, None]).abs()
    error = (tensor.dequantize().double() - weight.double()).abs()
    assert (error <= distances.amin(-1) + 2.0**-22 * absmax).all()
    assert torch.equal(tensor.absmax, weight.abs().reshape(2, -1, scheme.group).amax(-1))


def test_the_first_of_two_codes_is_the_high_nibble():
    weight = torch.tensor([[-1.0, 1.0, 0.0, 0.45]])
    assert encode(weight, Nf4(4).scheme()).codes.tolist() == [[0x0F, 0x7C]]
    assert encode(weight, Fp4(4).scheme()).codes.tolist() == [[0xB3, 0x05]]


def test_blocks_of_zeros_and_of_subnormal_weights_have_finite_codes():
    weight = torch.zeros(1, 8)
    weight[0, 4:] = 2.0**-140
    assert encode(weight, Nf4(4).scheme()).codes.tolist() == [[0x77] * 4]
    assert encode(weight, Fp4(4).scheme()).codes[0, :2].tolist() == [0, 0]


@pytest.mark.parametrize("params", [Nf4(), Fp4(), Nf4(256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_makes_the_same_bytes(params, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(16, 1024).to(dtype)
    weight[3, :256] = 0
    tensor = encode(weight, params.scheme())
    packed, state = functional.quantize_4bit(weight, blocksize=params.block, quant_type=tensor.scheme.codec)
    assert torch.equal(packed.flatten(), tensor.codes.flatten())
    assert torch.equal(state.absmax, tensor.absmax.flatten())
    state.dtype = torch.float32
    assert torch.equal(functional.dequantize_4bit(packed, state), tensor.dequantize())


# --- E2M1, E8M0, float8 ----------------------------------------------------------------------------------------------


def small_float(code, exponent_bits, fraction_bits, bias):
    """The value of a code of sign, exponent and fraction without infinities."""
    fraction = code & (2**fraction_bits - 1)
    exponent = (code >> fraction_bits) & (2**exponent_bits - 1)
    sign = -1.0 if code >> (exponent_bits + fraction_bits) else 1.0
    whole = fraction / 2**fraction_bits + (exponent > 0)
    return sign * whole * 2.0 ** (max(exponent, 1) - bias)


def nearest_even(value, values):
    """The code of the value nearest to ``value`` among codes 0..n of one sign; the even code where two are."""
    best = min(abs(candidate - value) for candidate in values)
    codes = [code for code, candidate in enumerate(values) if abs(candidate - value) == best]
    return next((code for code in codes if code % 2 == 0), codes[0])


def test_all_16_codes_of_e2m1():
    codes = torch.arange(16)
    assert microscaling.from_e2m1(codes).tolist() == [small_float(code, 2, 1, 1) for code in range(16)]
    assert torch.equal(microscaling.to_e2m1(microscaling.from_e2m1(codes)), codes)


def test_e2m1_rounds_to_nearest_even_and_saturates():
    grid = torch.arange(0, 8, 1 / 64)
    around = torch.cat([grid, torch.nextafter(grid, grid + 1), torch.nextafter(grid, grid - 1).clamp(min=0)])
    wanted = [nearest_even(value, microscaling.E2M1) for value in around.tolist()]
    assert microscaling.to_e2m1(around).tolist() == wanted
    assert microscaling.to_e2m1(-around).tolist() == [code + 8 for code in wanted]


def test_all_256_codes_of_e8m0():
    codes = torch.arange(256, dtype=torch.uint8)
    values = microscaling.from_e8m0(codes)
    assert values[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert values[255].isnan()


def test_e8m0_scales_are_floors_of_logarithms():
    powers = torch.tensor([2.0**exponent for exponent in range(-125, 128)])
    codes = torch.arange(253, dtype=torch.uint8)
    assert torch.equal(microscaling.to_e8m0(powers), codes)
    assert torch.equal(microscaling.to_e8m0(torch.nextafter(powers, 2 * powers).clamp(max=3e38)), codes)
    assert torch.equal(microscaling.to_e8m0(torch.nextafter(powers[1:], 0 * powers[1:])), codes[:-1])
    assert microscaling.to_e8m0(torch.tensor([0.0, 2.0**-149])).tolist() == [0, 0]


@pytest.mark.parametrize(("name", "exponent", "fraction", "bias"), [("e4m3", 4, 3, 7), ("e5m2", 5, 2, 15)])
def test_all_256_codes_of_float8(name, exponent, fraction, bias):
    codes = torch.arange(256, dtype=torch.uint8).view(microscaling.FP8[f"fp8_{name}"]).reshape(1, -1)
    parts = {"codes": codes, "scales": torch.tensor([0.5])}
    values = tensor_of(parts, Fp8(name).scheme(), (1, 256)).dequantize()[0]
    finite = values.isfinite()
    assert finite.sum() == {"e4m3": 254, "e5m2": 248}[name]
    wanted = torch.tensor([small_float(code, exponent, fraction, bias) / 2 for code in range(256)])
    assert torch.equal(values[finite], wanted[finite])


@settings(deadline=None, max_examples=10)
@given(seeds, scales, st.sampled_from(["e4m3", "e5m2"]))
def test_float8_takes_the_nearest_value(seed, scale, name):
    weight = normal(2, 64, seed, scale)
    tensor = encode(weight, Fp8(name).scheme())
    largest = {"e4m3": 448, "e5m2": 57344}[name]
    assert torch.equal(tensor.scales, weight.abs().amax(1) / largest)
    values = torch.arange(256, dtype=torch.uint8).view(microscaling.FP8[tensor.scheme.codec]).double()
    values = values[values.isfinite()]
    scaled = weight / tensor.scales[:, None]
    error = (tensor.codes.double() - scaled.double()).abs()
    assert torch.equal(error, (values - scaled.double()[:, :, None]).abs().amin(-1))


# --- MXFP4 and NVFP4 -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seeds, scales)
def test_mxfp4_is_the_mxfp4_of_gguf_but_for_ties_and_the_order_of_bytes(seed, scale):
    weight = normal(2, 256, seed, scale)
    ours, theirs = encode(weight, Mxfp4().scheme()), encode(weight, Gguf("MXFP4").scheme())
    assert torch.equal(ours.scales, theirs.blocks.reshape(2, 8, 17)[:, :, 0])
    assert torch.equal(ours.dequantize(), theirs.dequantize())


@pytest.mark.parametrize(("params", "scales"), [(Mxfp4(), [[127]]), (Nvfp4(), [[0x7E, 0x7E]])], ids=str)
def test_the_first_of_two_codes_is_the_low_nibble(params, scales):
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([6.0, -0.5, 1.5, 4.0])
    weight[0, 16] = 6
    tensor = encode(weight, params.scheme())
    assert tensor.codes[0, :2].tolist() == [0x97, 0x63]
    assert tensor.scales.view(torch.uint8).tolist() == scales


def test_mxfp4_ties_go_to_even_codes():
    weight = torch.zeros(1, 32)
    weight[0, :9] = torch.tensor([4, 0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5, 7.9])
    assert encode(weight, Mxfp4().scheme()).dequantize()[0, :9].tolist() == [4, 0, 1, 1, -2, 2, 4, 4, 6]


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_gguf_decodes_the_codes_and_block_scales_of_nvfp4(seed):
    """GGUF keeps four blocks of 16 together: four scales, then of each block its halves in low and high nibbles."""
    tensor = encode(normal(2, 256, seed), Nvfp4().scheme())
    codes = torch.stack([tensor.codes & 15, tensor.codes >> 4], dim=-1).reshape(2, 4, 4, 2, 8)
    nibbles = (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(2, 4, 32)
    blocks = torch.cat([tensor.scales.view(torch.uint8).reshape(2, 4, 4), nibbles], dim=-1).reshape(2, 144)
    unscaled = from_blocks(blocks, "NVFP4").dequantize()
    parts = {**tensor.parts(), "tensor_scale": torch.ones(1)}
    assert torch.equal(tensor_of(parts, tensor.scheme, tensor.shape).dequantize(), unscaled)


@settings(deadline=None, max_examples=25)
@given(seeds, scales)
def test_nvfp4_scales_fill_e4m3_and_weights_are_off_by_half_the_widest_step(seed, scale):
    weight = normal(2, 256, seed, scale)
    tensor = encode(weight, Nvfp4().scheme())
    assert tensor.scales.float().max() == 448
    steps = tensor.tensor_scale * tensor.scales.float()
    blocks = weight.reshape(2, -1, 16)
    assert ((steps * 6 - blocks.abs().amax(-1)).abs() <= steps * 6 * (2.0**-4 + 2.0**-20)).all()
    error = (tensor.dequantize().reshape(2, -1, 16) - blocks).abs()
    assert (error <= steps[:, :, None] * (1 + 2.0**-20)).all()


def test_nvfp4_raises_scales_that_e4m3_could_not_hold():
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16] = 1.0, 2.0**-30
    scales = encode(weight, Nvfp4().scheme()).scales.float()[0].tolist()
    assert scales == [448, 2.0**-6]


def test_torchao_makes_the_same_mxfp4_and_nvfp4():
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    weight = normal(32, 1024)
    weight[0, :64] *= 2.0**-20
    ours = encode(weight, Mxfp4().scheme())
    scales, codes = to_mx(weight, torch.float4_e2m1fn_x2, 32)
    assert torch.equal(scales.view(torch.uint8).flatten(), ours.scales.flatten())
    assert torch.equal(codes.view(torch.uint8).flatten(), ours.codes.flatten())
    ours = encode(weight, Nvfp4().scheme())
    tensor_scale = per_tensor_amax_to_scale(weight.abs().max())
    scales, codes = nvfp4_quantize(weight, 16, tensor_scale)
    assert torch.equal(tensor_scale.reshape(1), ours.tensor_scale)
    assert same_bytes(scales.flatten(), ours.scales.flatten())
    assert torch.equal(codes.view(torch.uint8).flatten(), ours.codes.flatten())


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GGUF_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_bytes_and_values_are_the_librarys(name, dtype):
    weight = normal().to(dtype)
    tensor = encode(weight, Gguf(name).scheme())
    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quants.quantize(weight.float().numpy(), kind)
    assert np.array_equal(tensor.blocks.numpy(), blocks)
    assert np.array_equal(tensor.dequantize().numpy(), gguf.quants.dequantize(blocks, kind))
    assert tensor.scheme.group == gguf.GGML_QUANT_SIZES[kind][0]


WHAT_A_FILE_MAY_HOLD = [
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0"),
    *("TQ2_0", "MXFP4", "NVFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL"),
    "IQ4_XS",
]


def test_nothing_that_gguf_decodes_is_missing_here():
    assert set(decodable()) >= set(WHAT_A_FILE_MAY_HOLD)


def random_blocks(name, rows=3, width=512):
    """Rows of random bytes in whole blocks of a type."""
    block, size = decodable()[name]
    return torch.randint(0, 256, (rows, width // block * size), dtype=torch.uint8)


@pytest.mark.parametrize("name", decodable())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_type_that_gguf_decodes_loads_with_its_bytes_kept(name):
    """Random bytes hold infinities and NaN, too, which must be the library's."""
    blocks = random_blocks(name)
    tensor = from_blocks(blocks, name)
    wanted = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    assert tensor.shape == (3, 512)
    assert np.array_equal(tensor.dequantize().numpy(), wanted, equal_nan=True)
    again = tensor_of(load(save(tensor.parts())), tensor.scheme, tensor.shape)
    assert torch.equal(again.blocks, blocks)
    assert tensor.nbytes == blocks.numel()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_matrices_and_stacks_of_experts_are_read_from_a_file(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    stored = {"q": random_blocks("Q4_K"), "experts": torch.stack([random_blocks("IQ3_S") for _ in range(4)])}
    for name, kind in (("q", "Q4_K"), ("experts", "IQ3_S")):
        writer.add_tensor(name, stored[name].numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
    plain = {"f32": normal(4, 64), "f16": normal(4, 64).half()}
    for name, tensor in plain.items():
        writer.add_tensor(name, tensor.numpy())
    writer.add_tensor("norm", np.ones(8, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    read = read_matrices(path, ("q", "experts", "f32", "f16"))
    assert [len(read[name]) for name in ("q", "experts", "f32", "f16")] == [1, 4, 1, 1]
    assert torch.equal(read["q"][0].blocks, stored["q"])
    assert read["q"][0].scheme == Scheme("gguf_q4_k", 4.0, 256, symmetric=False)
    for expert, blocks in zip(read["experts"], stored["experts"], strict=True):
        assert torch.equal(expert.blocks, blocks)
        assert expert.shape == (3, 512)
    for name, tensor in plain.items():
        assert torch.equal(read[name][0].dequantize(), tensor.float())
    with pytest.raises(MoebenchError, match="no tensor 'k'"):
        read_matrices(path, ("k",))
    with pytest.raises(MoebenchError, match="'norm' is no matrix"):
        read_matrices(path, ("norm",))


def test_blocks_that_cannot_be_decoded_are_refused():
    with pytest.raises(MoebenchError, match="does not decode Q8_K; convert the file to one of BF16, "):
        from_blocks(torch.zeros(1, 292, dtype=torch.uint8), "Q8_K")
    with pytest.raises(ValueError, match="not made of Q4_0 blocks of 18"):
        from_blocks(torch.zeros(1, 19, dtype=torch.uint8), "Q4_0")


def test_without_gguf_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MoebenchError, match=r"pip install 'moebench\[models\]'"):
        encode(normal(), Gguf().scheme())


# --- ternary and binary ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 23), seeds)
def test_trits_come_back(rows, width, seed):
    codes = torch.randint(-1, 2, (rows, width), generator=torch.Generator().manual_seed(seed))
    packed = pack_trits(codes)
    assert packed.shape == (rows, -(-width // 5))
    assert torch.equal(unpack_trits(packed, width), codes)


def test_all_243_bytes_of_trits():
    packed = torch.arange(243, dtype=torch.uint8).reshape(-1, 1)
    assert torch.equal(pack_trits(unpack_trits(packed, 5)), packed)
    assert len({tuple(row) for row in unpack_trits(packed, 5).tolist()}) == 243


@settings(deadline=None, max_examples=25)
@given(seeds, scales)
def test_ternary_is_absmean_rounding(seed, scale):
    weight = normal(3, 37, seed, scale)
    tensor = encode(weight, Ternary().scheme())
    mean = weight.abs().mean()
    assert tensor.scale.item() == mean.item()
    ratio = weight / mean
    assume(((ratio.abs() - 0.5).abs() > 1e-6).all())
    codes = (ratio > 0.5).long() - (ratio < -0.5).long()
    assert torch.equal(tensor.dequantize(), codes * mean)


@settings(deadline=None, max_examples=25)
@given(seeds, scales, st.sampled_from([1, 3, 13, None]))
def test_binary_is_the_sign_times_the_mean(seed, scale, group):
    weight = normal(3, 39, seed, scale)
    tensor = encode(weight, Binary(group).scheme())
    means = weight.reshape(3, -1, group or 39).abs().mean(-1).bfloat16().float()
    assert torch.equal(tensor.dequantize(), weight.sign() * means.repeat_interleave(group or 39, dim=1))
    assert tensor.nbytes == 3 * (5 + 2 * means.shape[1])
