"""Read-ME: routes from token ids, one decision for all layers, experts that are masks of a dense layer (R16)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf

from moebench.contracts import Selection, load_attribute
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, SharedExpert, moe_forward
from moebench.moe.router import select
from moebench.moe.router_params.pregate import DESCRIPTORS, ReadMe
from moebench.moe.routers.pregate import positions, rotated
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("read_me", ReadMe(), {}),
    ("read_me", ReadMe(layers=2, width=32, heads=2, normalizer=4.0, vocabulary=500), {}),
]
HIDDEN, EXPERTS, LENGTH, TOKENS, VOCABULARY = 32, 7, 16, 48, 500
SHAPE = ModelShape(HIDDEN, 8, EXPERTS, 4, (0, 1, 2, 3), Selection("softmax", 2, True))
SMALL = ReadMe(vocabulary=VOCABULARY)
SEGMENT_T = torch.arange(TOKENS) // LENGTH
IDS_T = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(params=SMALL, seed=0):
    weights = LayerWeights(torch.zeros(EXPERTS, 16, HIDDEN), torch.zeros(EXPERTS, HIDDEN, 8))
    return load_attribute(DESCRIPTORS[0].factory)(params)(weights, SHAPE, seed)


def context(ids_T=IDS_T, **changes):
    return Context(token_ids_T=ids_T, segment_T=SEGMENT_T, **changes)


def route(router, ids_T=IDS_T, **changes):
    return router(torch.zeros(TOKENS, HIDDEN), context(ids_T, **changes))


@pytest.mark.parametrize("params", [variant[1] for variant in VARIANTS])
def test_one_expert_with_weight_one(params):
    routing = route(build(params).router)
    indices_TK, weights_TK = select(routing.logits_TE, params.selection(SHAPE))
    assert torch.equal(indices_TK[:, 0], routing.logits_TE.argmax(1))
    assert torch.equal(routing.padded()[0], indices_TK)
    assert torch.equal(routing.padded()[1], weights_TK)
    assert len(routing.expert_N.unique()) > 3


def test_only_ids_count_and_hidden_states_do_not():
    router = build().router
    ctx = context()
    first, second = (router(x_TH, ctx).logits_TE for x_TH in (seeded(TOKENS, HIDDEN), torch.zeros(TOKENS, HIDDEN)))
    assert torch.equal(first, second)


def test_later_ids_do_not_change_earlier_routes():
    router = build().router
    later_T = torch.arange(TOKENS) % LENGTH >= 8
    before_TE, after_TE = (route(router, ids_T).logits_TE for ids_T in (IDS_T, torch.where(later_T, 0, IDS_T)))
    torch.testing.assert_close(before_TE[~later_T], after_TE[~later_T])
    assert not torch.allclose(before_TE[later_T], after_TE[later_T], atol=1e-3)


def test_earlier_ids_of_the_same_sequence_count_and_others_do_not():
    router = build().router
    first_changed_T = IDS_T.clone()
    first_changed_T[0] = (IDS_T[0] + 1) % VOCABULARY
    before_TE, after_TE = (route(router, ids_T).logits_TE for ids_T in (IDS_T, first_changed_T))
    assert (before_TE[1:LENGTH] - after_TE[1:LENGTH]).abs().max() > 1e-3
    torch.testing.assert_close(before_TE[LENGTH:], after_TE[LENGTH:])


def test_padding_is_not_looked_at():
    router, valid_T = build().router, torch.arange(TOKENS) % LENGTH >= 4
    padded_T = torch.where(valid_T, IDS_T, 0)
    first, second = (route(router, ids_T, valid_T=valid_T) for ids_T in (IDS_T, padded_T))
    assert torch.equal(first.k_T, valid_T.long())
    assert torch.equal(first.to_dense(), second.to_dense())


def test_interleaved_sequences_are_the_same_sequences():
    router, order_T = build().router, torch.arange(TOKENS).view(3, LENGTH).T.flatten()
    ctx = Context(token_ids_T=IDS_T[order_T], segment_T=SEGMENT_T[order_T])
    assert torch.equal(positions(ctx, TOKENS), torch.arange(LENGTH).repeat_interleave(3))
    mixed_TE = router(torch.zeros(TOKENS, HIDDEN), ctx).logits_TE
    torch.testing.assert_close(mixed_TE, route(router).logits_TE[order_T], atol=1e-5, rtol=1e-5)


def test_rotation_makes_products_depend_on_distance_alone():
    query_TAC, key_TAC, distance_T = seeded(6, 2, 8, seed=1), seeded(6, 2, 8, seed=2), torch.arange(6)
    near, far = (
        (rotated(query_TAC, distance_T + start) * rotated(key_TAC, torch.full((6,), start))).sum(-1)
        for start in (0, 11)
    )
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert torch.equal(rotated(query_TAC, torch.zeros(6).long()), query_TAC)


def test_normalizer_divides_attention_logits():
    sharp, flat = (route(build(ReadMe(vocabulary=VOCABULARY, normalizer=n)).router).logits_TE for n in (1.0, 8.0))
    assert not torch.allclose(sharp, flat, atol=1e-3)
    first_T = torch.arange(TOKENS) % LENGTH == 0
    torch.testing.assert_close(sharp[first_T], flat[first_T])


# --- one decision for all layers -------------------------------------------------------------------------------------


def test_the_plan_is_one_routing_for_all_layers():
    """Every route is known before layer 0: a prefetch of what the plan names is always right."""
    router = build().router
    assert router.scope == "model"
    plan = router.plan(torch.zeros(TOKENS, HIDDEN), context(), SHAPE.moe_layers)
    assert list(plan) == [0, 1, 2, 3]
    for layer in SHAPE.moe_layers:
        followed = router(seeded(TOKENS, HIDDEN, seed=layer), Context(layer=layer, plan=plan))
        assert followed is plan[0]
    assert torch.equal(plan[0].to_dense(), route(router).to_dense())


def test_a_layer_outside_the_plan_is_refused():
    router = build().router
    plan = router.plan(torch.zeros(TOKENS, HIDDEN), context(), [0, 1])
    with pytest.raises(ValueError, match="layer 2 is not in the Context's 'plan'"):
        router(torch.zeros(TOKENS, HIDDEN), Context(layer=2, plan=plan))


@pytest.mark.parametrize("field", ["token_ids_T", "segment_T"])
def test_an_absent_field_is_named(field):
    router, ctx = build().router, context()
    assert field in router.needs
    ctx = replace(ctx, **{field: None})
    with pytest.raises(ValueError, match=f"'{field}'"):
        router(torch.zeros(TOKENS, HIDDEN), ctx)


def test_no_tokens():
    ctx = Context(token_ids_T=torch.zeros(0).long(), segment_T=torch.zeros(0).long())
    assert build().router(torch.zeros(0, HIDDEN), ctx).shape == (0, EXPERTS)


def test_seeds_make_routers():
    first, again, other = (route(build(seed=seed).router).logits_TE for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("changes", [{"layers": 0}, {"width": 36, "heads": 4}, {"normalizer": 0.0}, {"vocabulary": 0}])
def test_impossible_parameters_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ReadMe(**changes)


# --- R16 -------------------------------------------------------------------------------------------------------------


def swiglu(x_TH, gate_FH, up_FH, down_HF, mask=1.0):
    return (nnf.silu(x_TH @ gate_FH.T) * (x_TH @ up_FH.T) * mask) @ down_HF.T


def test_masked_dense_layer_is_its_slices():
    """R16: the dense FFN with the mask of the token's cluster = expert slices (and an always-on residual).

    Off by 2.4e-7 of the largest output (2.5e-7 in the prototype). The residual are neurons of every mask; each cluster
    has as many private ones.
    """
    width, residual = 256, 32
    gate_FH, up_FH = (seeded(width, HIDDEN, seed=seed) / HIDDEN**0.5 for seed in (1, 2))
    down_HF, x_TH = seeded(HIDDEN, width, seed=3) / width**0.5, seeded(TOKENS, HIDDEN, seed=4)
    draws = [torch.randperm(width - residual, generator=torch.Generator().manual_seed(i)) for i in range(EXPERTS)]
    private_EC = torch.stack([residual + draw[:96].sort().values for draw in draws])
    mask_EF = torch.zeros(EXPERTS, width).scatter(1, private_EC, 1.0)
    mask_EF[:, :residual] = 1
    router = build().router
    cluster_T = route(router).padded()[0][:, 0]
    masked_TH = swiglu(x_TH, gate_FH, up_FH, down_HF, mask_EF[cluster_T])

    gate_up = torch.cat([gate_FH[private_EC], up_FH[private_EC]], dim=1)
    down = torch.stack([down_HF[:, channels_C] for channels_C in private_EC])
    always_on = SharedExpert(torch.cat([gate_FH[:residual], up_FH[:residual]]), down_HF[:, :residual])
    layer = PreparedLayer(ExpertStore(gate_up, down, ("ffn",) * EXPERTS), router, always_on)
    sliced_TH = moe_forward(layer, x_TH, context())
    assert (masked_TH - sliced_TH).abs().max() < 1e-6 * masked_TH.abs().max()
