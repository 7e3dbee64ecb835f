"""Every sparsity in a language model: its oracle passes, level 0 changes nothing, the model is the same after it."""

from dataclasses import replace

import pytest
import torch

from moebench.contracts import LayerSpec, Registry
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import PreparedLayer
from moebench.moe.router import Router
from moebench.moe.routing import Routing
from moebench.suites.quality.block import MoEBlock
from moebench.suites.quality.language_model import exchanged
from moebench.suites.subject import Subject

H, F, T, LAYERS = 32, 48, 64, (1, 3)
REGISTRY = Registry.load()
METHODS = [name for name in REGISTRY.names("sparsity") if name != "none"]


class OneExpert(Router):
    """Sends every token to the only expert, with weight 1."""

    def forward(self, x_TH, ctx):
        """Return the Routing."""
        return Routing.topk(torch.zeros(len(x_TH), 1, dtype=torch.long), torch.ones(len(x_TH), 1), 1)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": H, "intermediate_size": F, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def ids():
    return torch.randint(97, (T,), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def final_of(model):
    return model.model(ids()[None], use_cache=False).last_hidden_state[0]


def make_block(model, index, name, level, calls):
    """Return an FFN of the model as a layer of one expert with the sparsity ``name``."""
    ffn = model.model.layers[index].mlp
    gate_up = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]).detach()[None]
    store = ExpertStore(gate_up, ffn.down_proj.weight.detach()[None], ("ffn",))
    descriptor = REGISTRY.get("sparsity", name)
    calibration_TH = torch.randn(200, H, generator=torch.Generator().manual_seed(index))
    routing = OneExpert()(calibration_TH, None)
    sparse = descriptor.create({"level": level})(store, routing, calibration_TH, seed=index)
    spec = LayerSpec(H, F, ("ffn",), schemes=store.schemes, sparsity=descriptor.params_from({"level": level}).spec())
    backend = REGISTRY.get("backend", "eager").create({})
    dense_spec = replace(spec, sparsity=None)
    run, whole = (backend.load({0: s}, {0: p}).layer(0) for s, p in ((sparse, spec), (store, dense_spec)))
    subject = Subject(None, None, PreparedLayer(sparse, OneExpert()), spec)
    return MoEBlock(index, subject, run, calls, 0, ffn, whole)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_is_sparse_inside_and_the_same_bits_after(llama, name):
    before, modules = final_of(llama), list(llama.modules())
    weights = {key: tensor.clone() for key, tensor in llama.state_dict().items()}
    calls = []
    with exchanged(llama, {index: make_block(llama, index, name, 0.5, calls) for index in LAYERS}):
        inside = final_of(llama)
    assert len(calls) == len(LAYERS)
    for call in calls:
        check = call.check()
        assert check.ok, check
        kept = {metric.name: metric.value for metric in call.sparsity()}["kept_flops"]
        assert 0.3 < kept < 0.8
    assert not torch.equal(inside, before)
    prefix = calls[0].prefix
    assert prefix == (0 if name in ("magnitude", "wanda") else 1)
    assert torch.allclose(inside[:prefix], before[:prefix], atol=1e-5)
    assert all(one is other for one, other in zip(llama.modules(), modules, strict=True))
    assert all(torch.equal(tensor, weights[key]) for key, tensor in llama.state_dict().items())
    assert torch.equal(final_of(llama), before)


@pytest.mark.parametrize("name", METHODS)
def test_level_0_is_the_layer_without_sparsity_bit_for_bit(llama, name):
    finals = []
    for method, level in ((name, 0.0), ("teal", 0.0)):
        calls = []
        with exchanged(llama, {index: make_block(llama, index, method, level, calls) for index in LAYERS}):
            finals.append(final_of(llama))
        assert all(call.block.subject.layer.store.sparsity is None for call in calls)
    assert torch.equal(*finals)
