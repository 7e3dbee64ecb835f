"""The top-k family, DeepSeek-V3 and MoE++: what each one claims. The promises of all are in test_every_router.py."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection
from moebench.moe.layer import LayerWeights
from moebench.moe.metrics import routing_metrics
from moebench.moe.plugins import DESCRIPTORS, DeepSeekV3, Mixtral, TopK
from moebench.moe.router import One, Residual, Sigmoid, Softmax, select, top_k
from moebench.moe.routing import Context, Routing
from moebench.moe.shapes import ModelShape

ROUTINGS = {descriptor.name: descriptor for descriptor in DESCRIPTORS if descriptor.kind == "routing"}
HIDDEN, EXPERTS, TOKENS = 32, 64, 48
SOFTMAX = Selection("softmax", 4, renormalize=True)
SIGMOID_GROUPED = Selection("sigmoid", 4, True, 2.5, True, (8, 4))


@dataclass(frozen=True)
class Variant:
    """A routing with its parameters on a layer with the given selection of its own."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    own: Selection = SOFTMAX

    def __str__(self):
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.overrides.items()), self.own.score])

    @property
    def shape(self):
        return ModelShape(HIDDEN, 8, EXPERTS, 2, (0, 1), self.own)

    @property
    def params(self):
        return ROUTINGS[self.name].params_from(self.overrides)

    def build(self, seed=0, weights=None):
        """The bundle for weights without a router, unless some are given."""
        weights = layer_weights() if weights is None else weights
        return ROUTINGS[self.name].create(self.overrides)(weights, self.shape, seed)


relaxed = settings(deadline=None, max_examples=60)


def layer_weights(**changes):
    """Experts of no consequence to a router."""
    return replace(LayerWeights(torch.zeros(EXPERTS, 16, HIDDEN), torch.zeros(EXPERTS, HIDDEN, 8)), **changes)


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def context(bundle, tokens=TOKENS, order_T=None, **changes):
    """A Context with every field that the router needs; ``order_T`` permutes its tokens."""
    unknown = bundle.router.needs - {"prev"}
    assert not unknown, f"build the Context field {unknown} here"
    logits_TE = seeded(tokens, len(bundle.kinds), seed=9)
    logits_TE = logits_TE if order_T is None else logits_TE[order_T]
    prev = Routing.topk(logits_TE.topk(1).indices, torch.ones(tokens, 1), len(bundle.kinds), logits_TE)
    return Context(prev=prev if "prev" in bundle.router.needs else None, **changes)


def route(bundle, x_TH=None, **changes):
    x_TH = seeded(TOKENS, HIDDEN, seed=1) if x_TH is None else x_TH
    return bundle.router(x_TH, context(bundle, len(x_TH), **changes))


# --- the top-k family ------------------------------------------------------------------------------------------------


@st.composite
def distinct_logits(draw):
    """Rows of distinct logits, multiples of 1/8 in [-10, 10], so that no two probabilities round to the same."""
    experts = draw(st.integers(2, 8))
    row = st.lists(st.integers(-80, 80), min_size=experts, max_size=experts, unique=True)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4))) / 8


@relaxed
@given(distinct_logits(), st.data())
def test_mixtral_is_softmax_over_the_selected_logits(logits_TE, data):
    """R1: renormalised top-k of softmax = softmax of the top-k logits; the choice exactly, weights to 1.2e-7."""
    k = data.draw(st.integers(1, logits_TE.shape[1]))
    indices_TK, weights_TK = select(logits_TE, Selection("softmax", k, renormalize=True))
    chosen = logits_TE.topk(k)
    assert torch.equal(indices_TK, chosen.indices)
    torch.testing.assert_close(weights_TK, chosen.values.softmax(-1), atol=3e-7, rtol=0)


def test_one_expert_renormalised_gives_the_router_no_gradient():
    """R28: the weight is exactly 1 whatever the logits, so only a balance loss can teach the router."""
    logits_TE = seeded(16, 8).requires_grad_()
    _, weights_TK = select(logits_TE, Selection("softmax", 1, renormalize=True))
    assert (weights_TK == 1).all()
    weights_TK.square().sum().backward()
    assert float(logits_TE.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("rule", [Softmax(), Sigmoid(True, 2.5), One()])
def test_ranking_does_not_depend_on_the_weighter(rule):
    logits_TE = seeded(20, 8)
    assert torch.equal(top_k(rule.scores(logits_TE), 3), logits_TE.topk(3).indices)


def test_one_ranks_by_logits_where_softmax_underflows():
    logits_TE = torch.tensor([[-200.0, -300.0, -150.0, 200.0]])
    assert select(logits_TE, Selection("one", 3, renormalize=False))[0].tolist() == [[3, 2, 0]]


def test_the_models_bias_and_groups_stay_with_its_own_score():
    shape = Variant("topk", own=SIGMOID_GROUPED).shape
    assert TopK(k=2).selection(shape) == replace(SIGMOID_GROUPED, k=2)
    assert Mixtral().selection(shape) == Selection("softmax", 2, renormalize=True)
    with pytest.raises(ValueError, match="32 experts of the kept groups"):
        TopK(k=33).selection(shape)


@pytest.mark.parametrize(("k", "groups"), [(0, None), (9, None), (5, (4, 2)), (2, (3, 2))])
def test_a_choice_that_cannot_be_made_is_refused(k, groups):
    with pytest.raises(ValueError, match="choose a smaller k"):
        top_k(seeded(2, 8), k, groups=groups)


@pytest.mark.parametrize("bias_E", [None, torch.zeros(8)])
def test_select_wants_a_bias_exactly_where_the_selection_has_one(bias_E):
    with pytest.raises(ValueError, match="give bias_E"):
        select(seeded(2, 8), Selection("softmax", 2, True, bias=bias_E is None), bias_E)


def test_own_router_is_used_and_its_shape_checked():
    router_EH = seeded(EXPERTS, HIDDEN, seed=6)
    x_TH = seeded(TOKENS, HIDDEN, seed=1)
    bundle = Variant("mixtral").build(weights=layer_weights(router_EH=router_EH))
    torch.testing.assert_close(route(bundle, x_TH).logits_TE, x_TH @ router_EH.T)
    with pytest.raises(ValueError, match="layer's shape says"):
        Variant("mixtral").build(weights=layer_weights(router_EH=router_EH[1:]))
    with pytest.raises(ValueError, match="router bias"):
        Variant("deepseek_v3").build(weights=layer_weights(router_bias_E=torch.zeros(3)))


# --- against transformers' own modules -------------------------------------------------------------------------------


def theirs(module, class_name, config_name, **config):
    """A router of transformers with seeded random weights."""
    modeling = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    configuration = pytest.importorskip(f"transformers.models.{module}.configuration_{module}")
    router = getattr(modeling, class_name)(getattr(configuration, config_name)(hidden_size=HIDDEN, **config))
    with torch.no_grad():
        for index, tensor in enumerate([*router.parameters(), *router.buffers()]):
            tensor.copy_(seeded(*tensor.shape, seed=20 + index) * 0.2)
    return router


def assert_same(routing, indices_TK, weights_TK):
    """Exactly the same experts, weights to 1e-6; the order of slots is free."""
    other_TE = Routing.topk(indices_TK, weights_TK, routing.num_experts).to_dense().detach()
    own_TE = routing.to_dense().detach()
    assert torch.equal(own_TE != 0, other_TE != 0)
    torch.testing.assert_close(own_TE, other_TE, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "overrides", "router", "config"),
    [
        ("mixtral", {}, ("mixtral", "MixtralTopKRouter", "MixtralConfig"), {"num_local_experts": EXPERTS}),
        ("olmoe", {}, ("olmoe", "OlmoeTopKRouter", "OlmoeConfig"), {"num_experts": EXPERTS}),
        (
            "qwen3",
            {},
            ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig"),
            {"num_experts": EXPERTS, "norm_topk_prob": True},
        ),
        (
            "qwen3",
            {"renormalize": False},
            ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig"),
            {"num_experts": EXPERTS},
        ),
    ],
)
def test_top_k_family_is_that_of_transformers(name, overrides, router, config):
    reference = theirs(*router, **config)
    x_TH = seeded(512, HIDDEN, seed=1)
    bundle = Variant(name, overrides).build(weights=layer_weights(router_EH=reference.weight))
    logits_TE, weights_TK, indices_TK = reference(x_TH)
    routing = route(bundle, x_TH)
    assert torch.equal(routing.logits_TE, logits_TE)
    assert_same(routing, indices_TK, weights_TK)


def test_switch_is_that_of_transformers():
    reference = theirs(
        "switch_transformers",
        "SwitchTransformersTop1Router",
        "SwitchTransformersConfig",
        num_experts=EXPERTS,
        expert_capacity=512,
    ).eval()
    x_TH = seeded(512, HIDDEN, seed=1)
    bundle = Variant("switch").build(weights=layer_weights(router_EH=reference.classifier.weight))
    chosen_1TE, weights_1T1, _ = reference(x_TH[None])
    assert_same(route(bundle, x_TH), chosen_1TE[0].argmax(-1, keepdim=True), weights_1T1[0])


def test_deepseek_is_that_of_transformers():
    reference = theirs(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "DeepseekV3Config",
        n_routed_experts=EXPERTS,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    assert reference.e_score_correction_bias.abs().max() > 0.1
    weights = layer_weights(router_EH=reference.weight, router_bias_E=reference.e_score_correction_bias)
    x_TH = seeded(512, HIDDEN, seed=1)
    _, weights_TK, indices_TK = reference(x_TH)
    assert_same(route(Variant("deepseek_v3").build(weights=weights), x_TH), indices_TK, weights_TK)
    assert_same(route(Variant("topk", {"k": 8}, SIGMOID_GROUPED).build(weights=weights), x_TH), indices_TK, weights_TK)


# --- DeepSeek-V3 -----------------------------------------------------------------------------------------------------


def imbalance(routing):
    return next(metric.value for metric in routing_metrics(routing) if metric.name == "load_max_over_mean")


@pytest.mark.parametrize(("rate", "flat"), [(0.005, True), (0.0, False)])
def test_bias_flattens_a_skewed_load(rate, flat):
    """R6: offsets of +-2 over 16 experts; without steps the load stays as it was."""
    shape = ModelShape(HIDDEN, 8, 16, 1, (0,), Selection("softmax", 2, True))
    router_EH = seeded(16, HIDDEN, seed=6) * HIDDEN**-0.5
    router_EH[:, 0] = torch.linspace(-2, 2, 16)
    params = {"k": 2, "groups": 1, "groups_kept": 1, "update_rate": rate}
    bundle = ROUTINGS["deepseek_v3"].create(params)(layer_weights(router_EH=router_EH), shape, 0)

    def batch(step, tokens=1024):
        x_TH = seeded(tokens, HIDDEN, seed=step)
        x_TH[:, 0] = 1
        return bundle.router(x_TH, Context())

    before = imbalance(batch(1000, 8192))
    with torch.no_grad():
        for step in range(400):
            bundle.router.update(batch(step))
    after = batch(1000, 8192)
    assert before > 3
    assert (imbalance(after) < 1.2) == flat
    torch.testing.assert_close(after.to_dense().sum(1), torch.full((8192,), 2.5))


def test_one_update_is_one_step_against_the_load():
    bundle = Variant("deepseek_v3", {"update_rate": 0.5}).build()
    routing = Routing.topk(torch.tensor([[0], [0], [1]]), torch.ones(3, 1), EXPERTS)
    bundle.router.update(routing)
    bias_E = bundle.router.selector.bias_E
    assert bias_E[:2].tolist() == [-0.5, -0.5]
    assert (bias_E[2:] == 0.5).all()
    assert not bias_E.requires_grad


def test_a_token_draws_from_the_kept_groups_only():
    rule = DeepSeekV3(groups_kept=2).selection(Variant("deepseek_v3").shape)
    groups_TK = select(seeded(200, EXPERTS), rule, torch.zeros(EXPERTS))[0] // (EXPERTS // rule.groups[0])
    assert max(len(set(row)) for row in groups_TK.tolist()) == 2


# --- MoE++ -----------------------------------------------------------------------------------------------------------


def test_moepp_weights_by_hand():
    """Zero beside an FFN leaves the FFN weight 1; otherwise the two selected share by their probabilities."""
    bundle = Variant("moepp", {"zero": 16, "scale": 2.0}).build()
    routing = route(bundle)
    probs_TE = routing.logits_TE.softmax(-1)
    zero_beside = 0
    for token in range(TOKENS):
        chosen = probs_TE[token].topk(2).indices.tolist()
        paid = [expert for expert in chosen if bundle.kinds[expert] != "zero"]
        zero_beside += len(paid) == 1
        expected_E = torch.zeros(routing.num_experts)
        if paid:
            expected_E[paid] = 2 * probs_TE[token, paid] / probs_TE[token, paid].sum()
        torch.testing.assert_close(routing.to_dense()[token], expected_E)
    assert zero_beside > 5


@pytest.mark.parametrize("overrides", [{}, {"scale": 2.0, "k": 4, "zero": 8}, {"scorer": "mlp"}, {"zero": 0}])
def test_moepp_weights_sum_to_the_scale_and_only_zero_experts_shorten_k(overrides):
    bundle = Variant("moepp", overrides).build()
    routing, params = route(bundle), Variant("moepp", overrides).params
    sum_T = routing.to_dense().sum(1)
    torch.testing.assert_close(sum_T, torch.full_like(sum_T, params.scale) * (routing.k_T > 0))
    assert params.k - bundle.kinds.count("zero") <= routing.k_T.min() <= routing.k_T.max() == params.k


def test_moepp_extra_rows_follow_the_models_own():
    router_EH = seeded(EXPERTS, HIDDEN, seed=6) * 0.01
    bundle = Variant("moepp").build(weights=layer_weights(router_EH=router_EH))
    rows_EH = bundle.router.scorer.scorer.weight_EH
    assert bundle.kinds == ("ffn",) * EXPERTS + ("constant", "constant", "copy", "zero")
    assert torch.equal(rows_EH[:EXPERTS], router_EH)
    assert rows_EH[EXPERTS:].detach().std() == pytest.approx(float(router_EH.std()), rel=0.3)


def test_moepp_constants():
    constants = Variant("moepp", {"constant": 3}).build().constants
    assert constants.gate_C2H.shape == (3, 2, HIDDEN)
    assert constants.value_CH.shape == (3, HIDDEN)
    assert constants.value_CH.std() == pytest.approx(1.0, rel=0.3)
    assert Variant("moepp", {"constant": 0}).build().constants is None


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
def test_gating_residual_of_zero_is_no_residual(scorer):
    with_map, without = (Variant("moepp", {"residual": r, "scorer": scorer}).build() for r in (True, False))
    x_TH, ctx = seeded(TOKENS, HIDDEN, seed=1), context(with_map)
    assert ctx.prev is not None
    assert without.router.needs == frozenset()
    assert not torch.equal(with_map.router(x_TH, ctx).to_dense(), without.router(x_TH, ctx).to_dense())
    with torch.no_grad():
        with_map.router.scorer.map_EE.zero_()
    assert torch.equal(with_map.router(x_TH, ctx).to_dense(), without.router(x_TH, ctx).to_dense())


def test_gating_residual_carries_raw_scores_with_their_own_residual():
    """Three layers: G3 = W3 x3 + V3 (W2 x2 + V2 W1 x1)."""
    layers = [Variant("moepp").build(seed) for seed in range(3)]
    states = [seeded(TOKENS, HIDDEN, seed=30 + index) for index in range(3)]
    prev = None
    for bundle, x_TH in zip(layers, states, strict=True):
        prev = bundle.router(x_TH, Context(prev=prev))
    linear = [x_TH @ bundle.router.scorer.scorer.weight_EH.T for bundle, x_TH in zip(layers, states, strict=True)]
    maps = [bundle.router.scorer.map_EE.T for bundle in layers]
    torch.testing.assert_close(prev.logits_TE, linear[2] + (linear[1] + linear[0] @ maps[1]) @ maps[2])


@pytest.mark.parametrize("logits_TE", [None, torch.zeros(TOKENS, 3)])
def test_gating_residual_needs_matching_scores(logits_TE):
    bundle = Variant("moepp").build()
    assert isinstance(bundle.router.scorer, Residual)
    prev = Routing(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0), (TOKENS, 3), logits_TE)
    with pytest.raises(ValueError, match=r"needs logits \(48, 68\)"):
        bundle.router(torch.zeros(TOKENS, HIDDEN), Context(prev=prev))
