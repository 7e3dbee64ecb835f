"""What routers in a real model are told: from the call, from the layer, and from the caller, who is asked in time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moebench.contracts import MoebenchError, Registry, load_file
from moebench.moe.router_context import OncePerModel
from moebench.moe.routing import Context
from moebench.suites.models.reroute import reroute

pytest.importorskip("transformers")

REGISTRY = Registry.load()
BATCH, LENGTH, EXPERTS = 2, 9, 8
PARAMS = {
    "deepseek_v3": {"k": 2, "groups": 2, "groups_kept": 1},
    "mixer": {"features": 5},
    "read_me": {"vocabulary": 97},
    "hash": {"vocabulary": 97},
    "odp": {"beta": 0.5},  # its default is learnt from calibration, which no one gives it here
}
"""What the defaults of a routing do not fit."""

FEATURES = {"mixer": (BATCH, 5), "advmoe": (BATCH, 3, 8, 8)}
UNEQUAL = {"moepp", "adamoe", "expert_choice", "blockffn", "remoe", "top_p"}
"""Some of the routings that give some tokens fewer experts with weights than others."""

FOREIGN = {"peer", "ultramem", "bam"}
"""Routings of experts that no transformers model has: rank-1 experts, and attentions."""


def build(attention="eager"):
    return load_file(Path(__file__).parent.parent / "tiny_models.py").build("Olmoe", attention=attention)


@pytest.fixture(scope="module")
def model():
    return build()


def ids():
    return torch.randint(0, 97, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def logits(model, **inputs):
    with torch.no_grad():
        return model(ids(), use_cache=False, **inputs).logits


def routing(name):
    names = {field.name for field in dataclasses.fields(REGISTRY.get("routing", name).params)}
    small = {"k": 2} if "k" in names else {}
    return REGISTRY.get("routing", name).create({**small, **PARAMS.get(name, {})})


def given(name):
    """All that a caller may have to say."""
    features = torch.randn(FEATURES.get(name, (BATCH, 4)), generator=torch.Generator().manual_seed(2))
    return Context(task=1, modality_T=torch.arange(BATCH * LENGTH) % 2, features=features)


# --- every routing in a real model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*REGISTRY.names("routing")} - FOREIGN))
def test_every_routing_works_in_a_real_model_and_leaves_it_as_it_was(name, model):
    """On a backend of ours always; in the model's own execution where every token has as many experts."""
    before, hooks = logits(model), _hooks(model)
    with reroute(model, routing(name), "grouped", context=given(name)) as handle:
        ours = logits(model)
        numbers = torch.cat([_with_weights(handle, index) for index in handle.layers])
    assert torch.isfinite(ours).all()
    assert sorted(handle.routings) == [0, 1]
    with reroute(model, routing(name), context=given(name)):
        assert name not in UNEQUAL or numbers.unique().numel() > 1
        if numbers.unique().numel() > 1:
            with pytest.raises(MoebenchError, match=r"tokens with fewer experts than others, .* such as 'grouped'"):
                logits(model)
        else:
            torch.testing.assert_close(logits(model), ours, rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(model), before)
    assert _hooks(model) == hooks


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_experts_that_a_model_does_not_have_are_refused(name, model):
    before, hooks = logits(model), _hooks(model)
    with (
        pytest.raises(MoebenchError, match=r"^layer 0 of this model cannot be routed so: .*axes.structure"),
        reroute(model, routing(name), "grouped"),
    ):
        pass
    assert torch.equal(logits(model), before)
    assert _hooks(model) == hooks


def _hooks(model):
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def _with_weights(handle, index):
    routing, kinds = handle.routings[index], handle.layers[index].store.kinds
    return routing.keep(torch.tensor([kinds[expert] == "ffn" for expert in routing.expert_N.tolist()])).k_T


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m3vit", "without the Context's 'task'; the model cannot know it, so give it in reroute"),
        ("moiie", "without the Context's 'modality_T'; the model cannot know it, so give it in reroute"),
        ("mixer", "without the Context's 'features'; the model cannot know it, so give it in reroute"),
        ("advmoe", "without the Context's 'features'; the model cannot know it, so give it in reroute"),
    ],
)
def test_a_field_that_is_missing_is_told_before_a_layer_runs(name, words, model):
    ran = []
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    with reroute(model, routing(name), "grouped") as handle:
        with pytest.raises(MoebenchError, match=words):
            logits(model)
        assert not ran
        handle.context = given(name)
        logits(model)
    hook.remove()
    assert ran


def test_token_ids_are_missing_where_the_call_has_embeddings(model):
    embedded_BSH = model.model.embed_tokens(ids()).detach()
    with reroute(model, routing("got_similarity"), "grouped"), torch.no_grad():
        model(inputs_embeds=embedded_BSH, use_cache=False)
    with (
        pytest.raises(MoebenchError, match="without the Context's 'token_ids_T'; call the model with input_ids"),
        reroute(model, routing("hash"), "grouped"),
    ):
        model(inputs_embeds=embedded_BSH, use_cache=False)


def test_attention_is_missing_where_the_model_hides_it():
    hiding = build(attention="sdpa")
    with (
        pytest.raises(MoebenchError, match="'attn'; load the model with attn_implementation='eager'"),
        reroute(hiding, routing("got_attention"), "grouped"),
    ):
        logits(hiding)


@pytest.mark.parametrize("name", ["got_similarity", "got_attention", "read_me", "dmoerm"])
def test_routings_that_look_at_the_sequence_do_not_go_on_from_a_cache(name, model):
    with reroute(model, routing(name), "grouped"), torch.no_grad():
        first = model(ids()[:, :5], use_cache=True)
        with pytest.raises(MoebenchError, match="looks at a whole sequence, and a call that goes on"):
            model(ids()[:, 5:], cache=first.cache)


@pytest.mark.parametrize("name", ["mixer", "hash"])
def test_others_do(name, model):
    with reroute(model, routing(name), "grouped", context=given(name)), torch.no_grad():
        whole = model(ids()).logits
        first = model(ids()[:, :5], use_cache=True)
        rest = model(ids()[:, 5:], cache=first.cache).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=1e-4, atol=1e-5)


# --- where fields come from ------------------------------------------------------------------------------------------


def test_each_router_has_the_attention_of_its_own_layer(model):
    """Graph of Tokens by hand: logits are log of the attention's mean over heads times softmax of the gate."""
    inputs = {}
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(lambda module, args, i=i: inputs.update({i: args[0]}))
        for i, layer in enumerate(model.model.layers)
    ]
    with reroute(model, routing("got_attention"), "grouped") as handle, torch.no_grad():
        attentions = model(ids(), use_cache=False, output_attentions=True).attentions
    assert not torch.equal(*attentions)
    for index, layer in enumerate(model.model.layers):
        probs_BSE = (inputs[index].reshape(BATCH, LENGTH, -1) @ layer.mlp.gate.weight.T).softmax(-1)
        mixed_TE = (attentions[index].mean(1) @ probs_BSE).flatten(0, 1)
        torch.testing.assert_close(handle.routings[index].logits_TE.exp(), mixed_TE)
    for hook in hooks:
        hook.remove()


def test_a_context_can_be_made_anew_from_every_call(model):
    """A token's modality from its id: the first half of MoIIE's experts of one modality is closed to the other."""
    seen = []

    def modality(inputs):
        seen.append(inputs["input_ids"].shape)
        return Context(modality_T=(inputs["input_ids"] < 50).long().flatten())

    with reroute(model, routing("moiie"), "grouped", context=modality) as handle, torch.no_grad():
        model(ids())
        first = handle.routings[0].to_dense()
        model(ids()[:, :4])
    assert seen == [(2, 9), (2, 4)]
    vision_T = (ids() < 50).flatten()
    used = [{int(e) for e in first[chosen_T].sum(0).nonzero()} for chosen_T in (vision_T, ~vision_T)]
    assert used[0] - used[1]
    assert used[1] - used[0]


def test_the_inner_model_may_be_called_too(model):
    with reroute(model, routing("hash"), "grouped") as handle, torch.no_grad():
        model(ids())
        whole = handle.routings[0].to_dense()
        model.model(ids())
        assert torch.equal(handle.routings[0].to_dense(), whole)
        model.model(ids().flip(1))
        assert not torch.equal(handle.routings[0].to_dense(), whole)


def test_chance_comes_from_the_seed_unless_a_generator_is_given(model):
    def drawn(seed, context=None):
        with reroute(model, routing("thor"), "grouped", seed, context) as handle:
            logits(model)
            return [handle.routings[index].expert_N for index in (0, 1)]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(*first), "layers do not draw the same"
    own = [drawn(seed, Context(rng=torch.Generator().manual_seed(5))) for seed in (0, 1)]
    assert all(map(torch.equal, *own))


# --- once per model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["read_me", "advmoe"])
def test_a_router_of_all_layers_decides_once_per_forward(name, model):
    calls = []
    with reroute(model, routing(name), "grouped", context=given(name)) as handle:
        (router,) = {id(one): one for one in handle.routers.values()}.values()
        assert isinstance(router, OncePerModel)
        router.router.scorer.register_forward_hook(lambda *_: calls.append(1))
        for times in (1, 2):
            logits(model)
            assert len(calls) == times
            assert handle.routings[0] is handle.routings[1]
        plan = handle.routings
        handle.context = dataclasses.replace(given(name), plan=dict.fromkeys((0, 1), plan[0]))
        logits(model)
        assert len(calls) == 2, "a plan that is given is followed"


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_each_layer_has_a_seed_of_its_own(model):
    def seeds(seed):
        found, make = [], routing("topk")

        def factory(weights, shape, own):
            found.append(own)
            return make(weights, shape, own)

        with reroute(model, factory, seed=seed):
            return found

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1)}) == 4


@pytest.mark.parametrize("name", ["xmoe", "comet", "hash"])
def test_layers_have_seeded_routers_of_their_own(name, model):
    def states(seed):
        with reroute(model, routing(name), "grouped", seed) as handle:
            return [router.state_dict() for router in handle.routers.values()]

    first, second = states(0)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    again, _ = states(0)
    assert all(torch.equal(first[key], again[key]) for key in first)
    other, _ = states(1)
    assert any(not torch.equal(first[key], other[key]) for key in first)
