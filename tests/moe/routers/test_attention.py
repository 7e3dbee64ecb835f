"""BAM as a routing over a layer of attentions: softmax over all of them, and the one attention that they may be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.reference import Reference
from moebench.contracts import LayerSpec, Selection, load_attribute
from moebench.moe.attention_mixture import Attention, AttentionMixture, attend
from moebench.moe.expert_structures import attentions
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, stored_attention
from moebench.moe.oracle import compare, reference
from moebench.moe.router_params.attention import BAM, DESCRIPTORS
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape
from moebench.moe.structure_params import Attentions

HIDDEN, HEADS, EXPERTS, TOKENS = 12, 3, 4, 20
VARIANTS = [
    ("bam", BAM(), {"experts": EXPERTS, "width": HIDDEN, "heads": HEADS}),
    ("bam", BAM(), {"experts": 2, "width": 8, "heads": 2}),
]
every_variant = pytest.mark.parametrize(("params", "changes"), [variant[1:] for variant in VARIANTS])


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shape_of(**changes):
    return ModelShape(HIDDEN, 8, 16, 2, (0, 1), Selection("softmax", 2, True)).with_(**changes)


def build(params=VARIANTS[0][1], changes=VARIANTS[0][2], seed=0, router_EH=None):
    weights = LayerWeights(torch.zeros(1), torch.zeros(1), router_EH)
    return load_attribute(DESCRIPTORS[0].factory)(params)(weights, shape_of(**changes), seed)


def store_of(seed=1, same=False, experts=EXPERTS):
    """Seeded attentions, or one of them ``experts`` times."""
    ffn = LayerWeights(torch.zeros(1, 2, HIDDEN), torch.zeros(1, HIDDEN, 1))
    made = attentions(Attentions(experts, HEADS))(ffn, torch.zeros(0, HIDDEN), seed)
    gate_up, down = (part[:1].expand_as(part) if same else part for part in (made.gate_up, made.down))
    return ExpertStore(gate_up, down, ("sequence",) * experts, heads=HEADS)


def run(store, routing, x_TH):
    """The layer on backend reference, judged by the oracle."""
    spec = LayerSpec(store.hidden, store.width, store.kinds, heads=store.heads, max_k=store.num_experts)
    y_TH = Reference().load({0: store}, {0: spec}).layer(0)(x_TH, *routing.padded())
    verdict = compare(y_TH, reference(store, routing, x_TH), x_TH.dtype)
    assert verdict.ok, verdict
    return y_TH


def attention_of(store, slot) -> Attention:
    return stored_attention(*store.weights(slot), store.heads)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(0, 99))
def test_identical_attentions_are_the_one_whatever_the_gate(experts, seed):
    """R17: 6e-8 in float32; here to the rounding of a sum over experts."""
    store, x_TH = store_of(seed, same=True, experts=experts), seeded(TOKENS, HIDDEN, seed=seed + 1)
    changes = {"experts": experts, "width": HIDDEN, "heads": HEADS}
    router = build(changes=changes, router_EH=3 * seeded(experts, HIDDEN, seed=seed + 2)).router
    y_TH = run(store, router(x_TH, Context()), x_TH)
    torch.testing.assert_close(y_TH, attend(x_TH, attention_of(store, 0)), atol=1e-6, rtol=0)


def test_the_routed_layer_is_bams_mixture():
    store, x_TH = store_of(), seeded(TOKENS, HIDDEN, seed=1)
    router = build().router
    mixture = AttentionMixture([attention_of(store, slot) for slot in range(EXPERTS)], router.scorer.weight_EH)
    routing = router(x_TH, Context())
    torch.testing.assert_close(routing.to_dense(), mixture.gate(x_TH).to_dense())
    torch.testing.assert_close(run(store, routing, x_TH), mixture(x_TH), atol=1e-6, rtol=1e-5)


@every_variant
def test_every_token_has_every_expert_and_weights_sum_to_one(params, changes):
    bundle, x_TH = build(params, changes), seeded(TOKENS, HIDDEN, seed=1)
    routing = bundle.router(x_TH, Context())
    shape = shape_of(**changes)
    assert bundle.kinds == params.kinds(shape) == ("sequence",) * changes["experts"]
    assert (routing.k_T == params.max_k(shape)).all()
    torch.testing.assert_close(routing.to_dense(), (x_TH @ bundle.router.scorer.weight_EH.T).softmax(-1))
    assert params.selection(shape) == Selection("softmax", changes["experts"], renormalize=False)


def test_gradients_reach_the_gate_and_padding_has_no_entries():
    router, valid_T = build().router, torch.arange(TOKENS) % 3 != 0
    routing = router(seeded(TOKENS, HIDDEN, seed=1), Context(valid_T=valid_T))
    assert not routing.k_T[~valid_T].any()
    routing.weight_N.square().sum().backward()
    assert router.scorer.weight_EH.grad.abs().max() > 0


def test_a_layer_of_ffns_is_refused_with_the_remedy():
    for ask in (BAM().kinds, BAM().max_k):
        with pytest.raises(ValueError, match=r"the layer has FFNs; use axes\.structure=attention"):
            ask(shape_of())
