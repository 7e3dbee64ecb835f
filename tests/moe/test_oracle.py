"""The oracle: its reference against the plain formula, and what it lets pass and what not."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError, Scheme
from moebench.moe.channels import SiteRule, Sparsity
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import Constants, ExpertStore, expert_forward
from moebench.moe.layer import PreparedLayer, SharedExpert, moe_forward
from moebench.moe.oracle import BOUNDS, Reference, bound, compare, exact_weights, reference
from moebench.moe.oracle_gradients import Gradients, compare_gradients, reference_gradients
from moebench.moe.routing import Routing

T, H, F, E = 12, 16, 8, 5


def layer(seed=0, dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(seed)
    gate_up = (torch.randn(E, 2 * F, H, generator=generator) / H**0.5).to(dtype)
    down = (torch.randn(E, H, F, generator=generator) / F**0.5).to(dtype)
    return ExpertStore(gate_up, down, ("ffn",) * E, **changes)


def traffic(seed=0, tokens=T, experts=E):
    generator = torch.Generator().manual_seed(seed)
    gate_TE = torch.randn(tokens, experts, generator=generator) * (
        torch.rand(tokens, experts, generator=generator) > 0.4
    )
    return torch.randn(tokens, H, generator=generator), Routing.dense(gate_TE)


def by_hand(store, routing, x_TH):
    """Return sum_e G_te f_e(x_t) in float64 over all experts, chosen or not."""
    outs_ETH = torch.stack(
        [expert_forward(x_TH.double(), g.double(), d.double(), store) for g, d in zip(*store.dense(), strict=True)]
    )
    return torch.einsum("te,eth->th", routing.to_dense().double(), outs_ETH)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.sampled_from([0, 1, 12]))
def test_the_reference_is_the_formula(seed, tokens):
    store, (x_TH, routing) = layer(seed), traffic(seed, tokens)
    ref = reference(store, routing, x_TH)
    torch.testing.assert_close(ref.y_TH, by_hand(store, routing, x_TH), rtol=1e-12, atol=1e-12)
    assert ref.near == 0
    assert not ref.slack_T.any()
    assert bool((ref.scale_T >= ref.y_TH.norm(dim=1)).all())


def test_the_reference_sees_the_weights_as_the_case_rounds_them():
    store = layer()
    gate_up, _ = exact_weights(store, 1, torch.bfloat16)
    assert torch.equal(gate_up, store.gate_up[1].bfloat16().double())
    scheme = Scheme("rtn", 8.0)
    gate_ups, downs = ([round_to_nearest(w, scheme) for w in part] for part in (store.gate_up, store.down))
    coded = dataclasses.replace(store, gate_up=gate_ups, down=downs)
    gate_up, _ = exact_weights(coded, 1, torch.bfloat16)
    assert torch.equal(gate_up, coded.gate_up[1].dequantize(torch.float64))


def test_every_kind_of_expert():
    dense = layer()
    kinds = ("copy", "ffn", "constant", "zero", "constant")
    constants = Constants(torch.randn(2, 2, H), torch.randn(2, H))
    store = ExpertStore(dense.gate_up[:1], dense.down[:1], kinds, constants=constants)
    x_TH, routing = traffic()
    gate_TE, x = routing.to_dense().double(), x_TH.double()
    expected = gate_TE[:, :1] * x
    expected += gate_TE[:, 1:2] * expert_forward(x, store.gate_up[0].double(), store.down[0].double(), store)
    for number, expert in ((0, 2), (1, 4)):
        a_T2 = (x @ constants.gate_C2H[number].double().T).softmax(-1)
        value_TH = a_T2[:, :1] * x + a_T2[:, 1:] * constants.value_CH[number].double()
        expected += gate_TE[:, expert : expert + 1] * value_TH
    torch.testing.assert_close(reference(store, routing, x_TH).y_TH, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(MoebenchError, match="knows no 'lora' experts"):
        reference(dataclasses.replace(store, kinds=("lora", *kinds[1:])), routing, x_TH)
    with pytest.raises(MoebenchError, match="has no constants"):
        reference(dataclasses.replace(store, constants=None), routing, x_TH)
    with pytest.raises(MoebenchError, match="the routing knows 5 experts and the store 4"):
        reference(ExpertStore(dense.gate_up[:4], dense.down[:4], ("ffn",) * 4), routing, x_TH)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_are_added(gated):
    store, (x_TH, routing) = layer(), traffic()
    shared = SharedExpert(torch.randn(2 * F, H), torch.randn(H, F), torch.randn(H) if gated else None)
    added = reference(store, routing, x_TH, shared).y_TH - reference(store, routing, x_TH).y_TH
    torch.testing.assert_close(added, shared(x_TH).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_a_mixed_shared_expert_scales_the_routed_sum_and_what_is_known_of_it(dtype, gated):
    """In float64 by hand; a layer that forgets the routed factor, or swaps both, is wrong."""
    store, (x_TH, routing) = layer(dtype=dtype), traffic()
    x_TH, mix_2H = x_TH.to(dtype), torch.randn(2, H).to(dtype)
    gate_up, down = torch.randn((2 if gated else 1) * F, H).to(dtype) / 4, torch.randn(H, F).to(dtype) / 4
    shared = SharedExpert(gate_up, down, mix_2H=mix_2H, gated=gated)
    exact = [t.double() for t in (gate_up, down, mix_2H)]
    own_TH = SharedExpert(*exact[:2], gated=gated)(x_TH.double())
    mix_T2 = (x_TH.double() @ exact[2].T).softmax(-1)
    plain, mixed = reference(store, routing, x_TH), reference(store, routing, x_TH, shared)
    expected_TH = mix_T2[:, :1] * plain.y_TH + mix_T2[:, 1:] * own_TH
    torch.testing.assert_close(mixed.y_TH, expected_TH, rtol=1e-12, atol=1e-12)
    norms_TE = torch.stack(
        [
            expert_forward(x_TH.double(), g.double(), d.double(), store).norm(dim=1)
            for g, d in zip(*store.dense(), strict=True)
        ],
        dim=1,
    )
    terms_T = (mix_T2[:, :1] * routing.to_dense() * norms_TE).square().sum(1) + (mix_T2[:, 1:] * own_TH).square().sum(1)
    torch.testing.assert_close(mixed.scale_T, torch.maximum(terms_T.sqrt(), expected_TH.norm(dim=1)))
    prepared = PreparedLayer(store, None, shared)
    assert compare(moe_forward(prepared, x_TH, routing=routing), mixed, dtype).ok
    for wrong in (dataclasses.replace(shared, mix_2H=None), dataclasses.replace(shared, mix_2H=mix_2H.flip(0))):
        assert not compare(moe_forward(PreparedLayer(store, None, wrong), x_TH, routing=routing), mixed, dtype).ok


# --- sparsity --------------------------------------------------------------------------------------------------------


def test_a_flip_at_the_hidden_threshold_is_forgiven_and_one_further_off_is_not():
    store, (x_TH, routing) = layer(), traffic(tokens=1)
    routing = Routing(torch.tensor([0]), torch.tensor([2]), torch.tensor([-1.5]), (1, E))
    gate, up = (x_TH.double() @ store.gate_up[2].double().T).chunk(2, -1)
    hidden_F = (torch.nn.functional.silu(gate) * up)[0]
    channel = int(hidden_F.abs().argsort()[F // 2])
    size = float(hidden_F[channel].abs())
    term_H = -1.5 * hidden_F[channel] * store.down[2][:, channel].double()
    for threshold, forgiven in ((size * (1 + 1e-8), True), (size * (1 - 1e-8), True), (size * 1.01, False)):
        sparse = dataclasses.replace(store, sparsity=Sparsity({"hidden": SiteRule(threshold)}))
        ref = reference(sparse, routing, x_TH)
        assert ref.near == int(forgiven)
        flipped = ref.y_TH + (term_H if threshold > size else -term_H)
        verdict = compare(flipped.float(), ref, torch.float32)
        assert (verdict.ok, verdict.flips) == (forgiven, int(forgiven))
        assert compare(ref.y_TH.float(), ref, torch.float32).ok
        assert float(ref.slack_T[0]) == pytest.approx(float(term_H.norm()) if forgiven else 0.0, rel=1e-9)


def test_a_top_k_that_takes_the_next_channel_is_forgiven_even_where_both_columns_point_alike():
    gate_up = torch.cat([torch.full((2, 1), 5.0), torch.tensor([[1.0], [1 - 2.0**-23]])])[None]
    down = torch.tensor([[[1.0, -1.0]]])  # one in for the other moves the output by the sum of both
    rule = Sparsity({"hidden": SiteRule(k=1)})
    store = ExpertStore(gate_up, down, ("ffn",), sparsity=rule)
    x_TH, routing = torch.ones(1, 1), Routing(torch.tensor([0]), torch.tensor([0]), torch.ones(1), (1, 1))
    ref = reference(store, routing, x_TH)
    assert ref.near == 2
    assert compare(-ref.y_TH.float(), ref, torch.float32).ok
    assert not compare(-1.01 * ref.y_TH.float(), ref, torch.float32).ok


def test_slack_leaves_the_check_sharp():
    """Half of the activations left out in bfloat16: what is forgiven stays far below a wrong expert."""
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(4, 1024, 256, generator=generator) / 16).bfloat16()
    down = (torch.randn(4, 256, 512, generator=generator) / 512**0.5).bfloat16()
    store = ExpertStore(gate_up, down, ("ffn",) * 4, sparsity=Sparsity({"hidden": SiteRule(0.15)}))
    x_TH = torch.randn(32, 256, generator=generator).bfloat16()
    indices_TK = torch.rand(32, 4, generator=generator).topk(2).indices
    routing = Routing.topk(indices_TK, torch.full((32, 2), 0.5), 4)
    ref = reference(store, routing, x_TH)
    assert ref.near > 32
    assert float((ref.slack_T / ref.scale_T).max()) < 0.05
    y_TH = torch.zeros(32, 256, dtype=torch.bfloat16)
    for expert in range(4):
        mine = routing.expert_N == expert
        out_NH = expert_forward(x_TH[routing.token_N[mine]], gate_up[expert], down[expert], store)
        y_TH.index_add_(0, routing.token_N[mine], 0.5 * out_NH)
    assert compare(y_TH, ref, torch.bfloat16).ok
    worse = reference(dataclasses.replace(store, down=torch.cat([down[:3], 1.15 * down[3:]])), routing, x_TH)
    assert not compare(y_TH, worse, torch.bfloat16).ok


def test_the_input_threshold_is_compared_as_a_backend_compares():
    """In bfloat16 the threshold itself is rounded: 1.0 > 0.999 is false there, and the oracle must agree."""
    x_TH = torch.ones(1, H, dtype=torch.bfloat16)
    store = layer(dtype=torch.bfloat16, sparsity=Sparsity({"input": SiteRule(0.999)}))
    kept = bool((store.sparsity.apply("input", x_TH) != 0).any())
    ref = reference(store, Routing(torch.tensor([0]), torch.tensor([0]), torch.ones(1), (1, E)), x_TH)
    assert bool(ref.y_TH.any()) is kept
    assert ref.near == 0


# --- comparing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ref():
    x_TH, routing = traffic()
    return reference(layer(), routing, x_TH)


def test_rounding_the_reference_passes_in_every_dtype(ref):
    for dtype in BOUNDS:
        verdict = compare(ref.y_TH.to(dtype), ref, dtype)
        assert verdict.ok
        assert verdict.error <= torch.finfo(dtype).eps
        assert verdict.bound == bound(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_way_to_be_wrong_has_a_reason(ref, dtype):
    good = ref.y_TH.to(dtype)
    row = int(ref.y_TH.norm(dim=1).argmax())
    scaled, lost, swapped, unwritten = (good.clone() for _ in range(4))
    scaled[row] *= 1.05
    lost[row] = 0
    swapped[[row, row - 1]] = good[[row - 1, row]]
    unwritten[row, 0] = float("nan")
    for wrong in (scaled, lost, swapped):
        verdict = compare(wrong, ref, dtype)
        assert not verdict.ok
        assert verdict.error > verdict.bound
        assert "rows are off; row" in verdict.reason
    assert compare(unwritten, ref, dtype).reason == f"unwritten or NaN: 1 of {T * H} values are not finite"
    assert "not finite" in compare(good * float("inf"), ref, dtype).reason


def test_what_cannot_be_compared_is_a_reason_and_no_traceback(ref):
    assert "shape (11, 16) instead of (12, 16)" in compare(ref.y_TH[1:].float(), ref, torch.float32).reason
    assert "dtype torch.float64 instead of torch.float32" in compare(ref.y_TH, ref, torch.float32).reason
    assert "a NoneType, not a tensor" in compare(None, ref, torch.float32).reason
    with pytest.raises(MoebenchError, match=r"no error bound is known for outputs of torch\.int32"):
        compare(ref.y_TH.int(), ref, torch.int32)


def test_rows_where_terms_cancel_are_judged_by_their_terms():
    """Two equal experts with weights 1 and -1 give zero; rounding noise of the terms is no mistake, a term is one."""
    store = layer(dtype=torch.bfloat16)
    store.gate_up[1], store.down[1] = store.gate_up[0], store.down[0]
    x_TH = traffic()[0].bfloat16()
    indices_TK = torch.tensor([[0, 1]]).expand(T, 2)
    ref = reference(store, Routing.topk(indices_TK, torch.tensor([[1.0, -1.0]]).expand(T, 2), E), x_TH)
    assert float(ref.y_TH.abs().max()) < 1e-12
    term_TH = ref.scale_T[:, None] * torch.nn.functional.normalize(torch.randn(T, H, dtype=torch.float64), dim=1)
    assert compare((0.01 * term_TH).bfloat16(), ref, torch.bfloat16).ok
    assert not compare((0.1 * term_TH).bfloat16(), ref, torch.bfloat16).ok


def test_a_token_without_experts_must_stay_zero():
    store, (x_TH, routing) = layer(), traffic()
    routing = routing.keep(routing.token_N != 4)
    ref = reference(store, routing, x_TH)
    y_TH = ref.y_TH.float()
    assert compare(y_TH, ref, torch.float32).ok
    y_TH[4, 0] = 1e-5
    assert not compare(y_TH, ref, torch.float32).ok


def test_nothing_to_compare_is_fine_only_where_nothing_is_expected():
    empty = Reference(torch.zeros(0, H).double(), torch.zeros(0).double(), 0, torch.zeros(0).double())
    assert compare(torch.zeros(0, H), empty, torch.float32).ok
    silent = Reference(torch.zeros(3, H).double(), torch.zeros(3).double(), 0, torch.zeros(3).double())
    assert compare(torch.zeros(3, H), silent, torch.float32).ok
    assert not compare(torch.full((3, H), 1e-30), silent, torch.float32).ok


# --- gradients -------------------------------------------------------------------------------------------------------


def test_reference_gradients_are_slopes():
    store, (x_TH, routing) = layer(dtype=torch.float64), traffic()
    x_TH, grad_TH = x_TH.double(), torch.randn(T, H).double()
    grads = reference_gradients(store, routing, x_TH, grad_TH)
    for name, size in (("x_TH", x_TH), ("gate_up", store.gate_up), ("down", store.down)):
        step = torch.randn(size.shape, generator=torch.Generator().manual_seed(1)).double() * 1e-5
        values = []
        for sign in (1, -1):
            moved = {"gate_up": store.gate_up, "down": store.down, "x_TH": x_TH}
            moved[name] = moved[name] + sign * step
            there = dataclasses.replace(store, gate_up=moved["gate_up"], down=moved["down"])
            values.append(float((reference(there, routing, moved["x_TH"]).y_TH * grad_TH).sum()))
        assert (values[0] - values[1]) / 2 == pytest.approx(float((getattr(grads, name) * step).sum()), rel=1e-6)


def test_gradients_of_what_has_none_are_refused():
    x_TH, routing = traffic()
    with pytest.raises(MoebenchError, match="without sparsity"):
        reference_gradients(layer(sparsity=Sparsity({"input": SiteRule(0.1)})), routing, x_TH, x_TH)
    kinds = ("ffn",) * 4 + ("constant",)
    store = ExpertStore(layer().gate_up[:4], layer().down[:4], kinds)
    with pytest.raises(MoebenchError, match="through 'constant' experts"):
        reference_gradients(store, routing, x_TH, x_TH)


def test_missing_or_misshapen_gradients_have_a_reason():
    store, (x_TH, routing) = layer(), traffic()
    expected = reference_gradients(store, routing, x_TH, x_TH)
    good = Gradients(expected.x_TH.float(), expected.gate_up.float(), expected.down.float())
    assert compare_gradients(good, expected, torch.float32).ok
    missing = compare_gradients(dataclasses.replace(good, down=None), expected, torch.float32)
    assert missing.reason == "gradient of down: the output is a NoneType, not a tensor"
    shape = compare_gradients(dataclasses.replace(good, x_TH=good.x_TH[1:]), expected, torch.float32)
    assert "shape (11, 16)" in shape.reason
