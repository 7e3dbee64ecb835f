"""A budget over the layers of a model: kept in bytes, the same for everybody who asks, and spent as the rule says."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError, Registry, Selection
from moebench.moe.artefacts import read
from moebench.moe.bits.mixed_params import Mixed
from moebench.moe.bits.params import LayerBits
from moebench.moe.bits.plan import plan_artefact, plan_from, plan_of
from moebench.moe.bits.shared import Always, shared_of, store_of
from moebench.moe.bits.step import shared_step
from moebench.moe.bits.survey import LayerSurvey, Units, survey
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.layer import LayerWeights, PreparedLayer, SharedExpert, moe_forward
from moebench.moe.model_plan import model_plan
from moebench.moe.recipe import Recipe, Stage, begin_layer, finish_layer
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

HIDDEN, WIDTH, EXPERTS, LAYERS, TOKENS = 32, 16, 4, (1, 4, 5), 96
REGISTRY = Registry.load()
SHAPE = ModelShape(HIDDEN, WIDTH, EXPERTS, 2, LAYERS, Selection("softmax", 2, True), shared_width=2 * WIDTH)
BASE = {"scope": "model", "over": LAYERS, "group": 16, "bits": [2, 3, 4], "budget": 4.9}
UNITED = ("first", "last", "random", "random_layers", "uniform", "frequency", "outlier", "cosine", "greedy")
ROUTED = (*UNITED, "pmq")


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def weights(layer):
    up = randn(EXPERTS, 2 * WIDTH, HIDDEN, seed=layer) / HIDDEN**0.5
    down = randn(EXPERTS, HIDDEN, WIDTH, seed=100 + layer) / WIDTH**0.5
    shared_up = randn(4 * WIDTH, HIDDEN, seed=300 + layer) / HIDDEN**0.5
    shared = SharedExpert(shared_up, randn(HIDDEN, 2 * WIDTH, seed=400 + layer) / WIDTH**0.5, randn(HIDDEN, seed=7))
    return LayerWeights(up, down, randn(EXPERTS, HIDDEN, seed=200 + layer), None, shared)


def recipe_of(**params):
    chosen = {"structure": "none", "routing": "topk", "quantization": "mixed", "sparsity": "none"}
    members = {kind: REGISTRY.get(kind, choice) for kind, choice in chosen.items()}
    told = {"quantization": {**BASE, **params}}
    return Recipe(**{kind: Stage(member, member.params_from(told.get(kind, {}))) for kind, member in members.items()})


def begin(recipe, layer, cache=None):
    x_TH = randn(TOKENS, HIDDEN, seed=500 + layer)
    return begin_layer(recipe, weights(layer), SHAPE, x_TH, 0, torch.float32, {"layer": layer}, cache)


def attention(layer):
    return (randn(HIDDEN, HIDDEN, seed=600 + layer), randn(2 * HIDDEN, HIDDEN, seed=700 + layer))


def plan(cache=None, seed=0, **params):
    recipe = recipe_of(**params)
    told = attention if recipe.quantization.params.attention else lambda layer: ()
    return model_plan(recipe, lambda layer: begin(recipe, layer, cache), LAYERS, told, seed)


def stored(store):
    """(Bits stored, weights) of the experts of a store."""
    matrices = [*store.gate_up, *store.down]
    return 8 * sum(weight.nbytes for weight in matrices), sum(
        rows * width for rows, width in (w.shape for w in matrices)
    )


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [*ROUTED, "shared"])
def test_the_bytes_of_all_layers_are_what_the_plan_says_and_keep_the_budget(by):
    shared = by != "pmq"
    recipe, made = recipe_of(by=by, shared=shared), plan(by=by, shared=shared)
    layers = [finish_layer(recipe, begin(recipe, layer), made.layers[layer]) for layer in LAYERS]
    stores = [layer.store for layer in layers] + [layer.shared_store for layer in layers if shared]
    bits, size = (sum(part) for part in zip(*(stored(store) for store in stores), strict=True))
    assert bits / size == pytest.approx(made.cost, rel=1e-12)
    assert made.cost <= 4.9
    for layer, own in zip(LAYERS, layers, strict=True):
        assert tuple(weight.scheme.bits for weight in own.store.down) == made.layers[layer].experts
        assert not shared or own.shared_store.down[0].scheme.bits == made.layers[layer].shared


@st.composite
def surveys(draw):
    """Surveys of a few layers with experts, a shared one and attention of any size, and random scores."""
    sides = st.integers(1, 5).map(lambda n: 16 * n)
    number = st.floats(0, 10)
    found = []
    for layer in sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3))):
        parts = []
        kinds = {"routed": draw(st.integers(2, 4)), "shared": draw(st.integers(0, 1)), "attention": 1}
        for kind, count in kinds.items():
            shapes = ((draw(sides), draw(sides)), (draw(sides), draw(sides)))
            ids = tuple(range(count)) if kind == "routed" else (-1,) * count
            scores = [tuple(draw(number) for _ in range(count)) for _ in range(3)]
            errors = tuple((draw(number), draw(number)) for _ in range(count))
            parts.append(Units((kind,) * count, ids, (shapes,) * count, *scores, errors))
        found.append(LayerSurvey(layer, tuple(part for part in parts if part.kinds), draw(number)))
    return found


def units_of(one):
    """((stored bits at 2 and at 4, scales of groups of 16 included), weights) of each unit of a survey."""
    sizes = [sum(rows * width for rows, width in shapes) for part in one.parts for shapes in part.shapes]
    return [((4 * size, 6 * size), size) for size in sizes]


@settings(deadline=None, max_examples=60)
@given(
    surveys(),
    st.sampled_from(UNITED),
    st.integers(420, 640),
    st.integers(0, 5),
    st.integers(0, 1),
)
def test_no_budget_over_layers_is_exceeded_and_the_protected_are_widest(found, by, hundredths, seed, expert):
    protected = ((found[0].layer, expert),)
    params = Mixed(hundredths / 100, by, (2, 4), "rtn", 16, scope="model", protected=protected)
    left = [unit for one in found for unit in units_of(one)]
    least = sum(bits[0] for bits, _ in left) + left[expert][0][1] - left[expert][0][0]
    if least > hundredths * sum(size for _, size in left) // 100:
        with pytest.raises(ValueError, match=r"protected experts at 4 bits leave|is impossible.*\.$"):
            plan_of(params, found, seed)
        return
    made = plan_of(params, found, seed)
    assert made.cost <= params.budget
    assert made.layers[found[0].layer].experts[expert] == 4
    assert made == plan_of(params, found, seed) == plan_from(plan_artefact(made))
    for one in found:
        own = made.layers[one.layer]
        assert len(own.experts) == len(one.parts[0].kinds)
        assert (own.shared is not None) == (one.parts[1].kinds == ("shared",))
        assert own.attention in (2, 4)


def test_layers_and_kinds_are_raised_first_at_one_cost():
    shared = {"shared": True, "budget": 4.4, "bits": [2, 4]}  # 4 bits with their scales take 6, 2 take 4
    first, last = plan(by="first", **shared), plan(by="last", **shared)
    assert set(first.layers[5].experts) == set(last.layers[1].experts) == {2}
    assert 4 in first.layers[1].experts
    assert 4 in last.layers[5].experts
    always = plan(by="shared", **{**shared, "budget": 4.8})  # a third of the weights is shared
    assert [bits.shared for bits in always.layers.values()] == [4, 4, 4]
    assert {bits for own in always.layers.values() for bits in own.experts} == {2, 4}
    with_attention = {"codec": "rtn", "attention": True, "bits": [2, 4], "budget": 5.0}
    assert [own.attention for own in plan(by="attention", **with_attention).layers.values()] == [4, 4, 4]
    assert {own.shared for own in plan(by="attention", **with_attention).layers.values()} == {None}


def test_the_cosine_rule_raises_the_layer_of_the_lowest_prediction_and_tells_how_well_it_predicts():
    recipe = recipe_of(by="cosine")
    started = {layer: begin(recipe, layer) for layer in LAYERS}
    found = {i: survey(recipe.quantization.params, one.layer.store, one.seen) for i, one in started.items()}
    made = plan(by="cosine", bits=[2, 4], budget=4.0 + 2 / 3)
    lowest = min(LAYERS, key=lambda layer: found[layer].cosine)
    assert {layer for layer in LAYERS if 4 in made.layers[layer].experts} == {lowest}
    assert set(made.layers[lowest].experts) == {4}
    errors = [one.fitted.held_out_error for one in found.values()]
    assert made.facts["predictor_error"] == pytest.approx(sum(errors) / 3)
    assert made.facts["predictor_variance"] > 0


def test_protected_experts_are_those_of_their_layer_in_either_scope():
    pairs = [[4, 2], [5, 0]]
    made = plan(by="uniform", protected=pairs)
    assert (made.layers[4].experts[2], made.layers[5].experts[0]) == (4, 4)
    assert {*made.layers[1].experts, *made.layers[4].experts[:2], *made.layers[5].experts[1:]} == {2}
    recipe = recipe_of(scope="layer", over=[], by="uniform", protected=pairs)
    bits = {i: [w.scheme.bits for w in finish_layer(recipe, begin(recipe, i)).store.down] for i in LAYERS}
    assert bits == {1: [2, 2, 2, 2], 4: [2, 2, 4, 2], 5: [4, 2, 2, 2]}
    with pytest.raises(ValueError, match=r"protected expert 9 of layer 4 is no unit of this budget"):
        plan(protected=[[4, 9]])


# --- the same for everybody ------------------------------------------------------------------------------------------


def test_a_plan_is_kept_found_and_told_by_all_that_decides_it(tmp_path):
    made = plan(tmp_path, by="random", shared=True)
    (folder,) = (tmp_path / "artefacts").iterdir()
    assert plan_from(read(folder)) == made == plan(tmp_path, by="random", shared=True) == plan(by="random", shared=True)
    assert len(list((tmp_path / "artefacts").iterdir())) == 1
    others = [plan(tmp_path, seed=1, by="random", shared=True), plan(tmp_path, by="random")]
    others.append(plan(tmp_path, by="random", codec="rtn", attention=True))
    assert len(list((tmp_path / "artefacts").iterdir())) == 4
    assert made not in others


def test_two_processes_make_one_plan():
    told = "by='greedy', shared=True"
    line = f"from test_model_plan import plan; print(plan({told}), plan(by='random', codec='rtn', attention=True))"
    folder = str(Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {folder!r}); {line}"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = f"{plan(by='greedy', shared=True)} {plan(by='random', codec='rtn', attention=True)}"
    assert found.stdout.strip() == here


def test_quantized_layers_are_kept_for_each_plan_and_come_back_bit_for_bit(tmp_path):
    recipe = recipe_of(by="uniform", shared=True)

    def made(bits):
        return finish_layer(recipe, begin(recipe, 1, tmp_path), bits)

    narrow, wide = LayerBits((2,) * 4, 3), LayerBits((2,) * 4, 4)
    first, again, other = made(narrow), made(narrow), made(wide)
    assert first.shared_store.nbytes < other.shared_store.nbytes
    assert torch.equal(first.shared.gate_up, again.shared.gate_up)
    assert not torch.equal(first.shared.gate_up, other.shared.gate_up)
    assert len(list((tmp_path / "artefacts").iterdir())) == 3, "one of the experts, two of the shared one"
    with pytest.raises(ValueError, match=r"scope=model spends one budget over layers; give the layer the bits"):
        made(None)


# --- shared experts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["rtn", "gptq", "hqq"])
def test_a_shared_expert_runs_on_what_its_bytes_dequantize_to(codec):
    recipe = recipe_of(by="uniform", shared=True, codec=codec)
    begun = begin(recipe, 1)
    made = finish_layer(recipe, begun, LayerBits((4,) * 4, 2))
    gate_up, down = made.shared_store.weights(0)
    assert torch.equal(made.shared.gate_up, gate_up)
    assert torch.equal(made.shared.down, down)
    assert torch.equal(made.shared.gate_H, begun.seen.shared.gate_H)
    x_TH = randn(20, HIDDEN, seed=9)
    dense = replace(made, shared=begun.seen.shared)
    off_TH = made.shared(x_TH) - dense.shared(x_TH)
    torch.testing.assert_close(moe_forward(made, x_TH) - moe_forward(dense, x_TH), off_TH, atol=1e-5, rtol=1e-4)
    assert float(off_TH.norm()) > 1e-2


def test_the_error_of_a_shared_expert_is_that_of_the_layers_output():
    recipe = recipe_of(by="greedy", shared=True)
    params, begun = recipe.quantization.params, begin(recipe_of(by="greedy", shared=True), 4)
    error_B = survey(params, begun.layer.store, begun.seen).parts[1].errors[0]
    own = begun.seen.shared
    whole = PreparedLayer(begun.layer.store, begun.seen.router, own)
    for bits, error in zip(params.bits, error_B, strict=True):
        coded = [round_to_nearest(w, params.at(bits).scheme()).dequantize() for w in (own.gate_up, own.down)]
        other = replace(whole, shared=replace(own, gate_up=coded[0], down=coded[1]))
        off_TH = moe_forward(other, begun.seen.x_TH) - moe_forward(whole, begun.seen.x_TH)
        assert error == pytest.approx(float(off_TH.detach().norm()), rel=1e-4)


def test_a_shared_expert_is_a_store_of_one_that_every_token_reads():
    own = weights(1).shared
    assert torch.equal(shared_of(own, store_of(own)).gate_up, own.gate_up)
    x_TH = randn(12, HIDDEN)
    routing = Always(own)(x_TH, Context())
    assert routing.counts_E.tolist() == [12]
    alone = PreparedLayer(store_of(own), Always(own))
    torch.testing.assert_close(moe_forward(alone, x_TH), own(x_TH))


def test_a_layer_without_a_shared_expert_says_so():
    recipe = recipe_of(shared=True, by="uniform")
    begun = begin(recipe, 1)
    params, seen = recipe.quantization.params, replace(begun.seen, shared=None)
    with pytest.raises(ValueError, match=r"layer 1 has no shared expert; give shared=false\.$"):
        survey(params, begun.layer.store, seen)
    with pytest.raises(ValueError, match=r"layer 1 has no shared expert; give shared=false\.$"):
        shared_step(params, seen, 2)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"by": "first"}, "give scope=model"),
        ({"shared": True}, "give scope=model"),
        ({"over": [0]}, "give scope=model"),
        ({"scope": "model", "over": [2, 2]}, "names a layer twice"),
        ({"scope": "model", "by": "shared"}, "give shared=true"),
        ({"scope": "model", "by": "attention"}, "give attention=true"),
        ({"scope": "model", "shared": True}, "PMQ's program is one of routed experts"),
        ({"scope": "model", "attention": True, "by": "first"}, "give codec rtn or hqq"),
        ({"scope": "model", "attention": True, "by": "greedy", "codec": "rtn"}, "one of the rules"),
        ({"protected": [[1]]}, "must be pairs"),
    ],
)
def test_impossible_parameters_are_refused_in_a_sentence(params, says):
    with pytest.raises((ValueError, MoebenchError), match=says):
        REGISTRY.get("quantization", "mixed").params_from(params)


def test_a_budget_knows_the_layers_that_it_covers():
    model = Mixed(scope="model", over=(4, 1))
    assert model.span(range(9)) == (1, 4)
    assert Mixed(scope="model").span(range(3)) == (0, 1, 2)
    assert model.refusal((1,), range(9), False) is None
    assert Mixed().refusal((7,), range(3), False) is None
    assert "layer 7 has no part in a budget over layers [1, 4]" in model.refusal((1, 7), range(9), True)
    assert "layer 4 of over holds no experts; name layers of [0, 1, 2]" in model.refusal((1,), range(3), True)
    for layers in (Mixed(protected=((5, 0),)), Mixed(protected=((5, 0),), scope="model", over=(1, 2))):
        assert "protected layer 5 has no experts in the budget" in layers.refusal((1,), range(3), True)
        assert layers.refusal((1,), range(3), True).count("name layers of [") == 1
    assert Mixed(protected=((0, 1),)).refusal((1,), range(3), True) is None
    assert "protected layer 0" in Mixed(protected=((0, 1),), scope="model", over=(1, 2)).refusal((1,), range(3), True)
    around = Mixed(scope="model", by="random", codec="rtn", attention=True)
    assert around.refusal((1,), range(3), True) is None
    assert "which this suite does not run; use suite=accuracy" in around.refusal((1,), range(3), False)
