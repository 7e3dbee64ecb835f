"""Smoothing changes no function, helps where there are outliers, and the aligned router is never worse than RTN."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Scheme
from moebench.moe.channel_stats import ChannelStats
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore, QTensor
from moebench.moe.layer import LayerWeights, PreparedLayer, SharedExpert, assignments, ffn_hidden, moe_forward
from moebench.moe.routing import Routing
from moebench.moe.smoothing.params import RouterQuantization, Smoothing
from moebench.moe.smoothing.router import aligned_router, alignment_loss, topk_agreement
from moebench.moe.smoothing.scales import (
    LayerStats,
    channel_scale,
    expert_aware_scale,
    fold_input,
    inject_outliers,
    naive_scale,
    router_scale,
    smooth_hidden,
)
from moebench.moe.smoothing.steps import quantized_router, smoothed

E, H, F, S, T, K = 6, 16, 24, 8, 120, 2


def seeded(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(seed=0, dtype=torch.float64, gate_H=True):
    extra = {"gate_H": seeded(H, seed=seed + 5, dtype=dtype)} if gate_H else {"mix_2H": seeded(2, H, seed=seed + 5)}
    shared = SharedExpert(
        seeded(2 * S, H, seed=seed + 3, dtype=dtype), seeded(H, S, seed=seed + 4, dtype=dtype), **extra
    )
    return LayerWeights(
        seeded(E, 2 * F, H, seed=seed, dtype=dtype) / 4,
        seeded(E, H, F, seed=seed + 1, dtype=dtype) / 4,
        seeded(E, H, seed=seed + 2, dtype=dtype),
        shared=shared,
    )


def routed(weights, x_TH):
    weights_TK, indices_TK = (x_TH @ weights.router_EH.T).softmax(-1).topk(K)
    return Routing.topk(indices_TK, weights_TK, E)


def output(weights, x_TH):
    store = ExpertStore(weights.gate_up, weights.down, ("ffn",) * E)
    return moe_forward(PreparedLayer(store, None, weights.shared), x_TH, routing=routed(weights, x_TH))


def channel_stats(x_NI):
    second = x_NI.double().T @ x_NI.double()
    return ChannelStats(second, x_NI.abs().amax(0).float(), x_NI.abs().mean(0).float(), len(x_NI), float(len(x_NI)))


def layer_stats(weights, x_TH):
    inputs, hidden = [channel_stats(torch.zeros(1, H))] * E, [channel_stats(torch.zeros(1, F))] * E
    for expert, token_N, _ in assignments(routed(weights, x_TH)):
        inputs[expert] = channel_stats(x_TH[token_N])
        hidden[expert] = channel_stats(ffn_hidden(x_TH[token_N], weights.gate_up[expert], "silu"))
    shared = channel_stats(ffn_hidden(x_TH, weights.shared.gate_up, "silu"))
    return LayerStats(inputs, channel_stats(x_TH), hidden, shared)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["experts", "input", "router"]),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
    st.integers(0, 50),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_a_smoothed_layer_is_the_layer(by, alpha, hidden, gate_H, seed, dtype):
    weights, x_TH = layer(seed, dtype, gate_H or dtype == torch.float32), seeded(T, H, seed=seed + 9, dtype=dtype)
    x_TH[:, 3] *= 50
    before = output(weights, x_TH)
    made = smoothed(Smoothing(by, alpha, hidden), weights, layer_stats(weights, x_TH))
    after = output(made.weights, (x_TH * made.input_scale_H).to(dtype))
    distance = float((after - before).norm() / before.norm())
    assert distance < (1e-12 if dtype == torch.float64 else 1e-5)
    assert made.weights.gate_up.dtype == dtype


@settings(deadline=None, max_examples=20)
@given(st.sets(st.integers(0, H - 1), max_size=4), st.sampled_from([4.0, 64.0, 0.5]), st.integers(0, 20))
def test_injected_outliers_of_a_power_of_two_change_no_bit_of_the_function(channels, factor, seed):
    weights, x_TH = layer(seed), seeded(T, H, seed=seed + 9)
    made = inject_outliers(weights, sorted(channels), factor)
    seen_TH = x_TH * made.input_scale_H
    ratio_H = (seen_TH / x_TH).amax(0)
    assert torch.equal(ratio_H, torch.ones(H).double().index_fill(0, torch.tensor(sorted(channels)).long(), factor))
    assert torch.equal(output(made.weights, seen_TH), output(weights, x_TH))


def test_the_scale_is_the_largest_that_an_expert_the_shared_one_or_the_router_asks_for():
    weights, x_TH = layer(), seeded(T, H, seed=9)
    stats = layer_stats(weights, x_TH)
    found_H = expert_aware_scale(weights, stats)
    wanted = torch.zeros(H, dtype=torch.float64)
    for one, matrix in [
        *zip(stats.experts, weights.gate_up, strict=True),
        (stats.all, weights.shared.gate_up),
        (stats.all, weights.router_EH),
    ]:
        for j in range(H):
            wanted[j] = max(wanted[j], float(one.absmax_I[j]) ** 0.5 / float(matrix[:, j].abs().max()) ** 0.5)
    torch.testing.assert_close(found_H, wanted)
    assert bool((found_H >= router_scale(weights, stats)).all())
    assert not torch.allclose(found_H, naive_scale(weights, stats))


def test_experts_without_tokens_ask_for_nothing_and_dead_channels_keep_scale_one():
    weights = layer()
    x_TH = seeded(T, H, seed=9)
    x_TH[:, 5] = 0
    stats = layer_stats(weights, x_TH)
    starved = replace(stats, experts=[*stats.experts[:-1], channel_stats(torch.zeros(1, H))])
    found_H = expert_aware_scale(replace(weights, gate_up=weights.gate_up * 1e-6), starved)
    assert found_H[5] == 1
    assert bool((found_H > 0).all() and found_H.isfinite().all())
    assert not channel_scale(torch.ones(3), torch.zeros(2, 3), 0.5).any()


def fake_quantized(x, bits, dim=-1):
    top = 2 ** (bits - 1) - 1
    step = x.abs().amax(dim, keepdim=True) / top
    return (x / step).round() * step


def w4a4_error(weights, x_TH, scale_H, wanted_TH, routing):
    """Every token and every row of a weight in 4 bits, gates left alone."""
    quantized = replace(weights, gate_up=fake_quantized(weights.gate_up, 4), shared=None)
    store = ExpertStore(quantized.gate_up, quantized.down, ("ffn",) * E)
    seen_TH = fake_quantized(x_TH * scale_H, 4)
    found_TH = moe_forward(PreparedLayer(store, None), seen_TH, routing=routing)
    return float((found_TH - wanted_TH).norm() / wanted_TH.norm())


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_smoothing_lowers_the_error_of_four_bit_activations_with_outliers(seed):
    weights, x_TH = replace(layer(seed), shared=None), seeded(T, H, seed=seed + 9)
    made = inject_outliers(weights, [2, 7], 64.0)
    weights, x_TH = made.weights, x_TH * made.input_scale_H
    routing = routed(weights, x_TH)
    wanted_TH = moe_forward(
        PreparedLayer(ExpertStore(weights.gate_up, weights.down, ("ffn",) * E), None), x_TH, routing=routing
    )
    inputs = [channel_stats(torch.zeros(1, H))] * E
    for expert, token_N, _ in assignments(routing):
        inputs[expert] = channel_stats(x_TH[token_N])
    stats = LayerStats(inputs, channel_stats(x_TH))
    errors = {"none": w4a4_error(weights, x_TH, torch.ones(H), wanted_TH, routing)}
    for by in ("experts", "input", "router"):
        folded = smoothed(Smoothing(by, hidden=False), weights, stats)
        errors[by] = w4a4_error(folded.weights, x_TH, folded.input_scale_H, wanted_TH, routing)
    assert errors["experts"] < 0.6 * errors["none"]
    assert errors["experts"] <= 1.02 * min(errors["input"], errors["router"])


def test_hidden_channels_are_smoothed_by_expert():
    weights, x_TH = layer(), seeded(T, H, seed=9)
    stats = layer_stats(weights, x_TH)
    made = smooth_hidden(weights, stats)
    expert = int(routed(weights, x_TH).expert_N[0])
    scale_F = channel_scale(stats.hidden[expert].absmax_I, weights.down[expert], 0.5)
    torch.testing.assert_close(made.down[expert], weights.down[expert] * scale_F)
    torch.testing.assert_close(made.gate_up[expert, F:], weights.gate_up[expert, F:] / scale_F[:, None])
    assert torch.equal(made.gate_up[:, :F], weights.gate_up[:, :F])
    with pytest.raises(ValueError, match="ungated FFN"):
        smooth_hidden(replace(weights, gated=False), stats)


def test_mistakes_are_told():
    weights, x_TH = layer(), seeded(T, H, seed=9)
    stats = layer_stats(weights, x_TH)
    with pytest.raises(ValueError, match="5 statistics for 6 experts"):
        expert_aware_scale(weights, replace(stats, experts=stats.experts[:5]))
    with pytest.raises(ValueError, match="no gate"):
        router_scale(replace(weights, router_EH=None), stats)
    with pytest.raises(ValueError, match="one positive number"):
        fold_input(weights, torch.zeros(H))
    with pytest.raises(ValueError, match="factor=-1"):
        inject_outliers(weights, [0], -1)
    with pytest.raises(ValueError, match="alpha=2"):
        Smoothing(alpha=2)
    with pytest.raises(ValueError, match="use 2, 4 or 8"):
        RouterQuantization(3)


# --- the router ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([2, 4, 8]), st.integers(1, E), st.integers(0, 30), st.integers(1, 60))
def test_an_aligned_router_is_never_worse_than_rounding_on_its_calibration_tokens(bits, k, seed, tokens):
    router_EH, x_TH = seeded(E, H, seed=seed), seeded(tokens, H, seed=seed + 1) @ seeded(H, H, seed=seed + 2)
    scheme = RouterQuantization(bits).scheme()
    made = aligned_router(router_EH, x_TH, k, scheme)
    target_TE = x_TH @ router_EH.T
    plain_TE = x_TH @ round_to_nearest(router_EH, scheme).dequantize(torch.float64).T
    found_TE = x_TH @ made.weight.dequantize(torch.float64).T
    assert made.loss_before == pytest.approx(float(alignment_loss(target_TE, plain_TE, k)))
    assert made.loss == pytest.approx(float(alignment_loss(target_TE, found_TE, k)))
    assert made.loss <= made.loss_before
    assert topk_agreement(target_TE, found_TE, k) >= topk_agreement(target_TE, plain_TE, k)
    assert made.weight.nbytes == round_to_nearest(router_EH, scheme).nbytes
    assert isinstance(made.weight, QTensor)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alignment_helps_on_tokens_that_it_has_not_seen(seed):
    mix_HH = seeded(H, H, seed=seed + 2)
    router_EH, x_TH = seeded(E, H, seed=seed), seeded(2000, H, seed=seed + 1) @ mix_HH
    seen_TH, new_TH = x_TH[:1000], x_TH[1000:]
    target_TE = new_TH @ router_EH.T
    losses, agreements = [], []
    for align in (False, True):
        weight = quantized_router(RouterQuantization(2, align), router_EH, seen_TH, K).dequantize(torch.float64)
        losses.append(float(alignment_loss(target_TE, new_TH @ weight.T, K)))
        agreements.append(topk_agreement(target_TE, new_TH @ weight.T, K))
    assert losses[1] < 0.7 * losses[0]
    assert agreements[1] > agreements[0]


def test_the_loss_by_hand_and_agreement_by_hand():
    z = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 1.0, 5.0]], dtype=torch.float64)
    p = torch.tensor([2.0, 1.0], dtype=torch.float64).softmax(0)
    kl = float((p * (p / 0.5).log()).sum())
    assert float(alignment_loss(z, other, 2)) == pytest.approx(1 + 25 + kl)
    assert float(alignment_loss(z, z, 2)) == 0
    assert topk_agreement(z, other, 1) == 0
    assert topk_agreement(z, other, 3) == 1


def test_a_router_that_needs_no_rounding_is_kept():
    router_EH = torch.randint(-7, 8, (E, H), generator=torch.Generator().manual_seed(0)).double()
    router_EH[:, 0] = 7
    made = aligned_router(router_EH, seeded(50, H), K, Scheme("rtn", 4.0, None, True))
    assert torch.equal(made.weight.dequantize(torch.float64), router_EH)
    assert (made.loss, made.agreement) == (0, 1)


def test_mistakes_of_alignment_are_told():
    with pytest.raises(ValueError, match="got none"):
        aligned_router(seeded(E, H), seeded(0, H), K, RouterQuantization().scheme())
    with pytest.raises(ValueError, match="use a symmetric scheme"):
        aligned_router(seeded(E, H), seeded(9, H), K, Scheme("rtn", 4.0, 8, False))
    with pytest.raises(ValueError, match="k=7"):
        aligned_router(seeded(E, H), seeded(9, H), 7, RouterQuantization().scheme())
