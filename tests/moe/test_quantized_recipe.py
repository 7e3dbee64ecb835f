"""Every registered quantization through a recipe: packed, kept, found again, and within what it promises."""

import json

import pytest
import torch

from moebench.contracts import MIXED, Registry, Selection
from moebench.moe.artefacts import read
from moebench.moe.bits.mixed_params import Mixed
from moebench.moe.codecs.integer_params import Rtn
from moebench.moe.layer import LayerWeights, moe_forward
from moebench.moe.recipe import Recipe, Stage, prepare_layer
from moebench.moe.shapes import ModelShape

HIDDEN, WIDTH, EXPERTS, TOKENS = 128, 128, 4, 512
SHAPE = ModelShape(HIDDEN, WIDTH, EXPERTS, 2, (0, 1), Selection("softmax", 2, True))
REGISTRY = Registry.load()
NAMES = [name for name in REGISTRY.names("quantization") if name not in ("none", "file")]
"""All that encode; what a file stores has tests of its own."""
CALIBRATED = {"gptq", "awq", "mixed", "eaquant"}
"""What looks at the layer's inputs, and so depends on who is given which."""


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def weights():
    up = randn(EXPERTS, 2 * WIDTH, HIDDEN, seed=1) / HIDDEN**0.5
    return LayerWeights(up, randn(EXPERTS, HIDDEN, WIDTH, seed=2) / WIDTH**0.5, randn(EXPERTS, HIDDEN, seed=3))


def prepared(name, cache=None, routing="topk", layer=0, **params):
    chosen = {"structure": "none", "routing": routing, "quantization": name, "sparsity": "none"}
    members = {kind: REGISTRY.get(kind, choice) for kind, choice in chosen.items()}
    told = {"quantization": params}
    stages = {kind: Stage(member, member.params_from(told.get(kind, {}))) for kind, member in members.items()}
    x_TH = randn(TOKENS, HIDDEN, seed=4)
    return prepare_layer(Recipe(**stages), weights(), SHAPE, x_TH, 0, torch.float32, {"layer": layer}, cache)


def kept_of(cache):
    """The artefacts of the quantization stage: (inputs, folder) of each."""
    found = [(json.loads((one / "meta.json").read_text())["inputs"], one) for one in (cache / "artefacts").iterdir()]
    return [one for one in found if one[0]["stage"] == "quantization"]


def codes(layer):
    """All stored bytes of a layer's experts."""
    return [part for weight in (*layer.store.gate_up, *layer.store.down) for part in weight.parts().values()]


@pytest.mark.parametrize("name", NAMES)
def test_quantized_experts_are_kept_as_they_are_stored_and_come_back_bit_for_bit(name, tmp_path):
    first, again = prepared(name, tmp_path), prepared(name, tmp_path)
    assert first.store.quantized
    assert all(torch.equal(a, b) for a, b in zip(codes(first), codes(again), strict=True))
    assert [w.scheme for w in again.store.gate_up] == [w.scheme for w in first.store.gate_up]
    ((_, folder),) = kept_of(tmp_path)
    kept = read(folder)
    assert sum(t.nbytes for t in kept.tensors.values()) == first.store.nbytes, "what lies on disk is what is counted"
    x_TH = randn(64, HIDDEN, seed=9)
    assert torch.equal(moe_forward(first, x_TH), moe_forward(again, x_TH))


@pytest.mark.parametrize("name", NAMES)
def test_quantized_layers_are_smaller_and_nearer_to_the_dense_one_than_nothing(name):
    layer, dense, x_TH = prepared(name), prepared("none"), randn(64, HIDDEN, seed=9)
    assert layer.store.nbytes < dense.store.nbytes / 2
    with torch.no_grad():
        wanted_TH = moe_forward(dense, x_TH)
        error = float((moe_forward(layer, x_TH) - wanted_TH).norm() / wanted_TH.norm())
    assert 1e-5 < error < 0.95


@pytest.mark.parametrize("name", NAMES)
def test_artefacts_depend_on_the_routing_where_calibration_does(name, tmp_path):
    first, other = prepared(name, tmp_path), prepared(name, tmp_path, routing="expert_choice")
    assert len(kept_of(tmp_path)) == (2 if name in CALIBRATED else 1)
    same = all(torch.equal(a, b) for a, b in zip(codes(first), codes(other), strict=True))
    assert same == (name not in CALIBRATED)


@pytest.mark.parametrize("by", ["pmq", "greedy", "frequency", "outlier", "random", "uniform"])
@pytest.mark.parametrize("codec", ["rtn", "gptq", "hqq"])
def test_mixtures_keep_their_budget_in_the_bytes_that_are_stored(by, codec):
    store = prepared("mixed", by=by, codec=codec, budget=2.6).store
    numel = EXPERTS * 3 * HIDDEN * WIDTH
    assert 8 * store.nbytes <= 2.6 * numel
    assert {int(weight.scheme.bits) for weight in store.down} <= {1, 2, 3}
    assert [w.scheme for w in store.gate_up] == [w.scheme for w in store.down], "an expert has one scheme"


def test_mixtures_differ_and_a_wide_budget_is_spent():
    bits = {by: [w.scheme.bits for w in prepared("mixed", by=by).store.down] for by in ("pmq", "uniform")}
    assert bits["uniform"] == [2.0] * EXPERTS
    assert {2.0, 3.0} <= set(bits["pmq"])
    assert [w.scheme.bits for w in prepared("mixed", by="greedy", budget=3.3).store.down] == [3.0] * EXPERTS
    drawn = {
        tuple(w.scheme.bits for w in prepared("mixed", by="random", budget=2.6, layer=i).store.down) for i in (0, 1)
    }
    assert len(drawn) == 2, "layers draw for themselves"


def test_one_bit_of_a_mixture_is_a_sign_and_plans_know_only_the_budget():
    params = Mixed(codec="hqq")
    assert params.at(1) == Rtn(1, 128, True)
    assert params.at(3).scheme().codec == "hqq"
    assert (params.scheme().codec, params.scheme().bits) == (MIXED, 2.5)
    with pytest.raises(ValueError, match="rising"):
        Mixed(bits=(3, 2))


def test_a_budget_below_the_fewest_bits_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="raise the budget, widen the group or allow fewer bits"):
        prepared("mixed", budget=1.0)


def test_quantizing_twice_is_refused():
    store = prepared("rtn").store
    with pytest.raises(ValueError, match="quantize once"):
        Stage(REGISTRY.get("quantization", "rtn"), Rtn()).create()(store, None)
