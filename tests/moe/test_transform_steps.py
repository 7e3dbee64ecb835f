"""Transforms as structures: shapes that are known before weights, weights that have them, and what stays the same."""

from dataclasses import replace

import pytest
import torch

from moebench.contracts import Registry, Selection
from moebench.moe.layer import LayerWeights, ffn_hidden, moe_forward
from moebench.moe.recipe import Recipe, Stage, prepare_layer
from moebench.moe.router import select
from moebench.moe.shapes import ModelShape
from moebench.moe.transforms.params import Aggregate, Prune, Upcycle
from moebench.moe.transforms.prune import at_random
from moebench.moe.transforms.steps import pruned, utilisation

H, F, E, T = 16, 12, 8, 200
REGISTRY = Registry.load()


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shape(k=2, renormalize=False, groups=None, bias=False, score="softmax", experts=E):
    return ModelShape(H, F, experts, 2, (0, 1), Selection(score, k, renormalize, 1.0, bias, groups))


def experts(bias_E=None):
    rows_EH = seeded(E, H, seed=2) * torch.linspace(0.3, 1.5, E)[:, None]
    return LayerWeights(seeded(E, 2 * F, H) * H**-0.5, seeded(E, H, F, seed=1) * F**-0.5, rows_EH, bias_E)


def dense():
    return LayerWeights(seeded(2 * F, H), seeded(H, F, seed=1))


def prepared(structure, params=None, weights=None, model=None, routing=None, seed=0):
    """The layer of a recipe with this structure, and the shape that the planner was told."""
    names = {"structure": structure, "routing": "topk", "quantization": "none", "sparsity": "none"}
    given = {"structure": params or {}, "routing": routing or {}}
    stages = {kind: REGISTRY.get(kind, name) for kind, name in names.items()}
    recipe = Recipe(**{kind: Stage(one, one.params_from(given.get(kind, {}))) for kind, one in stages.items()})
    model = recipe.structure.params.reshape(model or shape())
    weights = experts() if weights is None else weights
    return prepare_layer(recipe, weights, model, seeded(T, H, seed=7), seed, torch.float32, {}, None), model


def output(layer):
    return moe_forward(layer, seeded(T, H, seed=9))


@pytest.mark.parametrize(
    ("structure", "params", "experts_after"),
    [("prune", {}, 4), ("prune", {"keep": 1}, 1), ("prune", {"keep": 5, "by": "random"}, 5), ("aggregate", {}, 16)],
)
def test_weights_have_the_shape_that_was_planned(structure, params, experts_after):
    layer, model = prepared(structure, params)
    assert model.experts == experts_after
    assert layer.store.kinds == ("ffn",) * experts_after
    assert (len(layer.store.gate_up), len(layer.store.down)) == (experts_after, experts_after)
    assert layer.router.scorer.weight_EH.shape == (experts_after, H)
    assert output(layer).isfinite().all()


# --- prune -----------------------------------------------------------------------------------------------------------


def kept_of(layer):
    return [next(e for e in range(E) if torch.equal(experts().down[e], down)) for down in layer.store.down]


@pytest.mark.parametrize("top", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_busiest_are_kept_by_the_gates_own_choice(top, bias):
    weights = experts(3 * seeded(E, seed=5) if bias else None)
    model = shape(k=top, score="sigmoid" if bias else "softmax", bias=bias)
    chosen_TK, _ = select(seeded(T, H, seed=7) @ weights.router_EH.T, model.selection, weights.router_bias_E)
    counts_E = torch.bincount(chosen_TK.flatten(), minlength=E)
    assert torch.equal(utilisation(weights, seeded(T, H, seed=7), top), counts_E)
    layer, _ = prepared("prune", {"keep": 3, "top": top}, weights, model)
    kept = kept_of(layer)
    assert kept == sorted(kept)
    assert counts_E[kept].sum() == counts_E.topk(3).values.sum()
    assert torch.equal(layer.router.scorer.weight_EH, weights.router_EH[kept])
    if bias:
        assert torch.equal(layer.router.selector.bias_E, weights.router_bias_E[kept])


def test_random_experts_are_those_of_the_seed():
    draws = [kept_of(prepared("prune", {"keep": 3, "by": "random"}, seed=seed)[0]) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] == list(at_random(E, 3, 0))
    assert draws[0] != draws[2]


def test_keeping_all_changes_nothing():
    assert torch.equal(output(prepared("prune", {"keep": E})[0]), output(prepared("none")[0]))


def test_a_token_has_no_more_experts_than_are_kept():
    grouped = shape(k=4, groups=(4, 2))
    model = Prune(keep=3).reshape(grouped)
    assert (model.selection.k, model.selection.groups) == (3, None)
    assert Prune(keep=5).reshape(grouped).selection.k == 4


# --- aggregate -------------------------------------------------------------------------------------------------------


def test_a_layer_with_its_copy_has_half_the_best_probability():
    """R26, through a recipe: the output of top-1 is halved, and unchanged if weights are renormalised."""
    one, both = (output(prepared(name, model=shape(k=1))[0]) for name in ("none", "aggregate"))
    torch.testing.assert_close(both, 0.5 * one)
    one, both = (output(prepared(name, model=shape(k=1, renormalize=True))[0]) for name in ("none", "aggregate"))
    torch.testing.assert_close(both, one)


@pytest.mark.parametrize("groups", [None, (4, 2)])
def test_twice_the_slots_are_the_model_itself(groups):
    model = shape(k=2, groups=groups)
    one, both = prepared("none", model=model)[0], prepared("aggregate", model=model, routing={"k": 4})[0]
    torch.testing.assert_close(output(both), output(one), rtol=1e-4, atol=1e-6)


# --- upcycle ---------------------------------------------------------------------------------------------------------


def test_copies_are_the_ffn_whatever_the_router():
    """R25, through a recipe."""
    layer, model = prepared("upcycle", {"experts": 6, "k": 3}, dense(), shape(experts=0))
    assert (model.experts, model.width, model.selection.k) == (6, F, 3)
    x_TH, ffn = seeded(T, H, seed=9), dense()
    wanted_TH = ffn_hidden(x_TH, ffn.gate_up, "silu") @ ffn.down.T
    assert (output(layer) - wanted_TH).norm() <= 1e-6 * wanted_TH.norm()
    noisy, _ = prepared("upcycle", {"experts": 6, "k": 3, "noise": 0.1}, dense(), shape(experts=0))
    assert (output(noisy) - wanted_TH).norm() > 1e-2 * wanted_TH.norm()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "model", "words"),
    [
        (Prune(keep=0), shape(), "keep=0 must lie between 1 and the layer's 8 experts"),
        (Prune(keep=9), shape(), "keep=9 must lie between 1 and the layer's 8 experts"),
        (Prune(top=9), shape(), "top=9 must lie between 1 and the layer's 8 experts"),
        (Prune(), shape(experts=0), "'prune' wants experts"),
        (Aggregate(), shape(experts=0), "'aggregate' wants experts"),
        (Upcycle(), shape(), "'upcycle' wants a dense FFN"),
        (Upcycle(experts=2, k=3), shape(experts=0), "k=3 must lie between 1 and the 2 experts"),
    ],
)
def test_impossible_shapes_are_refused_while_planning(params, model, words):
    with pytest.raises(ValueError, match=words):
        params.reshape(model)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="no gate whose choices could be counted; use params"):
        pruned(Prune())(replace(experts(), router_EH=None), seeded(T, H), 0)
    with pytest.raises(ValueError, match="got none; ask for calibration tokens"):
        pruned(Prune())(experts(), seeded(0, H), 0)
    with pytest.raises(ValueError, match="must not be negative"):
        Upcycle(noise=-1)
