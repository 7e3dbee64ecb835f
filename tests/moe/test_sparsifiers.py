"""The family of channel sparsifiers, random channels and weight masks: exact properties of every registered method."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Registry
from moebench.moe.channels import SiteRule, Sparsity
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import routed_sum
from moebench.moe.routing import Routing
from moebench.moe.sparsifiers.baselines import Magnitude, RandomChannels, Wanda
from moebench.moe.sparsifiers.channel import (
    ChannelSparsifier,
    calibrated,
    column_norms,
    low_rank_parts,
    singular_basis,
    spare_rank,
    sparsifiers,
    up_means,
)
from moebench.moe.sparsifiers.cost import sparsity_metrics, theoretical_cost
from moebench.moe.sparsifiers.params import Cats, Chess, RSparse, Teal, Wina
from moebench.moe.sparsifiers.search import greedy_levels, last_part, output_error, searched_alphas
from moebench.moe.sparsifiers.steps import channels, masked_weights, random_channels
from moebench.moe.sparsity import density, site_activations

E, H, F, T = 3, 16, 12, 80
REGISTRY = Registry.load()
METHODS = [name for name in REGISTRY.names("sparsity") if name != "none"]
VARIANTS = [
    *((name, {}) for name in METHODS),
    ("teal", {"rule": "topk"}),
    ("teal", {"allocation": "greedy"}),
    ("teal", {"rotated": True}),
    ("wina", {"preset": "official"}),
    ("wina", {"preset": "transform"}),
    ("wina", {"rule": "threshold", "allocation": "greedy"}),
    ("rsparse", {"search": True, "alphas": (0.8, 1.0)}),
]
COUNTED = [
    *(("wina", {"preset": preset}) for preset in ("paper", "official", "transform")),
    ("teal", {"rule": "topk"}),
    ("teal", {"rule": "topk", "rotated": True}),
    ("random_channels", {}),
]
"""What keeps a number of channels of every token, whatever the calibration."""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_store(experts=E):
    return ExpertStore(randn(experts, 2 * F, H, seed=1), randn(experts, H, F, seed=2), ("ffn",) * experts)


def make_routing(experts=E, k=2, seed=3):
    weights, indices = randn(T, experts, seed=seed).softmax(-1).topk(k)
    return Routing.topk(indices, weights, experts)


def made(name, params, level, store=None, routing=None, x_TH=None):
    step = REGISTRY.get("sparsity", name).create({"level": level, **params})
    x_TH = randn(T, H) if x_TH is None else x_TH
    return step(store or make_store(), routing or make_routing(), x_TH, seed=5)


@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_level_zero_is_the_store_itself_and_asks_nothing_of_a_backend(name, params):
    store, routing, x_TH = make_store(), make_routing(), randn(T, H)
    sparse = made(name, params, 0.0, store, routing, x_TH)
    assert sparse is store
    assert REGISTRY.get("sparsity", name).params_from({"level": 0.0, **params}).spec() is None
    assert torch.equal(routed_sum(sparse, x_TH, routing), routed_sum(make_store(), x_TH, routing))


@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_the_store_and_its_weights_stay_as_they_were(name, params):
    store, x_TH = make_store(), randn(T, H)
    before = [store.gate_up.clone(), store.down.clone(), x_TH.clone()]
    sparse = made(name, params, 0.6, store, x_TH=x_TH)
    assert store.sparsity is None
    assert all(torch.equal(a, b) for a, b in zip(before, (store.gate_up, store.down, x_TH), strict=True))
    if sparse.sparsity.weights is None:
        assert sparse.gate_up is store.gate_up
        assert sparse.down is store.down


@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_what_is_kept_is_what_the_level_leaves(name, params):
    """In weights, to within one channel and what bfloat16 makes of thresholds."""
    store, routing, x_TH, level = make_store(), make_routing(), randn(T, H), 0.5
    sparse = made(name, params, level, store, routing, x_TH)
    kept = theoretical_cost(sparse, routing, x_TH)
    share = kept.kept_flops / kept.dense_flops
    expected = (1 + 2 * (1 - level)) / 3 if name in ("cats", "chess") else 1 - level
    assert abs(share - expected) <= 1 / F + 0.02


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(COUNTED), st.floats(0.001, 0.98), st.integers(2, 20), st.integers(2, 20), st.integers(0, 99))
def test_a_number_of_channels_is_within_one_of_the_level_at_every_site(method, level, hidden, width, seed):
    """The density achieved is floor(I (1 - level)) / I, at any level, width and tokens."""
    weights = randn(2, 2 * width, hidden, seed=seed), randn(2, hidden, width, seed=seed + 1)
    store, routing = ExpertStore(*weights, ("ffn",) * 2), make_routing(2, 1, seed)
    sparse = made(*method, level, store, routing, randn(T, hidden, seed=seed))
    found = {metric.name: metric.value for metric in density(sparse, routing, randn(T, hidden, seed=seed + 2))}
    for site, channels_there in (("input", hidden), ("hidden", width)):
        kept = math.floor(channels_there * (1 - level) + 1e-9)
        assert found[f"density_{site}"] == pytest.approx(kept / channels_there, abs=1e-12)
        assert 0 <= (1 - level) + 1e-9 - kept / channels_there < 1 / channels_there + 1e-9


@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_cost_falls_with_the_level_and_error_is_there(name, params):
    store, routing, x_TH = make_store(), make_routing(), randn(T, H)
    dense_TH = routed_sum(store, x_TH, routing)
    costs = []
    for level in (0.0, 0.2, 0.4, 0.6, 0.8):
        sparse = made(name, params, level, store, routing, x_TH)
        costs.append(theoretical_cost(sparse, routing, x_TH))
        assert (output_error(sparse, routing, x_TH, dense_TH) > 0) == (level > 0)
    assert costs[0].kept_flops == costs[0].dense_flops
    assert costs[0].kept_bytes == costs[0].dense_bytes == 4 * 3 * H * F
    for earlier, later in itertools.pairwise(costs):
        assert later.kept_flops < earlier.kept_flops
        assert later.kept_bytes < earlier.kept_bytes
        assert later.dense_flops == earlier.dense_flops == 2 * 3 * H * F


def test_fixed_channels_do_not_look_at_tokens():
    plan = made("random_channels", {}, 0.5).sparsity
    other = made("random_channels", {}, 0.5, routing=make_routing(seed=9), x_TH=7 * randn(T, H, seed=8)).sparsity
    for site, rule in plan.sites.items():
        assert torch.equal(rule.kept, other.sites[site].kept)
        width = len(rule.kept)
        a, b = randn(5, width), randn(5, width, seed=1)
        assert torch.equal(rule.mask(a), rule.mask(b))
        assert torch.equal(rule.mask(torch.zeros(2, width)), rule.mask(torch.full((2, width), 1e9)))
    again = random_channels(RandomChannels(0.5))(make_store(), make_routing(), randn(T, H), seed=6).sparsity
    assert not torch.equal(plan.sites["input"].kept, again.sites["input"].kept)
    assert not torch.equal(plan.sites["input"].kept[:F], plan.sites["hidden"].kept)


def test_masks_by_magnitude_do_not_look_at_tokens_and_wandas_do():
    others = {"routing": make_routing(seed=9), "x_TH": randn(T, H, seed=8) * torch.linspace(0.1, 3, H)}
    for name, alike in (("magnitude", True), ("wanda", False)):
        first, second = made(name, {}, 0.5).sparsity.weights, made(name, {}, 0.5, **others).sparsity.weights
        assert torch.equal(first.gate_up, second.gate_up) == alike
        assert torch.equal(first.down, second.down) == alike


@pytest.mark.parametrize("name", ["teal", "wina", "cats", "chess", "rsparse"])
def test_the_family_does_look_at_tokens(name):
    for rule in made(name, {}, 0.5).sparsity.sites.values():
        width = H if rule.weight is None or rule.weight.shape[-1] == H else F
        assert not torch.equal(rule.mask(randn(9, H)[:, :width], 0), rule.mask(randn(9, H, seed=1)[:, :width], 0))


# --- theorems --------------------------------------------------------------------------------------------------------


def best_subset(weight_OI, x_I, kept):
    """Return the channels whose use leaves the least error ||W x - W x'||, by trying all."""
    width = len(x_I)
    masks = torch.zeros(math.comb(width, kept), width, dtype=torch.float64)
    for row, subset in enumerate(itertools.combinations(range(width), kept)):
        masks[row, list(subset)] = 1.0
    errors = ((x_I - masks * x_I) @ weight_OI.T).norm(dim=1)
    return masks[errors.argmin()].bool()


def test_wina_is_optimal_where_columns_are_orthogonal_and_teal_is_not():
    wins = {"wina": 0, "teal": 0}
    for trial in range(200):
        rng = torch.Generator().manual_seed(trial)
        orthogonal = torch.linalg.qr(torch.randn(14, 10, generator=rng, dtype=torch.float64)).Q
        weight_OI = orthogonal * torch.rand(10, generator=rng, dtype=torch.float64).add(0.1)
        x_I = torch.randn(10, generator=rng, dtype=torch.float64)
        best = best_subset(weight_OI, x_I, 5)
        norms = weight_OI.norm(dim=0)
        wins["wina"] += bool(torch.equal(SiteRule(k=5, weight=norms).mask(x_I), best))
        wins["teal"] += bool(torch.equal(SiteRule(k=5).mask(x_I), best))
    assert wins["wina"] == 200
    assert wins["teal"] < 150


def test_the_rotation_makes_columns_orthogonal_and_keeps_the_product():
    store = make_store()
    basis_HH = singular_basis(store).double()
    assert torch.allclose(basis_HH @ basis_HH.T, torch.eye(H, dtype=torch.float64), atol=1e-6)
    turned = store.gate_up.flatten(0, 1).double() @ basis_HH
    gram = turned.T @ turned
    off = gram - torch.diag(gram.diagonal())
    assert off.abs().max() < 1e-5 * gram.diagonal().max()
    everything = SiteRule(k=H, basis_II=basis_HH.float())
    x_TH = randn(T, H)
    assert torch.allclose(everything.apply(x_TH), x_TH, atol=1e-5)


def test_rsparse_scale_is_the_column_norm_and_alpha_one_is_winas_mask():
    store, routing, x_TH = make_store(), make_routing(), randn(T, H)
    for site, matrices in (("input", store.gate_up), ("hidden", store.down)):
        for slot, norm_I in enumerate(column_norms(store, site)):
            _, values, right = torch.linalg.svd(matrices[slot].double(), full_matrices=False)
            scale_I = (right.T * values).norm(dim=1)
            assert torch.allclose(norm_I.double(), scale_I, rtol=1e-5)
    one = channels(RSparse(0.5, alpha=1.0))(store, routing, x_TH).sparsity
    wina = channels(Wina(0.5, rule="threshold"))(store, routing, x_TH).sparsity
    assert one.sites.keys() == wina.sites.keys()
    for site, rule in one.sites.items():
        other = wina.sites[site]
        assert rule.residual is None
        assert rule.threshold == other.threshold
        assert torch.equal(rule.weight, other.weight)


def test_rsparse_of_full_rank_is_dense_and_its_budget_holds():
    store, routing, x_TH = make_store(), make_routing(), randn(T, H)
    residuals = {site: low_rank_parts(store, site, rank) for site, rank in (("input", H), ("hidden", F))}
    rules = {site: SiteRule(1.5, residual=residual) for site, residual in residuals.items()}
    full = replace(store, sparsity=Sparsity(rules))
    dense_TH = routed_sum(store, x_TH, routing)
    assert torch.allclose(routed_sum(full, x_TH, routing), dense_TH, atol=1e-4)
    bare = replace(store, sparsity=Sparsity({site: SiteRule(1.5) for site in rules}))
    assert output_error(bare, routing, x_TH, dense_TH) > 0.1 * dense_TH.norm()
    for level, alpha in itertools.product((0.3, 0.5, 0.7), (0.8, 0.9, 0.95)):
        rank = spare_rank(1000, 600, level, alpha)
        spent = math.floor(600 * (1 - level) * alpha) * 1000 + rank * 1600
        assert 0 <= 600_000 * (1 - level) - spent < 1600
    assert spare_rank(1000, 600, 0.5, 1.0) == 0


def test_a_low_rank_part_is_the_best_approximation():
    store = make_store(1)
    for site, weight in (("input", store.gate_up[0]), ("hidden", store.down[0])):
        part = low_rank_parts(store, site, 4)
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        best = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
        assert torch.allclose((part.left_FOR[0] @ part.right_FRI[0]).double(), best, atol=1e-4)


@pytest.mark.parametrize("name", ["cats", "chess"])
def test_cats_and_chess_are_the_masked_dense_formula(name):
    store, routing, x_TH = make_store(), make_routing(), randn(T, H)
    sparse = made(name, {}, 0.5, store, routing, x_TH)
    expected_TH = torch.zeros(T, H)
    for token, expert, weight in zip(routing.token_N, routing.expert_N, routing.weight_N, strict=True):
        gate_FH, up_FH = store.gate_up[expert].chunk(2)
        gate_F = nnf.silu(gate_FH @ x_TH[token])
        mean_F = 1.0
        if name == "chess":
            mine = routing.token_N[routing.expert_N == expert]
            mean_F = (x_TH[mine] @ up_FH.T).abs().mean(0).bfloat16().float()
        kept_F = (gate_F.abs() * mean_F) > sparse.sparsity.sites["gate"].threshold
        expected_TH[token] += weight * (store.down[expert] @ (kept_F * gate_F * (up_FH @ x_TH[token])))
    assert torch.allclose(routed_sum(sparse, x_TH, routing), expected_TH, atol=1e-4)
    metric = {metric.name: metric.value for metric in density(sparse, routing, x_TH)}
    assert metric["density_gate"] == pytest.approx(0.5, abs=0.01)


def test_up_means_are_each_experts_own():
    store, x_TH = make_store(), randn(T, H)
    routing = Routing.topk(torch.arange(T)[:, None] % 2, torch.ones(T, 1), E)
    means_NF = up_means(store, routing, x_TH)
    for expert in (0, 1):
        up_FH = store.gate_up[expert].chunk(2)[1]
        assert torch.allclose(means_NF[expert], (x_TH[expert::2] @ up_FH.T).abs().mean(0), atol=1e-5)
    assert torch.allclose(means_NF[2], means_NF[:2].mean(0))


# --- choices made on calibration -------------------------------------------------------------------------------------


def test_greedy_levels_add_up_and_are_no_worse_on_what_they_are_judged_on():
    store, routing, x_TH = make_store(), make_routing(), randn(T, H)
    store = replace(store, down=store.down * torch.tensor([10.0, *[0.1] * (F - 1)]))  # most of hidden matters little
    family = [ChannelSparsifier("input"), ChannelSparsifier("hidden")]
    levels = greedy_levels(family, store, routing, x_TH, 0.4, 0.1)
    assert (2 * levels["input"] + levels["hidden"]) / 3 == pytest.approx(0.4)
    dense_TH = routed_sum(store, x_TH, routing)
    errors = [
        output_error(channels(Teal(0.4, allocation=how, step=0.1))(store, routing, x_TH), routing, x_TH, dense_TH)
        for how in ("greedy", "uniform")
    ]
    assert errors[0] <= errors[1]


def test_a_search_over_alphas_takes_the_best_of_all_pairs():
    store, routing, x_TH = make_store(1), make_routing(1, 1), randn(T, H)
    store = replace(store, down=store.down + 9 * (randn(H, 1, seed=7) @ randn(1, F, seed=8))[None])
    params = RSparse(0.5, search=True, alphas=(0.5, 0.8, 1.0))
    late, late_TH = last_part(routing, x_TH)
    dense_TH = routed_sum(store, late_TH, late)
    errors = {}
    for pair in itertools.product(params.alphas, repeat=2):
        family = sparsifiers(params, dict(zip(("input", "hidden"), pair, strict=True)))
        sparse = calibrated(family, store, late, late_TH, {"input": 0.5, "hidden": 0.5})
        errors[pair] = output_error(sparse, late, late_TH, dense_TH)
    assert len(set(errors.values())) == 9
    assert tuple(searched_alphas(params, store, routing, x_TH).values()) == min(errors, key=errors.get)
    assert torch.equal(late_TH, x_TH[3 * T // 4 :])


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weight_masks_keep_the_largest_of_every_row():
    store, routing, x_TH = make_store(), make_routing(), randn(T, H)
    for params in (Magnitude(0.5), Wanda(0.5)):
        sparse = masked_weights(params)(store, routing, x_TH)
        masks = sparse.sparsity.weights
        for name in ("gate_up", "down"):
            dense, pruned, kept = (getattr(part, name) for part in (store, sparse, masks))
            assert (kept.sum(-1) == kept.shape[-1] - kept.shape[-1] // 2).all()
            assert torch.equal(pruned, torch.where(kept, dense, torch.zeros_like(dense)))
        if isinstance(params, Magnitude) and not isinstance(params, Wanda):
            least = store.gate_up.abs().masked_fill(~masks.gate_up, torch.inf).amin(-1)
            assert (store.gate_up.abs().masked_fill(masks.gate_up, 0.0).amax(-1) <= least).all()


def test_wanda_weighs_by_what_each_expert_reads():
    store = make_store(1)
    x_TH = randn(T, H) * torch.linspace(0.01, 2.0, H)
    routing = Routing.topk(torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1), 1)
    masks = masked_weights(Wanda(0.5))(store, routing, x_TH).sparsity.weights
    assert masks.gate_up[0, :, : H // 4].float().mean() < 0.1
    hidden = next(site_activations(store, routing, x_TH, "hidden"))[0]
    score = store.down[0].abs() * hidden.norm(dim=0)
    assert torch.equal(masks.down[0], score > score.median(dim=1, keepdim=True).values)
    dense_TH = routed_sum(store, x_TH, routing)
    wanda, magnitude = (masked_weights(params(0.5))(store, routing, x_TH) for params in (Wanda, Magnitude))
    assert output_error(wanda, routing, x_TH, dense_TH) < output_error(magnitude, routing, x_TH, dense_TH)


# --- contract --------------------------------------------------------------------------------------------------------


def test_rules_refuse_what_makes_no_sense():
    with pytest.raises(Exception, match="one rule"):
        SiteRule()
    with pytest.raises(Exception, match="one rule"):
        SiteRule(0.1, k=3)
    with pytest.raises(Exception, match="fixed"):
        SiteRule(kept=torch.ones(3, dtype=torch.bool), weight=torch.ones(3))
    with pytest.raises(Exception, match="unknown site"):
        Sparsity({"inputs": SiteRule(0.1)})
    with pytest.raises(Exception, match="whose activations"):
        SiteRule(0.1, weight=torch.ones(2, 3)).mask(torch.ones(1, 3))
    with pytest.raises(ValueError, match="level"):
        Cats(1.0)
    with pytest.raises(ValueError, match="dense_prefix"):
        Chess(dense_prefix=2.0)
    with pytest.raises(ValueError, match="sites"):
        Teal(0.5, ("gate",))


def test_top_k_takes_the_first_of_equal_scores_and_exactly_k():
    ties = torch.tensor([[1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert SiteRule(k=2).mask(ties).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert SiteRule(k=0).mask(ties).sum() == 0


def test_bfloat16_and_float32_decide_alike():
    rule = SiteRule(0.5, weight=torch.rand(2, 40).bfloat16().float())
    for k_rule in (rule, SiteRule(k=7, weight=rule.weight)):
        x = randn(30, 40).bfloat16()
        assert torch.equal(k_rule.mask(x, 1), k_rule.mask(x.float(), 1))
        assert torch.equal(k_rule.mask(x, 1), k_rule.mask(x.double(), 1))


def test_metrics_of_a_dense_store_are_ones():
    metrics = {metric.name: metric.value for metric in sparsity_metrics(make_store(), make_routing(), randn(T, H))}
    assert set(metrics.values()) == {1.0}
    assert set(metrics) == {"density_input", "density_gate", "density_hidden", "kept_flops", "kept_bytes"}
