"""W8A8: tokens rounded to int8 beside int8 weights, multiplied as integers; the same arithmetic in floating point."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.backends.packed import MATMULS
from moebench.backends.packing import pack
from moebench.contracts import Execution, MoebenchError, Refusal, Scheme
from moebench.moe import token_params
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import expert_forward
from moebench.moe.oracle import compare, reference
from moebench.moe.quantization import coded
from moebench.moe.token_codes import exact_tokens, near_ties, rounded_tokens, token_codes

INT8, W8A8, W4A4 = Scheme("rtn", 8.0), Scheme("rtn", 8.0, act_bits=8), Scheme("rtn", 4.0, 32, act_bits=4)
ROUNDING = ("reference", "eager", "batched", "grouped", "offload")
ARCHETYPES = ("dynamic_k", "empty", "hot", "signed", "null", "dropped")

relaxed = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
cases = given(
    archetype=st.sampled_from(ARCHETYPES),
    count=st.sampled_from([0, 1, 3, 17]),
    boundary=st.sampled_from(["topk", "sorted"]),
    seed=st.integers(0, 2**20),
    sparse=st.booleans(),
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- rounding of tokens ----------------------------------------------------------------------------------------------


@relaxed
@given(
    bits=st.integers(2, 8),
    exponent=st.integers(-120, 120),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**20),
)
def test_a_code_is_the_nearest_and_a_token_knows_only_itself(bits, exponent, dtype, seed):
    x_NI = (normal(5, 24, seed=seed) * 2.0**exponent).to(dtype)
    codes_NI, scales_N1 = token_codes(x_NI, bits)
    top = 2 ** (bits - 1) - 1
    assert torch.equal(codes_NI, codes_NI.round())
    assert codes_NI.abs().amax(1).tolist() == [top] * 5
    step = scales_N1.double()
    assert ((exact_tokens(x_NI, bits) - x_NI.double()).abs() <= step * (0.5 + top * 2.0**-23)).all()
    alone, _ = token_codes(x_NI[2:3], bits)
    assert torch.equal(alone, codes_NI[2:3])


def test_zeros_stay_zeros_and_nothing_is_rounded_without_bits():
    assert not rounded_tokens(torch.zeros(2, 8), 8).any()
    assert rounded_tokens(torch.zeros(0, 8), 8).shape == (0, 8)
    x_NI = normal(3, 8).bfloat16()
    assert rounded_tokens(x_NI, None) is x_NI
    assert rounded_tokens(x_NI, 8).dtype == torch.bfloat16


def test_the_smallest_numbers_do_not_leave_the_range_of_codes():
    x_NI = torch.tensor([[2.0**-149 * step for step in (0, 1, 100, 180)]])
    codes_NI, _ = token_codes(x_NI, 8)
    assert codes_NI.abs().max() <= 127


@relaxed
@given(seed=st.integers(0, 2**20), size=st.sampled_from([1e-6, 1e-4, 1e-2]))
def test_every_code_that_an_error_flips_was_counted_as_near(seed, size):
    x_NI = normal(16, 64, seed=seed).double()
    error_NI = size * x_NI.abs()
    sign_NI = normal(16, 64, seed=seed + 1).sign().double()
    near_NI, step_N1 = near_ties(x_NI, 8, error_NI)
    assert size > 1e-4 or near_NI.float().mean() < 0.1
    moved_NI = x_NI + sign_NI * error_NI
    flipped_NI = token_codes(moved_NI, 8)[0] != token_codes(x_NI, 8)[0]
    assert not (flipped_NI & ~near_NI).any()
    beyond_NI = exact_tokens(moved_NI, 8) - exact_tokens(x_NI, 8) - (moved_NI - x_NI)
    assert (beyond_NI.abs() <= step_N1 * (1 + size)).all()


# --- the product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 15, 17, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 64), (48, 32), (33, 17), (2048, 16)])
def test_integers_are_multiplied_and_summed_exactly(lab, count, inputs, outputs):
    generator = torch.Generator().manual_seed(count)
    x_TI = torch.randint(-127, 128, (count, inputs), generator=generator)
    x_TI[:, 0] = 127  # the scale of every token is 1
    weight = round_to_nearest(normal(outputs, inputs, seed=count), W8A8)
    weight = dataclasses.replace(weight, codes=torch.full_like(weight.codes, 127) if count == 2 else weight.codes)
    store = lab.store(0, torch.bfloat16, W8A8)
    product = lab.executor("packed", store, lab.spec(store, "float32")).product
    sums_TO = x_TI.double() @ weight.unpack().double().T
    scales_O = weight.scales.reshape(-1)
    assert sums_TO.abs().max() < 2**31
    assert torch.equal(product(x_TI.float(), pack(weight)), sums_TO.float() * scales_O)


def test_one_token_of_any_strides_is_multiplied_right(lab):
    x_TI, weight = normal(1, 32), round_to_nearest(normal(16, 32, seed=1), W8A8)
    store = lab.store(0, torch.bfloat16, W8A8)
    product = lab.executor("packed", store, lab.spec(store, "float32")).product
    expected = product(x_TI, pack(weight))
    for strides in ((1, 1), (3, 1), (77, 1)):
        assert torch.equal(product(x_TI.as_strided((1, 32), strides), pack(weight)), expected)


@relaxed
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**20))
def test_a_product_is_that_of_the_rounded_tokens_with_the_dequantized_matrix(lab, dtype, seed):
    x_TI, weight = normal(9, 256, seed=seed).to(dtype), round_to_nearest(normal(48, 256, seed=seed + 1), W8A8)
    store = lab.store(0, torch.bfloat16, W8A8)
    product = lab.executor("packed", store, lab.spec(store, "float32")).product
    expected = exact_tokens(x_TI, 8) @ weight.dequantize().double().T
    actual = product(x_TI, pack(weight))
    assert actual.dtype == torch.float32
    scale = exact_tokens(x_TI, 8).abs() @ weight.dequantize().double().abs().T
    assert ((actual.double() - expected).abs() <= 2**-22 * scale).all()


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@relaxed
@cases
def test_packed_agrees_with_the_oracle(lab, dtype, archetype, count, boundary, seed, sparse):
    sparsity = lab.sparsity() if sparse else None
    store = lab.store(seed % 7, dtype, W8A8, sparsity, some_kinds=lab.kinds(archetype))
    lab.check("packed", store, dtype, archetype, count, boundary, seed)


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(relaxed, max_examples=15)
@cases
def test_dense_backends_agree_with_the_oracle(lab, name, dtype, archetype, count, boundary, seed, sparse):
    sparsity = lab.sparsity() if sparse else None
    store = lab.store(seed % 7, dtype, (W8A8, W4A4)[seed % 2], sparsity, some_kinds=lab.kinds(archetype))
    lab.check(name, store, dtype, archetype, count, boundary, seed)


@pytest.mark.parametrize("scheme", [W8A8, W4A4], ids=["W8A8", "W4A4"])
def test_the_layer_of_the_method_rounds_as_the_oracle_does(lab, scheme):
    store, x_TH = lab.store(3, torch.float32, scheme), lab.tokens(17)
    routing = lab.routing("hot", 17, 0)
    out_TH = expert_forward(x_TH, *store.weights(3), store) * routing.weight_N[:, None]
    assert compare(out_TH, reference(store, routing, x_TH), torch.float32).ok


@pytest.mark.parametrize("name", ["packed", *ROUNDING])
def test_the_oracle_tells_rounded_tokens_from_tokens_as_they_are(lab, name):
    rounded, plain = lab.store(0, torch.float32, W8A8), lab.store(0, torch.float32, INT8)
    x_TH, routing = lab.tokens(17), lab.routing("dynamic_k", 17, 0)
    y_TH = lab.executor(name, rounded, lab.spec(rounded))(x_TH, *lab.inputs(routing, "topk"))
    assert compare(y_TH, reference(rounded, routing, x_TH), torch.float32).ok
    assert not compare(y_TH, reference(plain, routing, x_TH), torch.float32).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_oracle_fails_a_perturbed_expert(lab, dtype):
    good = lab.store(0, dtype, W8A8)
    down = round_to_nearest(good.down[2].dequantize() * 1.25, W8A8)
    bad = dataclasses.replace(good, down=(*good.down[:2], down, *good.down[3:]))
    x_TH, routing = lab.tokens(17, dtype), lab.routing("dynamic_k", 17, 0)
    expected = reference(good, routing, x_TH)
    for store, ok in ((good, True), (bad, False)):
        executor = lab.executor("packed", store, lab.spec(store, str(dtype).removeprefix("torch.")))
        verdict = compare(executor(x_TH, *lab.inputs(routing, "topk")), expected, dtype)
        assert verdict.ok is ok, verdict


def test_only_the_integer_product_runs_and_bytes_are_those_of_int8(lab):
    store = lab.store(0, torch.bfloat16, W8A8)
    spec = lab.spec(store, "bfloat16")
    assert lab.backend("packed").supports(spec) == Execution("packed", excludes=MATMULS)
    session = lab.backend("packed").load({0: store}, {0: spec})
    with lab.operators() as operators:
        session.layer(0)(lab.tokens(17, torch.bfloat16), *lab.inputs(lab.routing("dynamic_k", 17, 0), "topk"))
    assert "aten._int_mm.default" in operators.seen
    assert not operators.seen & {*MATMULS, "aten._weight_int8pack_mm.default"}
    assert session.executed().kernels == ("aten::_int_mm", "aten::index_add_")
    assert session.resident_bytes() == store.nbytes == 6 * 3 * 32 * (32 + 2)


@pytest.mark.parametrize(("params", "name"), [(token_params.W8A8(), "packed"), (token_params.W4A4(group=32), "eager")])
def test_the_quantizations_give_stores_that_round_their_tokens(lab, params, name):
    store = coded(params)(lab.store(0, torch.float32), None)
    assert set(store.schemes) == {params.scheme()}
    assert store.act_bits == params.scheme().bits
    lab.check(name, store, torch.float32, "dynamic_k", 17, "topk", 4)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUNDING)
def test_backends_that_round_tokens_say_that_weights_are_dequantized(lab, name):
    store = lab.store(0, torch.float32, W8A8)
    assert lab.backend(name).supports(lab.spec(store)).weights == "dequantized"
    assert lab.backend(name).load({0: store}, {0: lab.spec(store)}).executed().weights == "dequantized"


def test_every_other_backend_refuses(lab):
    from moebench.contracts import Registry

    store = lab.store(0, torch.bfloat16, W8A8)
    for name in set(Registry.load().names("backend")) - {*ROUNDING, "packed"}:
        answer = lab.backend(name).supports(lab.spec(store, "bfloat16"))
        assert isinstance(answer, Refusal), name


def test_a_store_that_rounds_other_than_its_specification_is_refused(lab):
    rounded, plain = lab.store(0, torch.bfloat16, W8A8), lab.store(0, torch.bfloat16, INT8)
    for name in ("packed", "eager"):
        for store, other in ((rounded, plain), (plain, rounded)):
            with pytest.raises(MoebenchError, match="write the store's act_bits into its schemes"):
                lab.backend(name).load({0: store}, {0: lab.spec(other, "bfloat16")})
    both = dataclasses.replace(plain, down=rounded.down)
    with pytest.raises(MoebenchError, match="round their tokens to different bits"):
        lab.backend("packed").load({0: both}, {0: lab.spec(both, "bfloat16")})
