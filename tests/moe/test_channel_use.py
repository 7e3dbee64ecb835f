"""What tokens leave out alone and together: identities of TLS and CLS, unions, and the work that is left."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.channel_use import (
    chunk_sparsity,
    dense_work,
    expert_masks,
    locality,
    needed_work,
    token_sparsity,
    union_density,
)
from moebench.moe.channels import LowRank, SiteRule, Sparsity
from moebench.moe.experts import ExpertStore
from moebench.moe.routing import Routing

H, F, E, T = 12, 8, 3, 32


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def used(tokens, channels, share, seed):
    return torch.rand(tokens, channels, generator=torch.Generator().manual_seed(seed)) < share


def store(sites, gated=True):
    rows = 2 * F if gated else F
    return ExpertStore(rand(E, rows, H), rand(E, H, F, seed=1), ("ffn",) * E, gated=gated, sparsity=Sparsity(sites))


def routing(seed=0, k=2):
    return Routing.topk(rand(T, E, seed=seed).topk(k).indices, torch.ones(T, k), E)


matrices = st.tuples(st.integers(1, 6), st.integers(1, 9), st.floats(0, 1), st.integers(0, 999))


@settings(deadline=None)
@given(matrices)
def test_a_chunk_of_one_token_is_the_token(drawn):
    eights, channels, share, seed = drawn
    used_TI = used(8 * eights, channels, share, seed)
    assert chunk_sparsity(used_TI, 1) == token_sparsity(used_TI)


@settings(deadline=None)
@given(matrices)
def test_what_longer_chunks_leave_out_is_never_more_and_the_union_is_the_limit(drawn):
    eights, channels, share, seed = drawn
    used_TI = used(8 * eights, channels, share, seed)
    found = [chunk_sparsity(used_TI, length) for length in (1, 2, 4, 8)]
    assert all(shorter >= longer - 1e-12 for shorter, longer in itertools.pairwise(found))
    union = 1 - union_density(used_TI)
    assert found[-1] >= union - 1e-12
    assert chunk_sparsity(used_TI, len(used_TI)) == pytest.approx(union)


def test_a_shorter_tail_is_left_out_and_no_whole_chunk_is_no_number():
    used_TI = torch.tensor([[True, False], [False, False], [True, True]])
    assert chunk_sparsity(used_TI, 2) == 0.5
    assert chunk_sparsity(used_TI, 4) is None
    assert token_sparsity(used_TI[:0]) is union_density(used_TI[:0]) is None
    with pytest.raises(ValueError, match="a chunk of 0 tokens is empty"):
        chunk_sparsity(used_TI, 0)


def test_independent_tokens_have_the_power_of_tls():
    used_TI = used(80_000, 4, 0.3, 1)
    assert chunk_sparsity(used_TI, 8) == pytest.approx(token_sparsity(used_TI) ** 8, abs=0.01)


def test_the_layer_is_one_wide_ffn_in_which_other_experts_count_as_left_out():
    made, chosen = store({"hidden": SiteRule(0.2)}), routing()
    metrics = {metric.name: metric.value for metric in locality(made, chosen, rand(T, H, seed=5), length=4)}
    wide = torch.zeros(T, E, F, dtype=torch.bool)
    for token_N, masks, slot in expert_masks(made, chosen, rand(T, H, seed=5)):
        wide[token_N, slot] = masks["hidden"]
    wide = wide.flatten(1)
    assert metrics == {
        "tls_hidden": pytest.approx(token_sparsity(wide)),
        "cls_4_hidden": pytest.approx(chunk_sparsity(wide, 4)),
        "union_density_hidden": pytest.approx(union_density(wide)),
    }
    assert metrics["tls_hidden"] > 1 / 3


def test_experts_without_tokens_leave_out_everything():
    made = store({"input": SiteRule(0.0)})
    chosen = Routing.topk(torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1), E)
    metrics = {metric.name: metric.value for metric in locality(made, chosen, rand(T, H), length=8)}
    assert metrics == {
        "tls_input": pytest.approx(1 - 1 / E),
        "cls_8_input": pytest.approx(1 - 1 / E),
        "union_density_input": pytest.approx(1 / E),
    }


def test_one_token_has_no_chunk_and_a_dense_layer_no_figures():
    chosen = Routing.topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), E)
    metrics = {metric.name: metric.value for metric in locality(store({"input": SiteRule(0.5)}), chosen, rand(1, H))}
    assert metrics["cls_8_input"] is None
    assert locality(store({}), routing(), rand(T, H)) == []


def test_a_neuron_that_its_gate_leaves_out_needs_no_column_of_down():
    made = store({"gate": SiteRule(0.3), "hidden": SiteRule(0.5)})
    for _, masks, _ in expert_masks(made, routing(), rand(T, H, seed=5)):
        assert not (masks["hidden"] & ~masks["gate"]).any()
        assert masks["hidden"].sum() < masks["gate"].sum()


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["input", "gate", "hidden"]), st.floats(0, 2), st.floats(0, 2), st.integers(0, 99))
def test_work_falls_with_the_threshold_and_is_dense_without_one(site, first, second, seed):
    low, high = sorted((first, second))
    x_TH, chosen = rand(T, H, seed=seed), routing(seed)
    whole = dense_work(store({}), chosen)
    assert whole == needed_work(store({}), chosen, x_TH)
    works = [needed_work(store({site: SiteRule(threshold)}), chosen, x_TH) for threshold in (low, high)]
    assert whole.products >= works[0].products >= works[1].products
    assert whole.weights >= works[0].weights >= works[1].weights


def test_a_residual_costs_what_it_reads():
    rank, chosen, x_TH = 2, Routing.topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), E), rand(1, H)
    rule = SiteRule(k=5, residual=LowRank(rand(E, 2 * F, rank), rand(E, rank, H)))
    work = needed_work(store({"input": rule}), chosen, x_TH)
    assert work.products == work.weights == 5 * 2 * F + (H - 5) * rank + rank * 2 * F + F * H
