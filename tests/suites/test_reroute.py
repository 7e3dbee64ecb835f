"""Our routers in tiny transformers models: equal logits under the model's own rule, and the very model afterwards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moebench.backends import bridge
from moebench.contracts import MoebenchError, Registry, load_file
from moebench.moe.layer import PreparedLayer, moe_forward
from moebench.moe.router import Router, RouterBundle
from moebench.moe.routing import Context, Routing
from moebench.suites.models.reroute import model_shape, reroute

pytest.importorskip("transformers")

TINY = load_file(Path(__file__).parent.parent / "tiny_models.py")
MODELS, build = TINY.MODELS, TINY.build
OWN_RULE = {
    "Olmoe": ("olmoe", {"k": 3}),
    "Mixtral": ("mixtral", {}),
    "Qwen3Moe": ("qwen3", {"k": 3}),
    "DeepseekV3": ("deepseek_v3", {"k": 3, "groups": 2, "groups_kept": 1}),
    "GraniteMoe": ("mixtral", {"k": 3}),
}
"""The scheme of ours that each model's own router is."""


def ids(batch=2, length=9):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model, **inputs):
    with torch.no_grad():
        return model(ids(), use_cache=False, **inputs).logits


def routing(name, **params):
    return Registry.load().get("routing", name).create(params)


def state_of(model):
    """All that a model is: tensors, what its modules hold besides, hooks, and how its experts run."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }
    return tensors, held, hooks, model.config._experts_implementation


def assert_same_state(model, before):
    after = state_of(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())


class Watcher(Router):
    """Sends every token to experts 0 and 1 and remembers the Contexts it was given."""

    def __init__(self, kinds, scope="layer"):
        super().__init__()
        self.experts, self.scope, self.seen = len(kinds), scope, []

    def forward(self, x_TH, ctx):
        self.seen.append(ctx)
        indices_TK = torch.tensor([[0, 1]]).expand(len(x_TH), 2)
        if ctx.valid_T is not None:
            indices_TK = indices_TK.masked_fill(~ctx.valid_T[:, None], self.experts)
        return Routing.topk(indices_TK, torch.full((len(x_TH), 2), 0.5), self.experts)


def watched(scope="layer"):
    def factory(weights, shape, seed):
        kinds = ("ffn",) * shape.experts
        return RouterBundle(Watcher(kinds, scope), kinds)

    return factory


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    model = build(request.param)
    return request.param, model, logits(model)


# --- the model's own rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference", "eager", "grouped"])
@pytest.mark.parametrize("own", [True, False])
def test_our_router_with_the_models_own_rule_gives_equal_logits(family, backend, own):
    kind, model, expected = family
    name, params = OWN_RULE[kind] if own else ("topk", {})
    before = state_of(model)
    with reroute(model, routing(name, **params), backend) as handle:
        actual = logits(model)
        assert sorted(handle.routings) == ([1, 2] if kind == "DeepseekV3" else [0, 1])
    if backend is None and kind != "GraniteMoe":  # which takes softmax of the selected logits: R1, equal to rounding
        assert torch.equal(actual, expected)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert_same_state(model, before)
    assert torch.equal(logits(model), expected)


def test_the_gate_is_really_ours(family):
    """Another rule changes the logits, and the model is itself again afterwards."""
    _, model, expected = family
    with reroute(model, "switch") as handle:
        changed = logits(model)
        assert all((routing.k_T == 1).all() for routing in handle.routings.values())
    assert (changed - expected).abs().max() > 0.01 * expected.abs().max()
    assert torch.equal(logits(model), expected)


def test_the_shape_is_that_of_the_config(family):
    kind, model, _ = family
    shape = model_shape(model)
    assert (shape.hidden, shape.width, shape.experts) == (32, 24, 8)
    assert shape.selection.k == model.config.num_experts_per_tok
    assert (shape.selection.score == "sigmoid") == (kind == "DeepseekV3")


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_other_executions_of_transformers_take_our_router(implementation):
    model = build("Olmoe", implementation)
    expected = logits(model)
    with reroute(model, "topk"):
        torch.testing.assert_close(logits(model), expected)


def test_weights_have_the_dtype_that_the_block_expects():
    model = build("Olmoe").bfloat16()
    with reroute(model, "topk") as handle:
        assert logits(model).dtype == torch.bfloat16
        assert handle.layers[0].answers == torch.bfloat16
        assert {routing.weight_N.dtype for routing in handle.routings.values()} == {torch.float32}


# --- restoring -------------------------------------------------------------------------------------------------------


def test_an_error_restores_the_model_too():
    model = build("Mixtral")
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), reroute(model, "switch", "eager"):
        1 / 0
    assert_same_state(model, before)
    with pytest.raises(MoebenchError, match="unknown routing 'swich': did you mean 'switch'"), reroute(model, "swich"):
        pass
    assert_same_state(model, before)


def test_training_our_router_does_not_touch_the_model():
    model = build("DeepseekV3")
    before = state_of(model)
    with reroute(model, routing("deepseek_v3", k=3, groups=2, groups_kept=1)) as handle:
        logits(model)
        for index, router in handle.routers.items():
            router.update(handle.routings[index])
            for parameter in router.parameters():
                parameter.data += 1
    assert_same_state(model, before)


def test_blocks_nest():
    model = build("Olmoe")
    expected = logits(model)
    with reroute(model, "switch"):
        outer = logits(model)
        with reroute(model, "topk"):
            assert (logits(model) - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), expected)


# --- null, variable k, other kinds -----------------------------------------------------------------------------------


def test_fewer_experts_for_some_tokens_need_our_backends():
    model = build("Olmoe")
    before = state_of(model)
    with (
        pytest.raises(MoebenchError, match=r"layer 0 has tokens with fewer experts .* such as 'grouped'"),
        reroute(model, routing("moepp", zero=8)),
    ):
        logits(model)
    assert_same_state(model, before)
    with bridge.attach(model, "eager"), reroute(model, routing("moepp", zero=8)):
        logits(model)
    assert_same_state(model, before)


@pytest.mark.parametrize("backend", ["reference", "eager", "grouped"])
def test_zero_copy_and_constant_experts_are_the_layers_own_mathematics(backend):
    model = build("Olmoe")
    seen = {}
    blocks = {index: layer.mlp for index, layer in enumerate(model.model.layers)}
    hooks = [
        block.register_forward_hook(lambda module, args, output, index=index: seen.update({index: (args[0], output)}))
        for index, block in blocks.items()
    ]
    with reroute(model, routing("moepp", zero=2, copy=4, constant=4), backend) as handle:
        logits(model)
    for index, layer in handle.layers.items():
        x_TH, y_TH = (value.flatten(0, 1) for value in seen[index])
        wanted = moe_forward(PreparedLayer(layer.store, layer.bundle.router), x_TH, routing=handle.routings[index])
        torch.testing.assert_close(y_TH, wanted, rtol=1e-4, atol=1e-5)
        assert {"copy", "constant"} <= {layer.store.kinds[e] for e in handle.routings[index].expert_N.tolist()}
    for hook in hooks:
        hook.remove()


def test_experts_read_a_scaled_input_where_the_scheme_says_so():
    """The released MoE++ multiplies the inputs of experts by K, which here is 2; a router sees them as they are."""
    model = build("Olmoe")
    seen = {}
    block = model.model.layers[0].mlp
    hook = block.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    with reroute(model, routing("moepp", copy=4, constant=4, released_inputs=True), "grouped") as handle:
        logits(model)
    hook.remove()
    layer = handle.layers[0]
    store = dataclasses.replace(layer.store, gate_up=2 * layer.store.gate_up)
    x_TH = seen["x"].flatten(0, 1)
    wanted = moe_forward(PreparedLayer(store, layer.bundle.router), x_TH, routing=handle.routings[0])
    torch.testing.assert_close(seen["y"].flatten(0, 1), wanted, rtol=1e-4, atol=1e-5)
    assert layer.bundle.input_scale == 2.0


def test_the_gating_residual_follows_the_layers():
    model = build("Mixtral")
    inputs = {}
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda module, args, i=i: inputs.update({i: args[0]}))
        for i, layer in enumerate(model.model.layers)
    ]
    with reroute(model, "moepp", "grouped") as handle:
        for _ in range(2):
            logits(model)
        first, second = handle.routers[0].scorer, handle.routers[1].scorer
        own_TE = inputs[0] @ first.scorer.weight_EH.T
        torch.testing.assert_close(handle.routings[0].logits_TE, own_TE)
        wanted = inputs[1] @ second.scorer.weight_EH.T + own_TE @ second.map_EE.T
        torch.testing.assert_close(handle.routings[1].logits_TE, wanted)
    for hook in hooks:
        hook.remove()


# --- what routers and models are told --------------------------------------------------------------------------------


def test_a_router_is_told_what_the_call_says():
    model = build("Mixtral")
    mask_BS = torch.ones(2, 9, dtype=torch.int64)
    mask_BS[0, :3] = 0
    with reroute(model, watched(), "grouped") as handle:
        handle.context = Context(task=3)
        logits(model, attention_mask=mask_BS)
        contexts = [router.seen[-1] for router in handle.routers.values()]
    for index, ctx in enumerate(contexts):
        assert (ctx.layer, ctx.training, ctx.task) == (index, False, 3)
        assert torch.equal(ctx.token_ids_T, ids().flatten())
        assert ctx.segment_T.tolist() == [0] * 9 + [1] * 9
        assert torch.equal(ctx.valid_T, mask_BS.bool().flatten())
        assert ctx.experts.kinds == ("ffn",) * 8
    assert contexts[0].prev is None
    assert contexts[1].prev.num_tokens == 18


def test_padding_keeps_its_experts_where_the_model_runs_them_itself():
    model = build("Mixtral")
    mask_BS = torch.ones(2, 9, dtype=torch.int64)
    mask_BS[0, :3] = 0
    expected = logits(model, attention_mask=mask_BS)
    with reroute(model, "topk"):
        torch.testing.assert_close(logits(model, attention_mask=mask_BS), expected)
    with reroute(model, "topk", "grouped"):
        real_BS = mask_BS.bool()
        torch.testing.assert_close(logits(model, attention_mask=mask_BS)[real_BS], expected[real_BS])


def test_what_the_caller_says_stands():
    model = build("Mixtral")
    with reroute(model, watched()) as handle:
        handle.context = Context(segment_T=torch.zeros(18, dtype=torch.int64), ranks=(1,))
        logits(model)
        ctx = handle.routers[0].seen[-1]
        assert not ctx.segment_T.any()
        assert ctx.ranks == (1,)


def test_a_router_of_model_scope_decides_once():
    model = build("DeepseekV3")
    with reroute(model, watched("model")) as handle:
        logits(model)
        assert handle.routers[1] is handle.routers[2]
        assert [ctx.layer for ctx in handle.routers[1].seen] == [1]
        assert handle.routings[1] is handle.routings[2]


def test_the_model_records_our_router_logits():
    model = build("Olmoe")
    with reroute(model, "switch") as handle, torch.no_grad():
        output = model(ids(), output_router_logits=True)
        for recorded, routing_ in zip(output.router_logits, handle.routings.values(), strict=True):
            assert torch.equal(recorded, routing_.logits_TE)
        assert torch.isfinite(output.aux_loss)


def test_a_cache_gives_the_same_logits():
    model = build("Qwen3Moe")
    with reroute(model, "topk"), torch.no_grad():
        whole = model(ids()).logits
        first = model(ids()[:, :5], use_cache=True)
        name = "cache" if hasattr(first, "cache") else "past_key_values"
        rest = model(ids()[:, 5:], **{name: getattr(first, name)}).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=1e-4, atol=1e-5)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_rerouted_is_refused_in_a_sentence():
    with (
        pytest.raises(MoebenchError, match=r"unknown MoE architecture \(model_type\) 'None'"),
        reroute(torch.nn.Linear(2, 2), "topk"),
    ):
        pass
    model = build("Olmoe")
    model.model.layers[1].mlp.gate = torch.nn.Linear(32, 8)
    with pytest.raises(MoebenchError, match="OlmoeSparseMoeBlock has no gate that answers"), reroute(model, "topk"):
        pass
