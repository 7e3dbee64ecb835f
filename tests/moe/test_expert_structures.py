"""Structures ``neurons`` and ``attention``: all neurons are the FFN, and attentions are what a store says of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection
from moebench.moe.expert_structures import attentions, neurons
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, ffn_hidden, moe_forward
from moebench.moe.routing import Routing
from moebench.moe.shapes import ModelShape
from moebench.moe.stage_artefacts import weights_artefact, weights_of
from moebench.moe.structure_params import Attentions, Neurons

H, F, E, T = 12, 8, 3, 20
NONE = torch.zeros(0, H)
SHAPE = ModelShape(H, F, E, 2, (0, 1), Selection("softmax", 2, True), shared_width=4)


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def ffns(dense, gated, activation, seed=0):
    """One dense FFN or E of them, with a router that no neuron wants."""
    experts, rows = () if dense else (E,), 2 * F if gated else F
    gate_up, down = seeded(*experts, rows, H, seed=seed).double(), seeded(*experts, H, F, seed=seed + 1).double()
    router_EH = None if dense else seeded(E, H)
    return LayerWeights(gate_up, down, router_EH, activation=activation, gated=gated)


def output(weights, kind, x_TH, gate_TE):
    kinds = (kind,) * len(weights.down)
    store = ExpertStore(weights.gate_up, weights.down, kinds, weights.activation, weights.gated, heads=weights.heads)
    return moe_forward(PreparedLayer(store, None), x_TH, routing=Routing.dense(gate_TE))


@settings(deadline=None, max_examples=20)
@given(st.booleans(), st.booleans(), st.sampled_from(["silu", "gelu", "relu"]), st.integers(0, 99))
def test_all_neurons_are_the_sum_of_the_ffns(dense, gated, activation, seed):
    weights, x_TH = ffns(dense, gated, activation, seed), seeded(T, H, seed=seed + 2).double()
    parts = neurons(Neurons())(weights, NONE, 0)
    shape = Neurons().reshape(SHAPE.with_(experts=0 if dense else E))
    assert parts.down.shape == (shape.experts, H, shape.width) == (F if dense else E * F, H, 1)
    assert parts.gate_up.shape == (shape.experts, 2 if gated else 1, H)
    assert parts.router_EH is None
    gate_ups, downs = ([weights.gate_up], [weights.down]) if dense else (weights.gate_up, weights.down)
    wanted_TH = sum(
        ffn_hidden(x_TH, gate_up, activation, gated) @ down.T for gate_up, down in zip(gate_ups, downs, strict=True)
    )
    for kind in ("gather", "ffn"):
        y_TH = output(parts, kind, x_TH, torch.ones(T, shape.experts))
        torch.testing.assert_close(y_TH, wanted_TH, rtol=1e-10, atol=1e-10)


def test_a_neuron_owns_its_channel():
    weights = ffns(False, True, "silu")
    parts = neurons(Neurons())(weights, NONE, 0)
    assert torch.equal(parts.gate_up[2 * F + 5], weights.gate_up[2, [5, F + 5]])
    assert torch.equal(parts.down[2 * F + 5, :, 0], weights.down[2, :, 5])


def test_a_selection_of_the_layers_own_takes_all_neurons():
    shape = Neurons().reshape(SHAPE)
    assert shape.selection == Selection("one", E * F, renormalize=False)
    assert (shape.experts, shape.width, shape.shared_width, shape.expert_bytes(4)) == (24, 1, 4, 24 * 3 * H * 4)


def test_attentions_are_seeded_and_told_by_their_shape():
    build, weights = attentions(Attentions(experts=5, heads=3)), ffns(False, True, "silu")
    shape = Attentions(experts=5, heads=3).reshape(SHAPE)
    first, again, other = (build(weights, NONE, seed) for seed in (1, 1, 2))
    assert first.gate_up.shape == (5, 3 * H, H)
    assert first.down.shape == (5, shape.hidden, shape.width)
    assert (first.heads, shape.heads, shape.experts, shape.shared_width) == (3, 3, 5, 0)
    assert shape.expert_bytes(4) == 4 * (first.gate_up.numel() + first.down.numel())
    assert torch.equal(first.gate_up, again.gate_up)
    assert not torch.equal(first.gate_up, other.gate_up)
    assert first.gate_up.std() == pytest.approx(H**-0.5, rel=0.2)


def test_heads_survive_the_cache():
    weights = attentions(Attentions(2, 3))(ffns(False, True, "silu"), NONE, 1)
    back = weights_of(weights_artefact(weights))
    assert back.heads == 3
    assert torch.equal(back.gate_up, weights.gate_up)


def test_a_sequence_expert_answers_some_and_reads_all():
    weights = attentions(Attentions(2, 3))(ffns(False, True, "silu"), NONE, 1)
    x_TH, gate_TE = seeded(T, H, seed=4), torch.zeros(T, 2)
    gate_TE[::3, 1] = 0.5
    whole_TH = output(weights, "sequence", x_TH, torch.ones(T, 2) * torch.tensor([0.0, 0.5]))
    y_TH = output(weights, "sequence", x_TH, gate_TE)
    torch.testing.assert_close(y_TH[::3], whole_TH[::3])
    assert not y_TH[1::3].any()


def test_refusals():
    with pytest.raises(ValueError, match="heads=5 do not divide the hidden size 12"):
        Attentions(heads=5).reshape(SHAPE)
    for changes in ({"experts": 0}, {"heads": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Attentions(**changes)
