"""Backends inside real transformers architectures with random weights, against transformers' own eager experts."""

from pathlib import Path

import pytest
import torch

from moebench.backends import bridge
from moebench.backends.compiled import Compiled
from moebench.contracts import Availability, MoebenchError, load_file

TINY = load_file(Path(__file__).parent.parent / "tiny_models.py")
MODELS, build = TINY.MODELS, TINY.build
BACKENDS = ("reference", "eager", "batched", "grouped", "compiled", "offload")


def logits(model):
    ids_BS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids_BS, use_cache=False).logits.double()


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    model = build(request.param)
    return request.param, model, logits(model)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_model_on_a_backend_is_the_model(family, name):
    if name == "compiled" and not Compiled().availability().available:
        pytest.skip("compiled needs a C++ compiler")
    kind, model, expected = family
    with bridge.attach(model, name) as session:
        actual = logits(model)
        assert model.config._experts_implementation == f"moebench:{name}"
        assert session.executed().weights == "dense"
        session.layer(2 if kind == "DeepseekV3" else 0)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).max() <= 1e-6
    assert model.config._experts_implementation == "eager"
    assert torch.equal(logits(model), expected)


def test_the_backend_really_computes_the_experts():
    """Half the expert weights in the backend's own store must change the logits: nobody else computed them."""
    model = build("Olmoe")
    expected = logits(model)
    with bridge.attach(model, "eager") as session:
        executor = session.layer(1)
        executor.weights.views = [(gate_up, 0.5 * down) for gate_up, down in executor.weights.views]
        assert (logits(model) - expected).abs().max() > 0.01 * expected.abs().max()
    assert torch.equal(logits(model), expected)


def test_weights_are_views_of_the_models_own():
    model = build("Mixtral")
    with bridge.attach(model, "grouped") as session:
        assert session.layer(0).weights.down is model.model.layers[0].mlp.experts.down_proj


def test_layers_have_their_decoder_index():
    assert list(bridge.moe_modules(build("DeepseekV3"))) == [1, 2]
    assert list(bridge.moe_modules(build("GraniteMoe"))) == [0, 1]


def test_attaching_nests_and_survives_an_error():
    model = build("Qwen3Moe", experts="grouped_mm")
    expected = logits(model)
    with bridge.attach(model, "eager") as outer:
        with pytest.raises(ZeroDivisionError), bridge.attach(model, "reference"):
            1 / 0
        assert model.config._experts_implementation == "moebench:eager"
        model_module = model.model.layers[1].mlp.experts
        assert bridge._ATTACHED[model_module] is outer.layer(1)
    assert model.config._experts_implementation == "grouped_mm"
    assert model_module not in bridge._ATTACHED
    assert torch.equal(logits(model), expected)


def test_a_registered_name_works_without_attach():
    names = bridge.register()
    assert {"moebench:eager", "moebench:grouped", "moebench:packed"} <= set(names)
    expected = logits(build("Olmoe"))
    by_name = build("Olmoe", experts="moebench:eager")
    assert (logits(by_name) - expected).abs().max() <= 1e-5 * expected.abs().max()
    by_name.set_experts_implementation("moebench:grouped")
    assert (logits(by_name) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["eager", "grouped"])
def test_a_registered_name_follows_replaced_weights(name):
    bridge.register()
    model = build("Olmoe", experts=f"moebench:{name}")
    before = logits(model)
    down = model.model.layers[0].mlp.experts.down_proj
    down.data = 0.5 * down.data
    changed = logits(model)
    assert (changed - before).abs().max() > 0.01 * before.abs().max()
    model.set_experts_implementation("eager")
    torch.testing.assert_close(changed, logits(model), rtol=1e-4, atol=1e-5)


def test_slots_outside_the_experts_are_empty():
    model = build("Olmoe")
    module = model.model.layers[0].mlp.experts
    x_TH = torch.randn(4, 32)
    indices_TK = torch.tensor([[0, 1, 2], [3, 8, 4], [-1, 5, 9], [8, 8, 8]])
    weights_TK = torch.rand(4, 3)
    kept = (indices_TK >= 0) & (indices_TK < 8)
    expected = module(x_TH, indices_TK.where(kept, 0), weights_TK.where(kept, 0.0))
    with bridge.attach(model, "eager"):
        actual = module(x_TH, indices_TK, weights_TK)
    torch.testing.assert_close(actual, expected)
    assert not actual[3].any()


def test_gradients_reach_the_models_parameters():
    model = build("Olmoe")
    module = model.model.layers[1].mlp.experts
    ids_BS = torch.arange(9)[None]
    grads = []
    for name in (None, "eager", "grouped"):
        model.zero_grad()
        if name is None:
            model(ids_BS).logits.square().mean().backward()
        else:
            with bridge.attach(model, name, backward=True):
                model(ids_BS).logits.square().mean().backward()
        grads.append([module.gate_up_proj.grad.clone(), module.down_proj.grad.clone()])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_attached_is_refused_in_a_sentence():
    model = build("Olmoe")
    with (
        pytest.raises(MoebenchError, match="unknown backend 'eeger': did you mean 'eager'"),
        bridge.attach(model, "eeger"),
    ):
        pass
    with (
        pytest.raises(MoebenchError, match="layer 0 cannot be attached: packed runs quantized weights"),
        bridge.attach(model, "packed"),
    ):
        pass
    with pytest.raises(MoebenchError, match="no backward"), bridge.attach(model, "batched", backward=True):
        pass
    with pytest.raises(MoebenchError, match="Linear has no MoE layers"), bridge.attach(torch.nn.Linear(2, 2), "eager"):
        pass
    with pytest.raises(MoebenchError, match=r"it does not work here\.$"), bridge.attach(model, Broken()):
        pass
    assert model.config._experts_implementation == "eager"


class Broken:
    def availability(self):
        return Availability(False, "it does not work here")


def test_biased_transposed_experts_are_refused():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "head_dim": 8}
    model = build("GptOss", **sizes)
    with (
        pytest.raises(MoebenchError, match="GptOssExperts cannot be attached: its experts have biases"),
        bridge.attach(model, "eager"),
    ):
        pass


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("has_gate", False, "no gate"),
        ("has_bias", True, "biases"),
        ("is_transposed", True, "transposed"),
        ("is_concatenated", False, "interleaved"),
        ("has_post_expert_norm", True, "normalises"),
        ("_is_expert_parallel", True, "spread over processes"),
        ("act_fn", torch.nn.Tanh(), "activation Tanh is not one of"),
    ],
)
def test_each_unknown_form_of_experts_has_its_sentence(attribute, value, words):
    module = build("Olmoe").model.layers[0].mlp.experts
    setattr(module, attribute, value)
    with pytest.raises(MoebenchError, match=f"OlmoeExperts cannot be attached: .*{words}"):
        bridge.describe(module)
