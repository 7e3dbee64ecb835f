"""Slimming, merging and parameter accounting: scores are derivatives, and what is kept computes what it did."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Registry, Selection
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, expert_forward, moe_forward
from moebench.moe.recipe import Recipe, Stage, prepare_layer
from moebench.moe.shapes import ModelShape
from moebench.moe.transforms.accounting import PHI
from moebench.moe.transforms.compression import gate_routing, merged, slimmed
from moebench.moe.transforms.compression_params import DESCRIPTORS, Merge, Slim
from moebench.moe.transforms.merge import aligned_order, expert_outputs, group_experts, merge
from moebench.moe.transforms.slim import best_channels, chances, layer_gradient, magnitudes, slim, taylor_terms
from moebench.moe.transforms.steps import utilisation

E, H, F, T = 5, 8, 12, 60
SHAPE = ModelShape(H, F, E, 1, (0,), Selection("softmax", 2, renormalize=True))


def seeded(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(seed=0, gated=True, dtype=torch.float64, bias_E=None):
    rows = 2 * F if gated else F
    return LayerWeights(
        seeded(E, rows, H, seed=seed, dtype=dtype),
        seeded(E, H, F, seed=seed + 1, dtype=dtype),
        seeded(E, H, seed=seed + 2, dtype=dtype),
        bias_E,
        gated=gated,
    )


def store_of(weights):
    kinds = ("ffn",) * len(weights.down)
    return ExpertStore(weights.gate_up, weights.down, kinds, weights.activation, weights.gated)


def output(weights, x_TH, routing):
    return moe_forward(PreparedLayer(store_of(weights), None), x_TH, routing=routing)


def one_output(weights, x_TH, expert):
    return expert_forward(x_TH, weights.gate_up[expert], weights.down[expert], store_of(weights))


# --- slimming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_taylor_terms_are_what_autograd_says_of_a_factor_of_each_channel(gated):
    weights, x_TH = layer(gated=gated), seeded(T, H, seed=9)
    routing, target_TH = gate_routing(weights, x_TH, 2), seeded(T, H, seed=11)
    factor_EF = torch.ones(E, F, dtype=torch.float64, requires_grad=True)  # d/d factor = sum_t h dL/dh at factor 1
    y_TH = output(replace(weights, down=weights.down * factor_EF[:, None, :]), x_TH, routing)
    loss = (y_TH - target_TH).square().sum() / 2
    (wanted_EF,) = torch.autograd.grad(loss, factor_EF)
    found_EF = taylor_terms(weights, routing, x_TH, (y_TH - target_TH).detach())
    torch.testing.assert_close(found_EF, wanted_EF)


def test_the_layers_own_gradient_is_that_of_its_relative_error_at_nothing():
    weights, x_TH = layer(), seeded(T, H, seed=9)
    routing = gate_routing(weights, x_TH, 2)
    y_TH = output(weights, x_TH, routing)
    kept_TH = torch.zeros_like(y_TH, requires_grad=True)
    loss = ((y_TH - kept_TH).square().sum(1) / (2 * y_TH.square().sum(1))).sum()
    (wanted_TH,) = torch.autograd.grad(loss, kept_TH)
    torch.testing.assert_close(layer_gradient(weights, routing, x_TH), wanted_TH)
    terms_EF = taylor_terms(weights, routing, x_TH, wanted_TH)
    assert float(terms_EF.sum()) == pytest.approx(-T)  # the terms of all channels take all of each token's error away


@settings(deadline=None, max_examples=25)
@given(st.integers(1, F), st.integers(0, 30), st.booleans())
def test_a_slimmed_layer_is_the_layer_whose_other_channels_are_zero(width, seed, gated):
    weights, x_TH = layer(seed, gated), seeded(T, H, seed=seed + 9)
    routing = gate_routing(weights, x_TH, 2)
    kept_EC = best_channels(chances(weights, seed), width)
    mask_EF = torch.zeros(E, F, dtype=torch.float64).scatter(1, kept_EC, 1.0)
    made = slim(weights, kept_EC)
    assert made.down.shape == (E, H, width)
    torch.testing.assert_close(
        output(made, x_TH, routing),
        output(replace(weights, down=weights.down * mask_EF[:, None]), x_TH, routing),
        rtol=1e-10,
        atol=1e-10,
    )
    assert torch.equal(made.router_EH, weights.router_EH)


def test_channels_without_effect_go_first_by_every_score_but_chance():
    weights, x_TH = layer(dtype=torch.float32), seeded(T, H, seed=9, dtype=torch.float32)
    dead = torch.arange(0, F, 2)
    down = weights.down.index_fill(2, dead, 0)
    weights = replace(weights, down=down, gate_up=weights.gate_up.index_fill(1, torch.cat([dead, dead + F]), 1e-3))
    routing = gate_routing(weights, x_TH, 2)
    for by in ("taylor", "magnitude"):
        made = slimmed(Slim(by=by))(weights, x_TH, 0)
        torch.testing.assert_close(output(made, x_TH, routing), output(weights, x_TH, routing))
    by_chance = slimmed(Slim(by="random"))(weights, x_TH, 0)
    assert not torch.allclose(output(by_chance, x_TH, routing), output(weights, x_TH, routing))
    assert torch.equal(by_chance.down, slimmed(Slim(by="random"))(weights, x_TH, 0).down)


def test_magnitude_is_the_norm_of_all_weights_of_a_channel():
    weights = layer()
    gate, up, down = weights.gate_up[2, 3], weights.gate_up[2, F + 3], weights.down[2, :, 3]
    assert float(magnitudes(weights)[2, 3]) == pytest.approx(float(torch.cat([gate, up, down]).norm()))


@pytest.mark.parametrize("seed", [0, 20, 40, 60])
def test_taylor_keeps_more_of_the_output_than_chance(seed):
    weights, x_TH = layer(seed, dtype=torch.float32), seeded(T, H, seed=seed + 9, dtype=torch.float32)
    weights = replace(weights, down=weights.down * seeded(F, seed=seed + 5, dtype=torch.float32).exp())
    routing = gate_routing(weights, x_TH, 2)
    whole = output(weights, x_TH, routing)
    error = {
        by: float((output(slimmed(Slim(by=by))(weights, x_TH, 0), x_TH, routing) - whole).norm())
        for by in ("taylor", "random")
    }
    assert error["taylor"] < error["random"]


def test_the_gate_of_deepseek_chooses_by_the_bias_and_weighs_without_it():
    bias_E = torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0])
    weights, x_TH = layer(bias_E=bias_E), seeded(T, H, seed=9)
    gate_TE = gate_routing(weights, x_TH, 2).to_dense()
    assert bool((gate_TE[:, 0] > 0).all())
    torch.testing.assert_close(gate_TE.sum(1), torch.ones(T, dtype=torch.float64))


# --- merging ---------------------------------------------------------------------------------------------------------


def shuffled(weights, expert, like, seed):
    """Return the layer whose ``expert`` is expert ``like`` with its channels in another order, and that order."""
    order_F = torch.randperm(F, generator=torch.Generator().manual_seed(seed))
    gate_up, down = weights.gate_up.clone(), weights.down.clone()
    gate_up[expert] = weights.gate_up[like].unflatten(0, (-1, F))[:, order_F].flatten(0, 1)
    down[expert] = weights.down[like][:, order_F]
    return replace(weights, gate_up=gate_up, down=down), order_F


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 40), st.booleans())
def test_an_expert_merged_with_itself_in_another_order_is_itself(seed, gated):
    weights, order_F = shuffled(layer(seed, gated), 3, 1, seed)
    found_F = aligned_order(weights.gate_up[3], weights.down[3], weights.gate_up[1], weights.down[1])
    assert torch.equal(order_F[found_F], torch.arange(F))
    load_E = torch.tensor([3, 5, 1, 2, 4])
    made = merge(weights, [[0], [1, 3], [2], [4]], load_E)
    torch.testing.assert_close(made.gate_up, weights.gate_up[[0, 1, 2, 4]])
    torch.testing.assert_close(made.down, weights.down[[0, 1, 2, 4]])
    torch.testing.assert_close(made.router_EH[1], (5 * weights.router_EH[1] + 2 * weights.router_EH[3]) / 7)
    plain = merge(weights, [[0], [1, 3], [2], [4]], load_E, align=False)
    x_TH = seeded(T, H, seed=seed + 9)
    if not torch.equal(order_F, torch.arange(F)):
        assert not torch.allclose(one_output(plain, x_TH, 1), one_output(weights, x_TH, 1))


def test_aligned_channels_are_nearer_than_any_other_order_of_few():
    import itertools

    small = [(seeded(8, H, seed=seed), seeded(H, 4, seed=seed + 1)) for seed in (0, 5)]
    (own, own_down), (like, like_down) = small

    def distance(order):
        order = torch.as_tensor(order)
        rows = own.unflatten(0, (2, 4))[:, order].flatten(0, 1)
        return float((rows - like).square().sum() + (own_down[:, order] - like_down).square().sum())

    best = min(distance(order) for order in itertools.permutations(range(4)))
    assert distance(aligned_order(own, own_down, like, like_down)) == pytest.approx(best)


def test_groups_have_the_busiest_as_centres_and_the_others_where_they_are_most_similar():
    features_ED = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.1], [0.1, 2.0], [-1.0, -1.0]])
    assert group_experts(features_ED, torch.tensor([9, 8, 1, 0, 7]), 3) == [[0, 2], [1, 3], [4]]
    assert group_experts(features_ED, torch.tensor([1, 1, 9, 8, 1]), 5) == [[0], [1], [2], [3], [4]]
    with pytest.raises(ValueError, match="groups=6"):
        group_experts(features_ED, torch.ones(5), 6)


@pytest.mark.parametrize("by", ["router", "outputs"])
def test_equal_experts_find_each_other_and_their_merge_is_their_function(by):
    weights, _ = shuffled(layer(), 3, 1, 0)
    weights.router_EH[3] = weights.router_EH[1]
    x_TH, load_E = seeded(T, H, seed=9), torch.tensor([9, 8, 7, 1, 6])
    features_ED = expert_outputs(weights, x_TH) if by == "outputs" else weights.router_EH
    groups = group_experts(features_ED, load_E, 4)
    assert groups == [[0], [1, 3], [2], [4]]
    made = merge(weights, groups, load_E)
    torch.testing.assert_close(expert_outputs(made, x_TH), expert_outputs(weights, x_TH)[[0, 1, 2, 4]])


@pytest.mark.parametrize("by", ["router", "outputs"])
def test_structure_merge_is_its_parts(by):
    weights, x_TH = layer(dtype=torch.float32), seeded(T, H, seed=9, dtype=torch.float32)
    made = merged(Merge(groups=3, by=by))(weights, x_TH, 0)
    load_E = utilisation(weights, x_TH, 2)
    features_ED = expert_outputs(weights, x_TH) if by == "outputs" else weights.router_EH
    wanted = merge(weights, group_experts(features_ED, load_E, 3), load_E)
    assert made.down.shape == (3, H, F)
    assert torch.equal(made.gate_up, wanted.gate_up)
    assert torch.equal(made.router_EH, wanted.router_EH)


def test_experts_without_any_load_count_the_same():
    weights = layer()
    made = merge(weights, [[0, 1], [2], [3], [4]], torch.zeros(E), align=False)
    torch.testing.assert_close(made.down[0], (weights.down[0] + weights.down[1]) / 2)


def test_shapes_and_mistakes():
    assert (Slim().reshape(SHAPE).width, Slim(width=5).reshape(SHAPE).width) == (6, 5)
    assert (Merge(groups=1).reshape(SHAPE).experts, Merge(groups=1).reshape(SHAPE).selection.k) == (1, 1)
    for params, words in ((Slim(width=13), "width=13"), (Merge(groups=6), "groups=6"), (Slim(top=9), "top=9")):
        with pytest.raises(ValueError, match=words):
            params.reshape(SHAPE)
    dense = replace(layer(), gate_up=seeded(2 * F, H), down=seeded(H, F))
    for act in (lambda: slim(dense, torch.zeros(1, 1).long()), lambda: merge(dense, [[0]], torch.ones(1))):
        with pytest.raises(ValueError, match="wants a layer of FFN experts"):
            act()
    with pytest.raises(ValueError, match="rising channels"):
        slim(layer(), torch.zeros(E, 2).long())
    with pytest.raises(ValueError, match="each of the layer's 5 experts once"):
        merge(layer(), [[0, 1], [2, 3]], torch.ones(E))
    with pytest.raises(ValueError, match="no gate"):
        gate_routing(replace(layer(), router_EH=None), seeded(3, H), 2)
    with pytest.raises(ValueError, match="got none"):
        gate_routing(layer(), seeded(0, H), 2)


# --- accounting ------------------------------------------------------------------------------------------------------


def test_slim_moe_is_accounted_from_its_configurations():
    assert [round(one.total() / 1e9, 1) for one in PHI.values()] == [41.9, 7.6, 3.8]
    assert [round(one.active() / 1e9, 1) for one in PHI.values()] == [6.6, 2.4, 1.3]  # the paper says 1.1 of the last


@pytest.mark.parametrize("name", list(PHI))
def test_the_count_is_that_of_the_very_model(name):
    transformers = pytest.importorskip("transformers")
    own = PHI[name]
    config = transformers.PhimoeConfig(
        vocab_size=own.vocabulary,
        hidden_size=own.hidden,
        intermediate_size=own.width,
        num_hidden_layers=2,
        num_attention_heads=own.heads,
        num_key_value_heads=own.kv_heads,
        head_dim=own.head_width,
        num_local_experts=own.experts,
        num_experts_per_tok=own.k,
        attention_bias=True,
        lm_head_bias=True,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == replace(own, layers=2).total()


# --- in a recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [Slim(), Slim(by="random"), Merge(), Merge(by="outputs", align=False)])
def test_a_recipe_prepares_what_the_shape_says(params, tmp_path):
    registry = Registry.load()
    descriptor = next(one for one in DESCRIPTORS if one.params is type(params))
    rest = {kind: registry.get(kind, name) for kind, name in (("routing", "topk"), ("quantization", "int4"))}
    stages = {kind: Stage(one, one.params_from({})) for kind, one in rest.items()}
    stages["quantization"] = Stage(rest["quantization"], rest["quantization"].params_from({"group": None}))
    none = registry.get("sparsity", "none")
    recipe = Recipe(structure=Stage(descriptor, params), sparsity=Stage(none, none.params_from({})), **stages)
    shape, x_TH = params.reshape(SHAPE), seeded(T, H, seed=9, dtype=torch.float32)
    prepared = [
        prepare_layer(recipe, layer(dtype=torch.float32), shape, x_TH, 0, torch.float32, {"layer": 0}, tmp_path)
        for _ in range(2)  # the second time from artefacts
    ]
    assert (prepared[0].store.num_experts, prepared[0].store.width) == (shape.experts, shape.width)
    one, other = (moe_forward(layer, x_TH) for layer in prepared)
    assert torch.equal(one, other)
    assert bool(one.isfinite().all())
