"""Product keys and TDQKR against exhaustive search, and the gather of rank-1 experts against the dense sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.gather.peer import PEER, ProductKeyRouter
from moebench.moe.gather.rank_one import RankOneBank, gather_metrics, merged_routing
from moebench.moe.gather.retrieval import (
    exhaustive_topk,
    leading_vectors,
    product_grid,
    product_key_topk,
    recall,
    spectral_ratio,
    tucker_grid,
    tucker_topk,
)
from moebench.moe.gather.ultramem import TuckerSearch, UltraMem, core_penalty, key_balance
from moebench.moe.routing import Context, Routing

H, T = 12, 30


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def uniform(*size, seed=0):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def peer(heads=3, side=7, k=4, score="softmax", seed=0):
    return PEER.seeded(H, side, heads, k, key_width=5, seed=seed, score=score).double()


def value(metrics, name):
    return next(metric.value for metric in metrics if metric.name == name)


# --- product keys ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 3), st.integers(0, 999))
def test_product_keys_find_the_very_best(side, k, heads, seed):
    """R12 (PEER): error 0 - the same sums, bit for bit, and the same rows."""
    k = min(k, side * side)
    first_TAS, second_TAS = seeded(5, heads, side, seed=seed), seeded(5, heads, side, seed=seed + 1000)
    scores, rows = product_key_topk(first_TAS, second_TAS, k)
    wanted, wanted_rows = exhaustive_topk(product_grid(first_TAS, second_TAS), k)
    assert torch.equal(scores, wanted)
    assert recall(rows, wanted_rows) == 1.0
    grid = product_grid(first_TAS, second_TAS).flatten(2)
    assert torch.equal(grid.gather(2, rows), scores)
    assert (scores.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize(("first", "second", "k"), [(4, 4, 17), (4, 4, 0), (4, 5, 2)])
def test_what_no_grid_has_is_refused(first, second, k):
    with pytest.raises(ValueError, match="smaller k"):
        product_key_topk(seeded(2, 1, first), seeded(2, 1, second), k)


def test_recall_is_the_share_found():
    assert recall(torch.tensor([[[1, 2, 3, 4]]]), torch.tensor([[[2, 9, 4, 8]]])) == 0.5


# --- PEER ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "relu"])
def test_peer_is_every_expert_scored_and_computed(score):
    layer, x_TH = peer(score=score), seeded(T, H, seed=1).double()
    torch.testing.assert_close(layer(x_TH), layer.reference(x_TH), rtol=1e-10, atol=1e-12)


def test_peer_by_hand():
    layer, x_TH = peer(heads=2, k=3), seeded(4, H, seed=1).double()
    first_TAS, second_TAS = layer.router.side_scores(x_TH)
    wanted_TH = torch.zeros_like(x_TH)
    for token in range(4):
        for head in range(2):
            sums = (first_TAS[token, head][:, None] + second_TAS[token, head][None, :]).flatten()
            best = sums.topk(3)
            for weight, row in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
                dot = x_TH[token] @ layer.bank.inner_EH[row]
                wanted_TH[token] += weight * torch.nn.functional.gelu(dot) * layer.bank.outer_EH[row]
    torch.testing.assert_close(layer(x_TH), wanted_TH, rtol=1e-6, atol=1e-8)


def test_weights_of_each_head_sum_to_one():
    routing = peer(heads=3, side=4, k=8).router(seeded(T, H, seed=1), Context())
    torch.testing.assert_close(routing.to_dense().sum(1).float(), torch.full((T,), 3.0))
    pairs = routing.token_N * routing.num_experts + routing.expert_N
    assert len(pairs.unique()) == len(pairs)
    assert routing.k_T.max() <= 24
    assert (routing.k_T < 24).any(), "three heads of eight among sixteen rows must meet"


def test_heads_that_agree_share_one_entry():
    router = peer(heads=1, k=4).router.float()
    twice = ProductKeyRouter(router.query_QH.repeat(2, 1), router.keys_A2SD.repeat(2, 1, 1, 1), 4)
    x_TH = seeded(T, H, seed=1)
    torch.testing.assert_close(twice(x_TH, Context()).to_dense(), 2 * router(x_TH, Context()).to_dense())


def test_released_default_is_relu_of_one_expert_per_head():
    """PEER-pytorch: non-competing scores, so the weight is the score itself and may be zero."""
    competing, free = peer(heads=1, k=1), peer(heads=1, k=1, score="relu")
    x_TH = seeded(T, H, seed=1)
    score_TA1, _ = product_key_topk(*free.router.side_scores(x_TH), 1)
    assert (competing.router(x_TH, Context()).weight_N == 1).all()
    assert torch.equal(free.router(x_TH, Context()).weight_N, score_TA1.flatten().relu())


def test_order_and_later_tokens_do_not_matter():
    router, x_TH = peer().router, seeded(T, H, seed=1)
    before = router(x_TH, Context()).to_dense()
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(router(x_TH[order_T], Context()).to_dense(), before[order_T])
    changed_TH = torch.cat([x_TH[:10], x_TH[10:] + 1])
    torch.testing.assert_close(router(changed_TH, Context()).to_dense()[:10], before[:10])


def test_padding_and_no_tokens_read_nothing():
    layer = peer()
    valid_T = torch.arange(T) % 3 != 0
    y_TH = layer(seeded(T, H, seed=1).double(), Context(valid_T=valid_T))
    assert not y_TH[~valid_T].any()
    assert y_TH[valid_T].any(dim=1).all()
    assert layer(torch.zeros(0, H).double()).shape == (0, H)


def test_gradients_reach_queries_keys_and_the_rows_that_were_read():
    layer, x_TH = peer(side=12), seeded(5, H, seed=1).double()
    layer(x_TH).square().sum().backward()
    for parameter in layer.router.parameters():
        assert parameter.grad.abs().max() > 0
    read_E = layer.router(x_TH, Context()).counts_E > 0
    assert 0 < int(read_E.sum()) < len(read_E)
    assert torch.equal(layer.bank.inner_EH.grad.any(dim=1), read_E)
    assert torch.equal(layer.bank.outer_EH.grad.any(dim=1), read_E)


def test_bank_takes_signed_weights_and_tokens_without_experts():
    bank = RankOneBank(seeded(9, H), seeded(9, H, seed=1), "relu").double()
    gate_TE = seeded(T, 9, seed=2).double() * (uniform(T, 9, seed=3) < 0.3)
    gate_TE[5] = 0
    routing, x_TH = Routing.dense(gate_TE), seeded(T, H, seed=4).double()
    torch.testing.assert_close(bank(x_TH, routing), bank.dense(x_TH, routing))
    assert not bank(x_TH, routing)[5].any()


def test_bytes_of_a_gather_depend_on_what_is_found_alone():
    """UltraMem's 16 rows of 1024 numbers against top-2 of 8 gated experts of a 768 x 2048 layer, in bfloat16."""
    tokens, found = 64, 16
    for experts in (256, 65536):
        rows_TL = torch.argsort(uniform(tokens, experts), dim=1)[:, :found]
        metrics = gather_metrics(merged_routing(rows_TL, torch.ones(tokens, found), experts), 512 + 512, 2)
        assert value(metrics, "gather_bytes_per_token") == 16 * 1024 * 2
        assert value(metrics, "gather_distinct_rows") == len(rows_TL.unique())
    moe_bytes_per_token = 2 * 3 * 768 * 2048 * 2
    assert moe_bytes_per_token / (16 * 1024 * 2) == 576


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="need 30 query rows, not 6"):
        ProductKeyRouter(seeded(6, H), seeded(3, 2, 7, 5), 2)
    with pytest.raises(ValueError, match="49 experts and the bank has 9"):
        PEER(peer().router, RankOneBank(seeded(9, H), seeded(9, H)))
    with pytest.raises(ValueError, match="one row of each"):
        RankOneBank(seeded(9, H), seeded(8, H))


# --- TDQKR -----------------------------------------------------------------------------------------------------------


def tucker_recall(core_MARR, first_TASR, second_TASR, k=16):
    _, rows = tucker_topk(first_TASR, second_TASR, core_MARR, leading_vectors(core_MARR), k)
    _, wanted = exhaustive_topk(tucker_grid(first_TASR, second_TASR, core_MARR).sum(-1), k)
    return recall(rows, wanted)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(1, 20), st.integers(2, 3), st.integers(0, 999))
def test_a_core_of_rank_one_and_positive_scores_are_searched_exactly(side, k, rank, seed):
    left, right = uniform(1, rank, seed=seed), uniform(1, rank, seed=seed + 1)
    core_MARR = (left[..., :, None] * right[..., None, :])[None].double()
    first, second = uniform(4, 1, side, rank, seed=seed + 2).double(), uniform(4, 1, side, rank, seed=seed + 3).double()
    vectors = tuple(vector.double() for vector in leading_vectors(core_MARR))
    scores, _ = tucker_topk(first, second, core_MARR, vectors, min(k, side * side))
    wanted, _ = exhaustive_topk(tucker_grid(first, second, core_MARR).sum(-1), min(k, side * side))
    torch.testing.assert_close(scores.sum(-1), wanted, rtol=1e-5, atol=1e-6)


def test_tucker_recall_by_regime():
    """R13 (UltraMem): near rank one and U(0, 1) cores are safe with positive scores; C = I is not, signed scores never.

    Measured here with S = 128, k = 16: 1.0, 1.0, .54 and .5; routing.md has 1.0, .998, .515 and .49 for sizes unsaid.
    """
    tokens, side = 500, 128
    positive = uniform(tokens, 1, side, 2, seed=1), uniform(tokens, 1, side, 2, seed=2)
    signed = seeded(tokens, 1, side, 2, seed=3), seeded(tokens, 1, side, 2, seed=4)
    ones = torch.ones(1, 1, 2, 2)
    near_one = ones + 0.06 * torch.eye(2)
    assert float(spectral_ratio(near_one)) == pytest.approx(0.03, abs=0.005)
    assert tucker_recall(near_one, *positive) > 0.99
    random = uniform(2, 1, 2, 2, seed=18)
    assert float(spectral_ratio(random)) == pytest.approx(0.15, abs=0.01)
    assert tucker_recall(random, *positive) > 0.99
    assert 0.4 < tucker_recall(torch.eye(2)[None, None], *positive) < 0.65
    assert tucker_recall(ones, *signed) == pytest.approx(0.5, abs=0.06)


def test_a_product_of_two_negatives_is_missed():
    """Why signed scores halve the recall: the best row is (-3, -3), and no side finds -3 among its best."""
    core_MARR, scores = torch.ones(1, 1, 1, 1), torch.tensor([2.0, 1.0, -3.0]).view(1, 1, 3, 1)
    found, rows = tucker_topk(scores, scores, core_MARR, leading_vectors(core_MARR), 1)
    assert (found.item(), rows.item()) == (4.0, 0)
    wanted, best = exhaustive_topk(tucker_grid(scores, scores, core_MARR).sum(-1), 1)
    assert (wanted.item(), best.item()) == (9.0, 8)


def test_scores_of_each_core_are_kept():
    first, second, core_MARR = seeded(3, 2, 5, 2), seeded(3, 2, 5, 2, seed=1), seeded(4, 2, 2, 2, seed=2)
    scores_TAKM, rows_TAK = tucker_topk(first, second, core_MARR, leading_vectors(core_MARR), 6)
    for token, head, slot in ((0, 0, 0), (1, 1, 3), (2, 0, 5)):
        i, j = divmod(int(rows_TAK[token, head, slot]), 5)
        for core in range(4):
            wanted = first[token, head, i] @ core_MARR[core, head] @ second[token, head, j]
            torch.testing.assert_close(scores_TAKM[token, head, slot, core], wanted)
    assert (scores_TAKM.sum(-1).diff(dim=-1) <= 1e-6).all()


def test_the_sign_of_the_vectors_is_that_of_large_scores():
    """The decomposition may return (-u, -v), with which a positive core would be searched for its smallest scores."""
    core_MARR, scores = torch.ones(1, 1, 2, 2), uniform(20, 1, 32, 2)
    left, right = leading_vectors(core_MARR)
    assert (left > 0).all()
    assert (right > 0).all()
    _, rows = tucker_topk(scores, scores, core_MARR, (-left, -right), 8)
    _, wanted = exhaustive_topk(tucker_grid(scores, scores, core_MARR).sum(-1), 8)
    assert recall(rows, wanted) == 0.0


def test_the_sign_does_not_jump_between_steps():
    core_MARR = seeded(1, 3, 4, 4)
    left, right = leading_vectors(core_MARR)
    again_left, again_right = leading_vectors(core_MARR + 1e-3, before=(-left, -right))
    torch.testing.assert_close(again_left, -left, atol=0.02, rtol=0)
    torch.testing.assert_close(again_right, -right, atol=0.02, rtol=0)


# --- UltraMemV2 ------------------------------------------------------------------------------------------------------


def ultramem(heads=2, cores=2, seed=0, **changes):
    sizes = {"side": 6, "key_width": 8, "values": 12, "pre_values": 10, "k": 4}
    return UltraMem.seeded(H, heads=heads, cores=cores, seed=seed, **{**sizes, **changes})


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_gather_is_the_sum_over_every_row(cores):
    layer, x_TH = ultramem(cores=cores), seeded(T, H, seed=1)
    found = layer.search(x_TH)
    torch.testing.assert_close(layer(x_TH), layer.dense(x_TH, found), rtol=1e-4, atol=1e-6)


def test_ultramem_by_hand():
    layer, x_TH = ultramem(heads=1), seeded(3, H, seed=1)
    found = layer.search(x_TH)
    for token in range(3):
        mixed = torch.zeros(12)
        for slot, place in enumerate(found.rows_TAK[token, 0].tolist()):
            row = int(layer.shuffle_E[place])
            gate = torch.nn.functional.gelu((layer.pre_PH @ x_TH[token]) @ layer.table.pre_VP[row])
            for core in range(2):
                chunk = slice(6 * core, 6 * core + 6)
                mixed[chunk] += found.scores_TAKM[token, 0, slot, core] * gate * layer.table.value_VC[row, chunk]
        torch.testing.assert_close(layer(x_TH)[token], layer.out_HC @ mixed, rtol=1e-4, atol=1e-5)


def test_search_is_held_to_the_exhaustive_one():
    search, x_TH = ultramem(heads=1).search, seeded(T, H, seed=1)
    found, wanted = search(x_TH), search.exhaustive(x_TH)
    assert 0.3 < recall(found.rows_TAK, wanted.rows_TAK) < 1.0, "queries and keys are signed here"
    assert (found.scores_TAKM.sum(-1) <= wanted.scores_TAKM.sum(-1) + 1e-5).all()
    everything = ultramem(heads=1, k=36).search
    assert recall(everything(x_TH).rows_TAK, everything.exhaustive(x_TH).rows_TAK) == 1.0


def test_layers_share_one_table():
    first = ultramem(seed=0)
    second = ultramem(seed=0, table=first.table, offset=5)
    x_TH = seeded(T, H, seed=1)
    found = first.search(x_TH)
    assert torch.equal(second.rows(found), (first.rows(found) + 5) % 36)
    assert sum(parameter is first.table.value_VC for parameter in second.parameters()) == 1


def test_routing_counts_rows_of_the_table():
    layer, x_TH = ultramem(), seeded(T, H, seed=1)
    routing, found = layer.routing(x_TH), layer.search(x_TH)
    assert routing.shape == (T, 36)
    torch.testing.assert_close(routing.to_dense().sum(1), found.scores_TAKM.sum((1, 2, 3)))
    assert value(gather_metrics(routing, layer.table.row_values, 4), "gather_bytes_per_token") <= 2 * 4 * 22 * 4


def test_refresh_follows_the_core():
    search = ultramem().search
    with torch.no_grad():
        search.core_MARR.copy_(torch.eye(2).expand_as(search.core_MARR) + 0.5 * seeded(2, 2, 2, 2))
    before = search.left_AR.clone()
    search.refresh()
    wanted, _ = leading_vectors(search.core_MARR)
    assert not torch.allclose(search.left_AR, before)
    torch.testing.assert_close(search.left_AR.abs(), wanted.abs())


def test_gradients_reach_every_parameter():
    layer = ultramem()
    layer(seeded(T, H, seed=1)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_no_tokens_read_no_row():
    layer = ultramem()
    assert layer(torch.zeros(0, H)).shape == (0, H)
    assert layer.routing(torch.zeros(0, H)).shape == (0, 36)
    assert value(gather_metrics(layer.routing(torch.zeros(0, H)), 22, 4), "gather_bytes_per_token") is None


def test_core_penalty_vanishes_at_rank_one():
    assert core_penalty(torch.ones(2, 1, 2, 2)) == pytest.approx(0.0)
    assert core_penalty(torch.eye(2)[None, None]) == pytest.approx(0.85**2)


def test_key_balance_is_two_at_balance_and_larger_elsewhere():
    even_TAS = torch.eye(8)[:, None]
    assert key_balance(even_TAS, even_TAS, 1) == pytest.approx(2.0)
    skewed_TAS = torch.eye(8)[:1].repeat(8, 1)[:, None] * 9
    assert key_balance(skewed_TAS, skewed_TAS, 1) > 10


def test_released_sizes_and_initialisation():
    layer = UltraMem.seeded(16, side=32, key_width=64)
    core_MARR = layer.search.core_MARR
    assert layer.table.row_values == 1024
    assert core_MARR.min() >= 0
    assert core_MARR.max() <= 1
    assert layer.search.query_scale_D[0].item() == pytest.approx(64**-0.4)
    assert layer.shuffle_E.sort().values.tolist() == list(range(1024))


def test_ultramem_sizes_that_do_not_fit_are_refused():
    layer = ultramem()
    with pytest.raises(ValueError, match="5 equal chunks"):
        ultramem(cores=5)
    with pytest.raises(ValueError, match="shuffle a grid of 36 rows, not 7"):
        UltraMem(layer.search, layer.table, layer.pre_PH, layer.out_HC, torch.arange(7))
    with pytest.raises(ValueError, match="query rows"):
        TuckerSearch(seeded(7, H), seeded(1, 2, 6, 8, 2), seeded(2, 1, 2, 2), 4)


def test_losses_and_figures_of_nothing_are_numbers():
    rank_one = torch.ones(1, 2, 1, 1)
    assert float(core_penalty(rank_one)) == 0
    assert not spectral_ratio(rank_one).any()
    assert float(key_balance(torch.zeros(0, 1, 5), torch.zeros(0, 1, 5), 2)) == 0
    assert recall(torch.zeros(0, 1, 3).long(), torch.zeros(0, 1, 3).long()) == 1


def test_a_bank_answers_in_its_own_dtype():
    bank = RankOneBank(seeded(6, 4), seeded(6, 4, seed=1))
    for gate_TE in (torch.zeros(3, 6), torch.eye(3, 6)):
        assert bank(seeded(3, 4, seed=2).double(), Routing.dense(gate_TE)).dtype == torch.float32
