"""EAQuant through a recipe: the same function where nothing is rounded, a gate that is kept or counted, fair tokens."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError, Registry, Scheme, Selection
from moebench.moe.bits.calibration import calibrate_routed
from moebench.moe.codecs import gptq
from moebench.moe.codecs.integer_params import Gptq
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, SharedExpert, moe_forward, route
from moebench.moe.oracle import compare, reference
from moebench.moe.recipe import Recipe, Stage, prepare_layer
from moebench.moe.routing import Context, Routing
from moebench.moe.routing_metrics.agreement import agreement_per_token
from moebench.moe.shapes import ModelShape
from moebench.moe.smoothing.params import EAQuant, Outliers
from moebench.moe.smoothing.scales import inject_outliers
from moebench.moe.smoothing.steps import eaquant
from moebench.moe.smoothing.traffic import rows, traffic_of

H, F, S, E, K, T = 32, 16, 8, 6, 2, 400
SHAPE = ModelShape(H, F, E, 2, (0, 1), Selection("softmax", K, True))
REGISTRY = Registry.load()
EXACT = {"bits": 8, "act_bits": None, "group": None, "router": None, "balance": 0.0}


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def layer_weights(seed=0, shared=True):
    gate_H = randn(H, seed=seed + 5) / H**0.5
    always = SharedExpert(randn(2 * S, H, seed=seed + 3) / H**0.5, randn(H, S, seed=seed + 4) / S**0.5, gate_H)
    return LayerWeights(
        randn(E, 2 * F, H, seed=seed) / H**0.5,
        randn(E, H, F, seed=seed + 1) / F**0.5,
        randn(E, H, seed=seed + 2),
        shared=always if shared else None,
    )


def calibration():
    x_TH = randn(T, H, seed=40)
    x_TH[:, 3] *= 30
    return x_TH


def prepared(
    quantization=None,
    outliers=None,
    routing="topk",
    cache=None,
    dtype=torch.float32,
    seed=0,
    own=None,
    sparsity=("none", {}),
):
    """The layer that a recipe makes, with parameters of eaquant (or a name and its own) and of outliers, or without."""
    chosen = {
        "structure": ("none", {}) if outliers is None else ("outliers", outliers),
        "routing": (routing, {}),
        "quantization": quantization if isinstance(quantization, tuple) else ("none", {}),
        "sparsity": sparsity,
    }
    if isinstance(quantization, dict):
        chosen["quantization"] = ("eaquant", {"group": None, **quantization})
    members = {kind: (REGISTRY.get(kind, name), told) for kind, (name, told) in chosen.items()}
    stages = {kind: Stage(member, member.params_from(told)) for kind, (member, told) in members.items()}
    own = layer_weights() if own is None else own
    return prepare_layer(Recipe(**stages), own, SHAPE, calibration(), seed, dtype, {"layer": 0}, cache)


def distance(found_TH, wanted_TH):
    return float((found_TH - wanted_TH).detach().norm() / wanted_TH.detach().norm())


# --- folding is no change --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["experts", "input", "router", "none"]),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([None, 16.0, 3.7]),
)
def test_a_folded_layer_is_the_layer_where_no_code_is_rounded(smoothing, alpha, hidden, balance, factor):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moebench.moe.smoothing.steps.eaquant", lambda params: lambda store, seen: store)
        told = {**EXACT, "smoothing": smoothing, "alpha": alpha, "hidden": hidden, "balance": balance}
        layer = prepared(told, None if factor is None else {"channels": 3, "factor": factor})
    assert not layer.store.quantized
    assert torch.equal(layer.store.gate_up, layer_weights().gate_up) == (
        smoothing == "none" and not hidden and factor is None
    )
    plain, x_TH = prepared(), randn(64, H, seed=50)
    assert distance(moe_forward(layer, x_TH), moe_forward(plain, x_TH)) < 1e-5
    found, wanted = route(layer, x_TH), route(plain, x_TH)
    assert torch.equal(found.logits_TE, wanted.logits_TE), "a gate that is not rounded decides bit for bit as before"
    assert torch.equal(found.weight_N, wanted.weight_N)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 8), st.sampled_from([2.0**-4, 8.0, 64.0, 5.3]), st.integers(0, 5))
def test_outliers_keep_the_function_and_enlarge_what_experts_read(channels, factor, seed):
    layer, plain = prepared(outliers={"channels": channels, "factor": factor}, seed=seed), prepared(seed=seed)
    x_TH = randn(64, H, seed=50)
    found_TH, wanted_TH = moe_forward(layer, x_TH), moe_forward(plain, x_TH)
    assert distance(found_TH, wanted_TH) < 1e-5
    assert torch.equal(found_TH, wanted_TH) or factor == 5.3, "powers of two change no bit"
    ratio_H = (layer.reads(x_TH) / x_TH).amax(0)
    assert int((ratio_H - 1).abs().gt(1e-6).sum()) == channels
    torch.testing.assert_close(ratio_H, torch.where((ratio_H - 1).abs() > 1e-6, factor, 1.0))
    assert torch.equal(route(layer, x_TH).logits_TE, route(plain, x_TH).logits_TE)


def test_outliers_lie_in_the_same_channels_of_every_layer_and_move_with_the_seed():
    params, source = Outliers(channels=4), layer_weights()
    step = REGISTRY.get("structure", "outliers").create({"channels": 4})
    scales = [step(source, calibration(), seed).input_scale_H for seed in (0, 0, 1)]
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[0], scales[2])
    assert int((scales[0] == params.factor).sum()) == 4


@pytest.mark.parametrize("smoothing", ["experts", "input", "router"])
def test_every_smoothing_undoes_injected_outliers(smoothing):
    """Each asks for ``factor`` times its scale there: what a comparison of smoothings shows, it shows without them."""
    told = {"smoothing": smoothing, "router": None, "balance": 0.0}
    plain, injected = prepared(told), prepared(told, {"channels": 3, "factor": 64.0})
    torch.testing.assert_close(injected.input_scale_H, plain.input_scale_H)
    for one, other in zip(injected.store.gate_up, plain.store.gate_up, strict=True):
        torch.testing.assert_close(one.dequantize(), other.dequantize())


def test_other_stages_are_calibrated_on_what_the_experts_read():
    teal = ("teal", {"level": 0.5, "sites": ["input"]})
    layer = prepared(("gptq", {"group": None}), {"channels": 3, "factor": 64.0}, sparsity=teal)
    x_TH = calibration()
    read_TH, routing = layer.reads(x_TH), route(layer, x_TH)
    order_H = (layer.input_scale_H == 64).nonzero()[:, 0].tolist()
    made = inject_outliers(layer_weights(), order_H, 64.0).weights
    known = calibrate_routed(ExpertStore(made.gate_up, made.down, ("ffn",) * E), [(routing, read_TH)])
    for one, dense, stats in zip(layer.store.gate_up, made.gate_up, known.gate_up, strict=True):
        assert torch.equal(one.codes, gptq.encode(dense, Gptq(group=None), stats).codes)
    read_NH = read_TH[routing.token_N].abs().flatten()
    threshold = layer.store.sparsity.sites["input"].threshold
    assert float((read_NH <= threshold).float().mean()) == pytest.approx(0.5, abs=0.01)


# --- what rounding costs ---------------------------------------------------------------------------------------------


def test_smoothing_lowers_what_outliers_cost_at_four_bits():
    x_TH = calibration()[:64]
    wanted_TH = moe_forward(prepared(), x_TH)
    costs = {}
    for smoothing in ("none", "experts"):
        told = {"smoothing": smoothing, "router": None}
        layer = prepared(told, {"channels": 3, "factor": 64.0})
        costs[smoothing] = distance(moe_forward(layer, x_TH), wanted_TH)
    assert costs["experts"] < 0.5 * costs["none"]


@pytest.mark.parametrize("codec", ["rtn", "gptq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_pass_is_what_the_oracle_says_of_the_rescaled_inputs(codec, dtype):
    layer = prepared({"codec": codec}, {"channels": 3, "factor": 64.0}, dtype=dtype)
    assert layer.store.act_bits == 4
    x_TH = randn(50, H, seed=60).to(dtype)
    with torch.no_grad():
        routing = route(layer, x_TH)
        expected = reference(layer.store, routing, layer.reads(x_TH), layer.shared)
        check = compare(moe_forward(layer, x_TH), expected, dtype)
        assert check.ok, check.reason
        wrong = reference(layer.store, routing, x_TH, layer.shared)
        assert not compare(moe_forward(layer, x_TH), wrong, dtype).ok, "inputs without their factor must not pass"


# --- the gate --------------------------------------------------------------------------------------------------------


def test_a_rounded_gate_scores_by_its_codes_and_is_counted_as_packed():
    layer, plain = prepared({"router": 4, "smoothing": "none", "align": False}), prepared()
    code = round_to_nearest(layer_weights().router_EH.double(), Scheme("rtn", 4.0, None, True))
    assert torch.equal(layer.router.scorer.weight_EH, code.dequantize())
    assert layer.router_nbytes == code.nbytes == E * (H // 2 + 2)
    assert plain.router_nbytes == E * H * 4
    assert torch.equal(layer.exact_router.scorer.weight_EH, layer_weights().router_EH)
    assert plain.exact_router is plain.router


@pytest.mark.parametrize("smoothing", ["experts", "router"])
def test_a_rounded_gate_is_that_of_the_smoothed_inputs(smoothing):
    layer = prepared({"router": 4, "smoothing": smoothing}, {"channels": 3, "factor": 64.0})
    x_TH = randn(20, H, seed=70)
    scaled_TE = layer.reads(x_TH).double() @ layer.gate.code.dequantize(torch.float64).T
    torch.testing.assert_close(route(layer, x_TH).logits_TE.double(), scaled_TE, atol=1e-4, rtol=1e-4)


def test_alignment_brings_back_choices_that_rounding_changed():
    x_TH, agreed = calibration()[: T // 2], {}
    for align in (False, True):
        layer = prepared({"router": 2, "align": align, "balance": 0.0})
        exact = layer.exact_router(x_TH, Context())
        agreed[align] = float(agreement_per_token(route(layer, x_TH), exact)[:, 2].mean())
    assert agreed[False] < agreed[True] < 1


def test_a_gate_that_nothing_scores_by_is_not_called_rounded():
    with pytest.raises(MoebenchError, match="does not score by the layer's own gate"):
        prepared({"router": 4}, routing="hash")
    assert prepared({"router": None}, routing="hash").gate is None


def test_a_layer_without_a_gate_has_none_to_round():
    with pytest.raises(ValueError, match="no gate of its own"):
        prepared({"router": 4, "smoothing": "input"}, own=LayerWeights(*experts_alone()))


def experts_alone():
    weights = layer_weights()
    return weights.gate_up, weights.down


@pytest.mark.parametrize("routing", ["moepp", "moex", "time_moe"])
def test_routings_that_would_read_rescaled_inputs_are_refused(routing):
    own = layer_weights(shared=False)
    with pytest.raises(MoebenchError, match="rescales what experts read"):
        prepared(outliers={}, routing=routing, own=own)


# --- balanced calibration --------------------------------------------------------------------------------------------


def skewed(tokens=T):
    """Three tokens of four go to expert 0, the others to one of the rest."""
    expert_T = torch.where(torch.arange(tokens) % 4 == 3, 1 + torch.arange(tokens) // 4 % (E - 1), 0)
    return Routing.topk(expert_T[:, None], torch.ones(tokens, 1), E)


def counts(parts):
    return sum(routing.counts_E for routing, _ in parts)


def test_balance_adds_tokens_of_starved_experts_alone_from_the_spare_ones():
    x_TH, routing = calibration(), skewed()
    plain = traffic_of(EAQuant(balance=0), routing, x_TH, 0)
    made = traffic_of(EAQuant(balance=0.3), routing, x_TH, 0)
    assert len(plain.parts) == 1
    assert torch.equal(made.parts[0][0].expert_N, plain.parts[0][0].expert_N), "the traffic is the same"
    assert torch.equal(made.parts[1][1], x_TH[T // 2 :])
    wanted = 0.3 * (T // 2) / E
    assert int(counts(plain.parts)[1:].max()) < wanted + 1
    assert int(counts(made.parts).min()) >= wanted
    assert int(made.parts[1][0].counts_E[0]) == 0, "an expert that has enough gets nothing"
    assert made.short == ()
    greedy = traffic_of(EAQuant(balance=1.0), routing, x_TH, 0)
    assert greedy.short == (1, 2, 3, 4, 5)


def test_balance_is_counted_and_changes_what_is_quantized():
    told = {"codec": "gptq", "router": None}
    balanced, plain = prepared({**told, "balance": 1.0}), prepared({**told, "balance": 0.0})
    assert plain.short_experts is None
    assert balanced.short_experts is not None
    pairs = zip(balanced.store.gate_up, plain.store.gate_up, strict=True)
    assert any(not torch.equal(one.codes, other.codes) for one, other in pairs)


def test_rows_of_a_routing_are_its_own():
    routing = Routing.topk(torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.rand(3, 2), E, randn(3, E), randn(3, E))
    part = rows(routing, 1, 3)
    assert part.token_N.tolist() == [0, 0, 1, 1]
    assert part.expert_N.tolist() == [2, 3, 4, 5]
    assert part.shape == (2, E)
    assert torch.equal(part.probs_TE, routing.probs_TE[1:])


def test_spare_tokens_are_looked_at_by_nobody_without_balance(monkeypatch):
    told = {"codec": "gptq", "balance": 0.0}
    first = prepared(told)
    changed = calibration()
    changed[T // 2 :] *= -7
    monkeypatch.setitem(globals(), "calibration", lambda: changed)
    second = prepared(told)
    assert torch.equal(first.input_scale_H, second.input_scale_H)
    for one, other in zip(first.store.gate_up, second.store.gate_up, strict=True):
        assert torch.equal(one.codes, other.codes)


# --- artefacts and mistakes ------------------------------------------------------------------------------------------


def test_a_folded_layer_is_found_again_bit_for_bit(tmp_path):
    first, again = (prepared({"codec": "gptq"}, {"channels": 2}, cache=tmp_path) for _ in range(2))
    kept = [json.loads((one / "meta.json").read_text()) for one in (tmp_path / "artefacts").iterdir()]
    assert sorted(one["inputs"]["stage"] for one in kept) == ["fold", "quantization", "structure"]
    assert torch.equal(first.input_scale_H, again.input_scale_H)
    assert torch.equal(first.gate.code.codes, again.gate.code.codes)
    assert first.short_experts == again.short_experts
    x_TH = randn(30, H, seed=80)
    assert torch.equal(moe_forward(first, x_TH), moe_forward(again, x_TH))


@pytest.mark.parametrize(
    "change", [{"alpha": 0.3}, {"smoothing": "input"}, {"router": 8}, {"balance": 0.5}, {"hidden": False}]
)
def test_another_setting_is_another_artefact(change, tmp_path):
    for told in ({}, change, {}):
        prepared(told, cache=tmp_path)
    assert len(list((tmp_path / "artefacts").iterdir())) == 4


def test_parameters_that_make_no_sense_are_told():
    for wrong, says in [
        ({"act_bits": 1}, "act_bits=1"),
        ({"router": 3}, "use 2, 4 or 8"),
        ({"alpha": -1}, "alpha=-1"),
        ({"bits": 0}, "bits=0"),
        ({"spare": 1.0}, "spare=1.0"),
        ({"spare": 0.0}, "give spare a part"),
    ]:
        with pytest.raises(ValueError, match=says):
            EAQuant(**wrong)
    with pytest.raises(ValueError, match="factor=0"):
        Outliers(factor=0)
    with pytest.raises(ValueError, match="'outliers' wants experts"):
        Outliers().reshape(SHAPE.with_(experts=0))
    with pytest.raises(ValueError, match="calibrate it first"):
        eaquant(EAQuant())(None, None)
    with pytest.raises(ValueError, match="got none"):
        traffic_of(EAQuant(), skewed(1).keep(torch.zeros(1, dtype=torch.bool)), randn(0, H), 0)
