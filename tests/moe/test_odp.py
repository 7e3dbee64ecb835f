"""Online dynamic pruning: which entries go, which are protected, and what the weights become."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Registry, Selection
from moebench.moe.artefacts import read
from moebench.moe.dynamic_pruning import (
    PruningRule,
    attention_received,
    importance,
    median_ratio,
    protected,
    prune_lowest,
)
from moebench.moe.layer import LayerWeights
from moebench.moe.recipe import Recipe, Stage, prepare_layer
from moebench.moe.router_params.online_pruning import DESCRIPTORS, OnlinePruned
from moebench.moe.routers.online_pruning import build
from moebench.moe.routing import Context, Routing
from moebench.moe.shapes import ModelShape

E, H = 8, 6


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def topk(tokens, k, seed=0):
    weights_TK, indices_TK = (2 * seeded(tokens, E, seed=seed)).softmax(-1).topk(k)
    shuffle_TK = seeded(tokens, k, seed=seed + 1).argsort(-1)
    weights_TK, indices_TK = weights_TK.gather(1, shuffle_TK), indices_TK.gather(1, shuffle_TK)
    return Routing.topk(indices_TK, weights_TK / weights_TK.sum(-1, keepdim=True), E)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 60), st.integers(1, 4), st.floats(0, 1.2), st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.integers(0, 99)
)
def test_pruning_is_what_a_loop_over_tokens_says(tokens, k, beta, protect, seed):
    routing = topk(tokens, k, seed)
    worth_T = seeded(tokens, seed=seed + 5).abs()
    found = prune_lowest(routing, worth_T, PruningRule(beta, protect)).to_dense()
    spared = set(sorted(range(tokens), key=lambda t: -float(worth_T[t]))[: int(protect * tokens + 1e-9)])
    wanted = routing.to_dense().clone()
    for t in range(tokens):
        on = wanted[t].nonzero().flatten()
        low, high = on[wanted[t][on].argmin()], on[wanted[t][on].argmax()]
        if len(on) >= 2 and t not in spared and float(wanted[t][low] / wanted[t][high]) < beta:
            total = wanted[t].sum()
            wanted[t][low] = 0
            wanted[t] *= total / wanted[t].sum()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("tokens", [2, 10, 501])
def test_the_median_prunes_half_of_the_tokens(tokens):
    routing = topk(tokens, 2)
    rule = PruningRule(median_ratio(routing), 0.0)
    after = prune_lowest(routing, torch.ones(tokens), rule)
    assert len(routing.token_N) - len(after.token_N) == tokens // 2
    sums = after.weight_N.new_zeros(tokens).index_add(0, after.token_N, after.weight_N)
    torch.testing.assert_close(sums, torch.ones(tokens))


def test_the_control_prunes_as_many_of_the_lowest_and_spares_the_protected():
    routing, worth_T = topk(300, 2), seeded(300, seed=8).abs()
    ruled = PruningRule(median_ratio(routing), 0.1)
    chance = PruningRule(ruled.beta, 0.1, "random")
    by_ratio = prune_lowest(routing, worth_T, ruled)
    by_chance = prune_lowest(routing, worth_T, chance, rng())
    assert len(by_ratio.token_N) == len(by_chance.token_N)
    assert not torch.equal(by_ratio.k_T, by_chance.k_T)
    assert bool((by_chance.k_T[protected(worth_T, 0.1)] == 2).all())
    best_T = routing.to_dense().argmax(-1)
    assert torch.equal(by_chance.to_dense().argmax(-1), best_T)
    assert torch.equal(by_chance.token_N, prune_lowest(routing, worth_T, chance, rng()).token_N)
    assert not torch.equal(by_chance.token_N, prune_lowest(routing, worth_T, chance, rng(1)).token_N)
    with pytest.raises(ValueError, match="needs rng"):
        prune_lowest(routing, worth_T, chance)


def test_a_rate_prunes_each_token_with_its_probability():
    routing, worth_T = topk(2000, 2), torch.ones(2000)
    for rate in (0.0, 0.3, 1.0):
        found = prune_lowest(routing, worth_T, PruningRule(0.5, 0.0, "random", rate=rate), rng())
        dropped = 4000 - len(found.token_N)
        assert abs(dropped - 2000 * rate) <= 5 * (2000 * rate * (1 - rate)) ** 0.5


def test_protected_are_the_most_important_and_of_equals_the_earlier():
    assert protected(torch.tensor([1.0, 3.0, 2.0, 3.0]), 0.5).tolist() == [False, True, False, True]
    assert protected(torch.ones(4), 0.5).tolist() == [True, True, False, False]
    assert int(protected(torch.arange(200.0), 0.02).sum()) == 4
    assert int(protected(torch.arange(49.0), 0.02).sum()) == 0


def test_attention_received_is_the_column_mean_over_later_queries():
    attn = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.25, 0.25]])
    wanted = [(1 + 0.25 + 0.5) / 3, (0.75 + 0.25) / 2, 0.25]
    assert attention_received(attn[None, None]).tolist() == pytest.approx(wanted)
    two = torch.stack([attn, torch.eye(3)])[None]
    assert attention_received(two).tolist() == pytest.approx(
        [(w + o) / 2 for w, o in zip(wanted, [1 / 3, 0.5, 1], strict=True)]
    )
    x_TH = torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.0, -4.0]])
    assert importance(x_TH, attn[None, None]).tolist() == pytest.approx([3 * wanted[0], 3 * wanted[1], 4 * wanted[2]])
    assert importance(x_TH).tolist() == [3, 3, 4]
    with pytest.raises(ValueError, match="attention is of 3 tokens and the layer reads 2"):
        importance(x_TH[:2], attn[None, None])


def layer(k=2):
    shape = ModelShape(H, 4, E, 1, (0,), Selection("softmax", k, renormalize=True))
    weights = LayerWeights(seeded(E, 8, H), seeded(E, H, 4), router_EH=seeded(E, H, seed=3))
    return weights, shape


def test_the_router_prunes_what_its_own_router_chose():
    weights, shape = layer()
    x_TH = seeded(100, H, seed=4)
    bundle = build(OnlinePruned(beta=0.5, protect=0.0))(weights, shape, 0)
    whole = bundle.router.router(x_TH, Context())
    found = bundle.router(x_TH, Context())
    wanted = prune_lowest(whole, importance(x_TH), PruningRule(0.5, 0.0))
    assert torch.equal(found.to_dense(), wanted.to_dense())
    assert 100 < len(found.token_N) < 200
    assert bundle.kinds == ("ffn",) * E


# --- beta from calibration -------------------------------------------------------------------------------------------


def prepared(tokens=200, seed=0, cache=None, **params):
    """The router of a recipe, and what its layer read in calibration."""
    registry, (weights, shape) = Registry.load(), layer()
    names = {"structure": "none", "routing": "odp", "quantization": "none", "sparsity": "none"}
    members = {kind: registry.get(kind, name) for kind, name in names.items()}
    chosen = {"protect": 0.0, **params}
    recipe = Recipe(**{k: Stage(m, m.params_from(chosen if k == "routing" else {})) for k, m in members.items()})
    x_TH = seeded(tokens, H, seed=100 + seed)
    made = prepare_layer(recipe, weights, shape, x_TH, seed, torch.float32, {"layer": 0}, cache)
    return made.router, x_TH


@settings(deadline=None, max_examples=25)
@given(st.integers(26, 400), st.integers(0, 99))
def test_a_calibrated_beta_prunes_half_of_the_second_experts(tokens, seed):
    """No two of continuous weights have the same ratio, so exactly the lower half of the tokens goes."""
    router, x_TH = prepared(tokens, seed)
    whole = router.router(x_TH, Context())
    assert int((whole.k_T == 2).sum()) == tokens
    pruned = tokens - int((router(x_TH, Context()).k_T == 2).sum())
    assert pruned == tokens // 2
    assert abs(pruned / tokens - 0.5) <= 0.02
    assert router.rule.beta == median_ratio(whole)


def test_beta_is_kept_as_an_artefact_and_found_again(tmp_path, monkeypatch):
    first, _ = prepared(cache=tmp_path)
    (folder,) = (tmp_path / "artefacts").iterdir()
    assert float(read(folder).tensors["beta"]) == first.rule.beta
    monkeypatch.setattr("moebench.moe.dynamic_pruning.median_ratio", lambda routing: pytest.fail("made anew"))
    assert prepared(cache=tmp_path)[0].rule == first.rule


def test_beta_is_that_of_the_calibration_tokens_and_the_same_every_time():
    betas = [prepared(seed=seed)[0].rule.beta for seed in (0, 0, 1)]
    assert betas[0] == betas[1] != betas[2]


def test_a_beta_that_is_given_is_not_calibrated(tmp_path):
    for params in ({"beta": 0.25}, {"by": "random", "rate": 0.5}):
        router, _ = prepared(cache=tmp_path, **params)
        assert router.rule.beta == params.get("beta")
    assert not (tmp_path / "artefacts").exists()


def test_an_unknown_beta_prunes_nothing_unseen():
    weights, shape = layer()
    router = build(OnlinePruned(protect=0.0))(weights, shape, 0).router
    with pytest.raises(ValueError, match="calibrate the router first, or give beta"):
        router(seeded(10, H), Context())


def test_attention_protects_other_tokens_than_the_norm():
    weights, shape = layer()
    x_TH, attn = seeded(100, H, seed=4), seeded(2, 2, 50, 50, seed=6).exp().tril()
    ctx = Context(attn=attn / attn.sum(-1, keepdim=True))
    found = {
        name: build(OnlinePruned(beta=1.1, protect=0.1, importance=name))(weights, shape, 0).router(x_TH, ctx)
        for name in ("attention", "norm")
    }
    spared = {"attention": protected(importance(x_TH, ctx.attn), 0.1), "norm": protected(importance(x_TH), 0.1)}
    for name, routing in found.items():  # every token that is not protected loses one
        assert torch.equal(routing.k_T == 2, spared[name])
    assert not torch.equal(*spared.values())


PROMPT = 24


@pytest.mark.parametrize("name", ["attention", "norm", "random"])
def test_with_a_prompt_its_tokens_alone_are_protected_and_nothing_after_it_is_looked_at(name):
    weights, shape = layer()
    x_TH, attn = seeded(60, H, seed=4), seeded(1, 2, 60, 60, seed=6).exp().tril()
    attn = attn / attn.sum(-1, keepdim=True)
    router = build(OnlinePruned(beta=1.1, protect=0.25, importance=name))(weights, shape, 0).router

    def route(tokens):
        ctx = Context(attn=attn[..., :tokens, :tokens], prompt=PROMPT, rng=rng())
        return router(x_TH[:tokens], ctx)

    whole = route(60)
    spared_T = whole.k_T == 2  # beta above 1 prunes whatever is not protected
    assert int(spared_T.sum()) == PROMPT // 4
    assert not bool(spared_T[PROMPT:].any())
    for tokens in (PROMPT, PROMPT + 1, 59):
        assert torch.equal(route(tokens).to_dense(), whole.to_dense()[:tokens])
    if name == "attention":
        own = importance(x_TH[:PROMPT], attn[..., :PROMPT, :PROMPT])
        assert torch.equal(spared_T[:PROMPT], protected(own, 0.25))


def test_protection_by_chance_needs_a_generator():
    weights, shape = layer()
    router = build(OnlinePruned(beta=0.5, protect=0.1, importance="random"))(weights, shape, 0).router
    assert "rng" in router.needs
    with pytest.raises(ValueError, match="needs rng"):
        router(seeded(20, H), Context())


@pytest.mark.parametrize(
    ("params", "needs", "causal"),
    [
        (OnlinePruned(), {"attn"}, False),
        (OnlinePruned(importance="norm"), set(), False),
        (OnlinePruned(protect=0.0), set(), True),
        (OnlinePruned(protect=0.0, by="random"), {"rng"}, False),
        (OnlinePruned(protect=0.0, by="random", rate=0.5), {"rng"}, True),
    ],
)
def test_what_the_router_reads_and_whether_it_is_causal(params, needs, causal):
    weights, shape = layer()
    router = build(params)(weights, shape, 0).router
    assert (set(router.needs), router.causal, params.causal) == (needs, causal, causal)
    assert params.beyond_text == ("attn" if "attn" in needs else None)
    if causal:
        x_TH = seeded(40, H, seed=4)
        router.adopt(router.calibration(x_TH, Context()))
        whole, part = (router(rows, Context(rng=rng())).to_dense() for rows in (x_TH, x_TH[:25]))
        assert torch.equal(whole[:25], part)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="wants top-2 or more"):
        median_ratio(topk(5, 1))
    with pytest.raises(ValueError, match="both signs"):
        prune_lowest(topk(5, 2).scaled(-1.0), torch.ones(5), PruningRule(0.5))
    with pytest.raises(ValueError, match="protect=2"):
        PruningRule(0.5, 2)
    for kind in (OnlinePruned, lambda **told: PruningRule(**{"beta": None, **told})):
        for told in ({"rate": -3}, {"rate": 1.5, "by": "random"}, {"rate": float("nan")}):
            with pytest.raises(ValueError, match=r"rate=.* must lie in \[0, 1\]"):
                kind(**told)
        for beta in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"beta={beta} must be a finite number"):
                kind(beta=beta)
    with pytest.raises(ValueError, match="needs attn in the Context"):
        build(OnlinePruned(beta=0.5))(*layer(), 0).router(seeded(20, H), Context())
    with pytest.raises(ValueError, match="prune a routing of k=2 or more"):
        OnlinePruned(k=1).kinds(layer()[1])
    assert OnlinePruned().max_k(layer(3)[1]) == 3
    assert OnlinePruned().selection(layer()[1]) is None
    assert DESCRIPTORS[0].params is OnlinePruned
