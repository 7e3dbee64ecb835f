"""TEAL: thresholds are quantiles, level 0 is the dense layer bit for bit, and what is asked for is what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.channels import SiteRule, Sparsity
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import PreparedLayer, ffn_hidden, moe_forward
from moebench.moe.plugins import Int8, NoSparsity
from moebench.moe.quantization import coded
from moebench.moe.routing import Routing
from moebench.moe.sparsifiers.params import Teal
from moebench.moe.sparsifiers.steps import channels as teal
from moebench.moe.sparsity import density, keep, quantile, site_activations

H, F, T = 16, 8, 60
KINDS = ("ffn", "zero", "ffn", "ffn")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_store(activation="silu"):
    return ExpertStore(randn(3, 2 * F, H, seed=1), randn(3, H, F, seed=2), KINDS, activation=activation)


def make_routing(seed=3, k=2):
    probs = randn(T, 4, seed=seed).softmax(-1)
    weights, indices = probs.topk(k)
    return Routing.topk(indices, weights, 4)


def forward(store, routing, x):
    return moe_forward(PreparedLayer(store, None), x, routing=routing)


def densities(store, routing, x):
    return {metric.name: metric.value for metric in density(store, routing, x)}


def test_level_zero_is_the_store_itself():
    store, routing, x = make_store(), make_routing(), randn(T, H)
    sparse = teal(Teal(0.0))(store, routing, x)
    assert sparse is store
    assert torch.equal(forward(sparse, routing, x), forward(store, routing, x))
    assert keep(NoSparsity())(store, routing, x) is store


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60), st.floats(0, 0.99))
def test_threshold_leaves_out_the_level_and_no_more_than_bfloat16_makes_it(values, level):
    activation = torch.tensor(values)
    threshold = quantile([activation[:7], activation[7:]], level)
    rank = int(level * len(values))
    if rank == 0:
        assert threshold is None
        return
    exact = sorted(abs(v) for v in activation.tolist())[rank - 1]
    assert torch.tensor(threshold).bfloat16().item() == threshold
    assert exact <= threshold <= exact * (1 + 2.0**-7) + 1e-38
    assert (activation.abs() <= threshold).sum() >= rank
    assert torch.equal(activation.bfloat16().abs() > threshold, activation.bfloat16().double().abs() > threshold)


@pytest.mark.parametrize("level", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("sites", [("input",), ("hidden",), ("input", "hidden"), ("hidden", "input")])
def test_achieved_density_is_what_was_asked_for(level, sites):
    store, routing, x = make_store(), make_routing(), randn(T, H)
    sparse = teal(Teal(level, sites))(store, routing, x)
    assert set(sparse.sparsity.sites) == set(sites)
    for site in ("input", "gate", "hidden"):
        achieved = densities(sparse, routing, x)[f"density_{site}"]
        if site in sites:
            assert 1 - level - 0.02 <= achieved <= 1 - level + 1 / (T * F)
        else:
            assert achieved == 1.0


def test_density_counts_what_the_experts_really_read():
    store, routing, x = make_store(), make_routing(), randn(T, H)
    sparse = teal(Teal(0.5))(store, routing, x)
    threshold = {site: rule.threshold for site, rule in sparse.sparsity.sites.items()}
    kept = {"input": [], "hidden": []}
    for token, expert in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True):
        if KINDS[expert] == "ffn":
            slot = KINDS[:expert].count("ffn")
            masked = torch.where(x[token].abs() > threshold["input"], x[token], 0.0)
            hidden = ffn_hidden(masked[None], store.gate_up[slot], "silu")[0]
            kept["input"].append((x[token].abs() > threshold["input"]).float())
            kept["hidden"].append((hidden.abs() > threshold["hidden"]).float())
    metrics = density(sparse, routing, x)
    assert [metric.name for metric in metrics] == ["density_input", "density_gate", "density_hidden"]
    assert metrics[1].value == 1.0
    for metric in (metrics[0], metrics[2]):
        used = torch.stack(kept[metric.name.removeprefix("density_")])
        assert metric.n == used.numel()
        assert metric.value == pytest.approx(used.mean().item(), abs=1e-3)


def test_input_site_counts_a_token_once_per_ffn_expert():
    store, x = make_store(), randn(T, H)
    routing = Routing.topk(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), 4)
    sites = list(site_activations(store, routing, x[:2], "input"))
    assert torch.equal(torch.cat([part for part, _ in sites]), x[[0, 1, 1]])
    assert [slot for _, slot in sites] == [0, 1, 2]


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 0.98), st.floats(0, 0.98), st.integers(0, 50))
def test_density_never_rises_with_the_level(a, b, seed):
    store, routing, x = make_store(), make_routing(seed), randn(T, H, seed=seed)
    low, high = (teal(Teal(level, ("input",)))(store, routing, x) for level in sorted((a, b)))
    assert densities(high, routing, x)["density_input"] <= densities(low, routing, x)["density_input"]


def test_error_grows_with_the_level_and_random_masks_are_worse():
    store, routing, x = make_store(), make_routing(), randn(T, H)
    dense = forward(store, routing, x)
    errors = []
    for level in (0.0, 0.25, 0.5, 0.75, 0.95):
        sparse = teal(Teal(level, ("input",)))(store, routing, x)
        errors.append((forward(sparse, routing, x) - dense).norm())
    assert errors[0] == 0
    assert errors == sorted(errors)
    shuffled = torch.where(torch.rand(T, H, generator=torch.Generator().manual_seed(0)) > 0.5, x, 0.0)
    assert (forward(store, routing, shuffled) - dense).norm() > 1.5 * errors[2]


def test_hidden_is_calibrated_behind_the_sparse_input():
    store, routing, x = make_store(), make_routing(), randn(T, H)
    both = teal(Teal(0.6))(store, routing, x).sparsity.sites["hidden"].threshold
    alone = teal(Teal(0.6, ("hidden",)))(store, routing, x).sparsity.sites["hidden"].threshold
    assert both < alone


def test_quantized_experts_are_calibrated_on_their_dequantized_weights():
    store, routing, x = coded(Int8())(make_store(), None), make_routing(), randn(T, H)
    gate_up, down = store.dense()
    dense = ExpertStore(gate_up, down, KINDS)
    assert teal(Teal(0.5))(store, routing, x).sparsity == teal(Teal(0.5))(dense, routing, x).sparsity


def test_without_ffn_assignments_there_is_nothing_to_calibrate_or_count():
    store, x = make_store(), randn(T, H)
    routing = Routing.topk(torch.ones(T, 1, dtype=torch.long), torch.ones(T, 1), 4)
    assert teal(Teal(0.5))(store, routing, x) is store
    assert [(m.name, m.value, m.n) for m in density(store, routing, x)] == [
        ("density_input", None, 0),
        ("density_gate", None, 0),
        ("density_hidden", None, 0),
    ]


def test_a_dense_store_uses_everything_even_zeros():
    store, routing = make_store("relu"), make_routing()
    assert densities(store, routing, torch.zeros(T, H)) == {
        "density_input": 1.0,
        "density_gate": 1.0,
        "density_hidden": 1.0,
    }
    none_kept = ExpertStore(store.gate_up, store.down, KINDS, sparsity=Sparsity({"input": SiteRule(0.0)}))
    assert densities(none_kept, routing, torch.zeros(T, H))["density_input"] == 0.0
