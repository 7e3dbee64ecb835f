"""PEER and UltraMem as routings over a layer of rank-1 experts: the layers of ``moe.gather``, run by a backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.reference import Reference
from moebench.contracts import LayerSpec, Selection, load_attribute
from moebench.moe.experts import ExpertStore
from moebench.moe.gather.peer import PEER as PeerLayer
from moebench.moe.gather.retrieval import leading_vectors
from moebench.moe.gather.ultramem import TuckerSearch
from moebench.moe.gather.ultramem import UltraMem as UltraMemLayer
from moebench.moe.layer import LayerWeights
from moebench.moe.oracle import compare, reference
from moebench.moe.router_params.gather import DESCRIPTORS, PEER, UltraMem
from moebench.moe.routers.gather import TuckerRouter
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

SMALL = {"experts": 49, "width": 1, "gated": False, "activation": "gelu"}
VARIANTS = [
    ("peer", PEER(), {"experts": 256, "width": 1}),
    ("peer", PEER(heads=2, k=4, key_width=8), SMALL),
    ("peer", PEER(heads=3, k=1, key_width=8, score="relu"), {"experts": 50, "width": 1}),
    ("ultramem", UltraMem(), {"experts": 256, "width": 1}),
    ("ultramem", UltraMem(heads=2, k=4, key_width=8, rank=3), SMALL),
    ("ultramem", UltraMem(heads=2, k=4, key_width=8), {"experts": 50, "width": 1}),
]
HIDDEN, TOKENS = 12, 40
FACTORIES = {descriptor.name: descriptor.factory for descriptor in DESCRIPTORS}
every_variant = pytest.mark.parametrize(("name", "params", "changes"), VARIANTS)


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shape_of(**changes):
    return ModelShape(HIDDEN, 8, 16, 2, (0, 1), Selection("softmax", 2, True)).with_(**changes)


def build(name, params, changes, seed=0):
    return load_attribute(FACTORIES[name])(params)(
        LayerWeights(torch.zeros(1), torch.zeros(1)), shape_of(**changes), seed
    )


def rank_one(inner_EH, outer_EH):
    """Ungated gelu experts of width 1."""
    kinds = ("gather",) * len(inner_EH)
    return ExpertStore(inner_EH.detach()[:, None], outer_EH.detach()[:, :, None], kinds, "gelu", gated=False)


def run(store, routing, x_TH):
    """The layer on backend reference, judged by the oracle."""
    dtype = str(x_TH.dtype).removeprefix("torch.")
    spec = LayerSpec(store.hidden, 1, store.kinds, dtype, "gelu", gated=False, max_k=64)
    y_TH = Reference().load({0: store}, {0: spec}).layer(0)(x_TH, *routing.padded())
    verdict = compare(y_TH, reference(store, routing, x_TH), x_TH.dtype)
    assert verdict.ok, verdict
    return y_TH


# --- the layers of the papers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "k", "score"), [(3, 4, "softmax"), (3, 1, "relu")])
def test_the_routed_layer_is_peer(heads, k, score):
    layer = PeerLayer.seeded(HIDDEN, 7, heads, k, key_width=8, seed=5, score=score)
    router = build("peer", PEER(heads, k, 8, score), SMALL, seed=5).router
    x_TH = seeded(TOKENS, HIDDEN, seed=1)
    y_TH = run(rank_one(layer.bank.inner_EH, layer.bank.outer_EH), router(x_TH, Context()), x_TH)
    torch.testing.assert_close(y_TH, layer(x_TH), rtol=1e-5, atol=1e-5)


def test_the_routed_layer_is_ultramem_with_one_core():
    """(W_pre x) P[row] is one row of the layer, and W_v V[row] one column: the projections are absorbed."""
    sizes = {"side": 7, "key_width": 8, "values": 10, "pre_values": 6, "k": 4, "heads": 2, "rank": 3}
    layer = UltraMemLayer.seeded(HIDDEN, **sizes, cores=1, seed=5)
    router = build("ultramem", UltraMem(heads=2, k=4, key_width=8, rank=3), SMALL, seed=5).router
    x_TH = seeded(TOKENS, HIDDEN, seed=1)
    store = rank_one(layer.table.pre_VP @ layer.pre_PH, layer.table.value_VC @ layer.out_HC.T)
    routing = router(x_TH, Context())
    assert torch.equal(routing.to_dense(), layer.routing(x_TH).to_dense())
    torch.testing.assert_close(run(store, routing, x_TH), layer(x_TH), rtol=1e-5, atol=1e-5)


# --- what both promise -----------------------------------------------------------------------------------------------


@every_variant
def test_a_token_has_no_more_than_its_queries_find(name, params, changes):
    bundle = build(name, params, changes)
    routing = bundle.router(seeded(TOKENS, HIDDEN, seed=1), Context())
    assert bundle.kinds == ("gather",) * changes["experts"] == params.kinds(shape_of(**changes))
    assert routing.shape == (TOKENS, changes["experts"])
    assert 1 <= routing.k_T.min() <= routing.k_T.max() <= params.max_k(shape_of(**changes))
    pairs = routing.token_N * routing.num_experts + routing.expert_N
    assert len(pairs.unique()) == len(pairs)


@settings(deadline=None, max_examples=30)
@given(experts=st.integers(1, 200))
def test_the_grid_has_a_place_for_every_expert_and_no_row_too_many(experts):
    side = PEER().side(shape_of(experts=experts))
    assert (side - 1) ** 2 < experts <= side**2


@pytest.mark.parametrize("name", ["peer", "ultramem"])
def test_every_expert_has_a_place_where_their_number_is_no_square(name):
    """With all places asked for, all experts are found, and the few with two places twice."""
    sizes = {"heads": 1, "k": 64, "key_width": 8}
    params = PEER(**sizes, score="relu") if name == "peer" else UltraMem(**sizes)
    whole = build(name, params, {"experts": 64, "width": 1}).router(seeded(5, HIDDEN, seed=1), Context())
    assert (whole.k_T == 64).all()
    router = build(name, PEER(1, 50, 8) if name == "peer" else UltraMem(1, 50, 8), {"experts": 50, "width": 1}).router
    (router.search if name == "ultramem" else router).k = 64
    folded = router(seeded(5, HIDDEN, seed=1), Context())
    assert (folded.k_T == 50).all()
    assert router.experts == 50


def test_weights_of_two_places_add_up():
    x_TH = seeded(5, HIDDEN, seed=1)
    whole = build("peer", PEER(1, 49, 8), SMALL).router
    folded = build("peer", PEER(1, 40, 8), {"experts": 40, "width": 1}).router
    folded.k = 49
    weights_TE = whole(x_TH, Context()).to_dense()
    expected_TE = weights_TE[:, :40].clone()
    expected_TE[:, :9] += weights_TE[:, 40:]
    torch.testing.assert_close(folded(x_TH, Context()).to_dense(), expected_TE)


def test_peers_weights_sum_to_the_number_of_heads():
    routing = build("peer", PEER(heads=3, k=4, key_width=8), SMALL).router(seeded(TOKENS, HIDDEN), Context())
    torch.testing.assert_close(routing.to_dense().sum(1), torch.full((TOKENS,), 3.0))


def test_ultramems_weights_are_raw_scores_of_both_signs():
    routing = build("ultramem", UltraMem(k=16, key_width=8), SMALL).router(seeded(400, HIDDEN), Context())
    assert routing.weight_N.min() < 0 < routing.weight_N.max()
    assert routing.to_dense().sum(1).std() > 0.1


@every_variant
def test_order_later_tokens_and_padding_do_not_matter(name, params, changes):
    router, x_TH = build(name, params, changes).router, seeded(TOKENS, HIDDEN, seed=1)
    before_TE = router(x_TH, Context()).to_dense()
    order_T = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(router(x_TH[order_T], Context()).to_dense(), before_TE[order_T], rtol=1e-4, atol=1e-5)
    changed_TH = torch.cat([x_TH[:10], x_TH[10:] + 1])
    torch.testing.assert_close(router(changed_TH, Context()).to_dense()[:10], before_TE[:10], rtol=1e-4, atol=1e-5)
    valid_T = torch.arange(TOKENS) % 3 != 0
    masked_TE = router(x_TH, Context(valid_T=valid_T)).to_dense()
    assert not masked_TE[~valid_T].any()
    assert torch.equal(masked_TE[valid_T], before_TE[valid_T])
    assert router(torch.zeros(0, HIDDEN), Context()).shape == (0, changes["experts"])


@every_variant
def test_gradients_reach_every_parameter(name, params, changes):
    router = build(name, params, changes).router
    gate_TE = router(seeded(TOKENS, HIDDEN, seed=1), Context()).to_dense()
    (gate_TE * seeded(*gate_TE.shape, seed=3)).sum().backward()
    for parameter in router.parameters():
        assert parameter.grad.abs().max() > 0
    other = build(name, params, changes, seed=1).router(seeded(TOKENS, HIDDEN, seed=1), Context())
    assert not torch.equal(other.to_dense(), gate_TE)


def test_an_update_turns_the_search_to_the_core_as_it_is_now():
    router = build("ultramem", UltraMem(key_width=8), SMALL).router
    with torch.no_grad():
        router.search.core_MARR.copy_(torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]))
    before_AR = router.search.left_AR.clone()
    router.update(router(seeded(TOKENS, HIDDEN), Context()))
    left_AR, _ = leading_vectors(router.search.core_MARR, (before_AR, router.search.right_AR))
    torch.testing.assert_close(router.search.left_AR, left_AR)
    torch.testing.assert_close(left_AR.abs(), torch.tensor([[0.0, 1.0]]), atol=1e-6, rtol=0)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_wide_experts_are_refused_with_the_remedy():
    for params in (PEER(), UltraMem()):
        for ask in (params.kinds, params.max_k):
            with pytest.raises(ValueError, match=r"not ones of width 8; use axes\.structure=neurons"):
                ask(shape_of())
        assert params.selection(shape_of()) is None


@pytest.mark.parametrize("changes", [{"k": 50}, {"k": 0}, {"heads": 0}])
def test_impossible_numbers_are_refused(changes):
    with pytest.raises(ValueError, match="must lie between 1 and the 49 experts"):
        PEER(**changes).kinds(shape_of(**SMALL))


@pytest.mark.parametrize("make", [lambda: PEER(key_width=0), lambda: UltraMem(key_width=0), lambda: UltraMem(rank=0)])
def test_empty_keys_are_refused(make):
    with pytest.raises(ValueError, match="must be at least 1"):
        make()


def test_more_cores_than_one_are_the_module_alone():
    search = TuckerSearch.seeded(HIDDEN, 7, 8, 4, heads=1, rank=2, cores=2, seed=0)
    with pytest.raises(ValueError, match="2 cores give a row as many weights"):
        TuckerRouter(search, torch.arange(49), 49)
