"""Experts of kind gather and sequence on the backends that declare them, against the float64 oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.backends import reference as reference_backend
from moebench.contracts import Refusal, Scheme
from moebench.moe.experts import ExpertStore
from moebench.moe.oracle import compare, reference
from moebench.moe.oracle_gradients import Gradients, compare_gradients, reference_gradients

ARCHETYPES = ("dynamic_k", "empty", "hot", "signed", "dropped")
GATHERING, ATTENDING = ("reference", "batched"), ("reference",)
OTHERS = ("eager", "grouped", "compiled")
HEADS = 4

relaxed = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
cases = given(
    archetype=st.sampled_from(ARCHETYPES),
    count=st.sampled_from([0, 1, 3, 17]),
    boundary=st.sampled_from(["topk", "sorted"]),
    seed=st.integers(0, 2**20),
)


def neurons(lab, seed=0, dtype=torch.float32, gated=True, kinds=None, **changes):
    """Rank-1 experts, with those of other kinds that ``kinds`` names."""
    kinds = kinds or ("gather",) * 6
    count = sum(kind in ("ffn", "gather") for kind in kinds)
    generator = torch.Generator().manual_seed(seed)
    hidden = lab.store().hidden
    gate_up = (torch.randn(count, 2 if gated else 1, hidden, generator=generator) / hidden**0.5).to(dtype)
    return ExpertStore(
        gate_up, torch.randn(count, hidden, 1, generator=generator).to(dtype), kinds, gated=gated, **changes
    )


def attentions(lab, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden, width = lab.store().hidden, 16
    gate_up = (torch.randn(6, 3 * width, hidden, generator=generator) / hidden**0.5).to(dtype)
    down = (torch.randn(6, hidden, width, generator=generator) / width**0.5).to(dtype)
    return ExpertStore(gate_up, down, ("sequence",) * 6, heads=HEADS)


def spec_of(lab, store, dtype=torch.float32, boundary="topk", **changes):
    return lab.spec(store, str(dtype).removeprefix("torch."), boundary, heads=store.heads, **changes)


def check(lab, name, store, dtype, archetype, count, boundary, seed):
    """Run one layer into a buffer of NaN and compare; without a buffer the answer is the same."""
    x_TH, routing = lab.tokens(count, dtype, seed), lab.routing(archetype, count, seed)
    inputs = lab.inputs(routing, boundary)
    executor = lab.executor(name, store, spec_of(lab, store, dtype, boundary))
    out_TH = torch.full_like(x_TH, float("nan"))
    assert executor(x_TH, *inputs, out_TH=out_TH) is out_TH
    verdict = compare(out_TH, reference(store, routing, x_TH), dtype)
    assert verdict.ok, verdict
    assert torch.equal(executor(x_TH, *inputs), out_TH)


# --- gather ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATHERING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@relaxed
@cases
def test_gathered_rows_agree_with_the_oracle(lab, name, dtype, archetype, count, boundary, seed):
    check(lab, name, neurons(lab, seed % 7, dtype, gated=bool(seed % 2)), dtype, archetype, count, boundary, seed)


@pytest.mark.parametrize("name", GATHERING)
def test_cancellation_within_a_unit_is_no_mistake_and_a_wrong_unit_is(lab, name):
    """Some tokens lie across a rank-1 expert's rows, so that next to nothing is left of its dot products."""
    for seed in range(60):
        store, x_TH = neurons(lab, seed), lab.tokens(17, seed=seed)
        routing = lab.routing("hot", 17, seed)
        y_TH = lab.executor(name, store, spec_of(lab, store))(x_TH, *lab.inputs(routing, "topk"))
        expected = reference(store, routing, x_TH)
        assert compare(y_TH, expected, torch.float32).ok
        assert not compare(y_TH * 1.0002, expected, torch.float32).ok
        assert not compare(y_TH.roll(1, 0), expected, torch.float32).ok


@pytest.mark.parametrize("name", GATHERING)
def test_gather_experts_are_ffn_experts(lab, name):
    """The kind says how to read an expert, not what it is."""
    store, x_TH = neurons(lab), lab.tokens(17)
    inputs = lab.inputs(lab.routing("dynamic_k", 17, 0), "topk")
    as_ffn = dataclasses.replace(store, kinds=("ffn",) * 6)
    gathered, looped = (lab.executor(name, s, spec_of(lab, s))(x_TH, *inputs) for s in (store, as_ffn))
    torch.testing.assert_close(gathered, looped, rtol=1e-5, atol=1e-6)


def test_wide_experts_may_be_gathered_too(lab):
    store = dataclasses.replace(lab.store(3), kinds=("gather",) * 6)
    for name in GATHERING:
        check(lab, name, store, torch.float32, "signed", 17, "topk", 4)


def test_reference_gathers_among_experts_of_other_kinds(lab):
    store = neurons(lab, kinds=("gather", "copy", "gather", "zero", "ffn", "gather"))
    check(lab, "reference", store, torch.float32, "dynamic_k", 17, "sorted", 4)


@pytest.mark.parametrize("name", GATHERING)
def test_gather_with_sparsity_and_with_codes(lab, name):
    thin = neurons(lab, sparsity=dataclasses.replace(lab.sparsity(0.3)))
    coded = dataclasses.replace(lab.store(3, scheme=Scheme("rtn", 8.0)), kinds=("gather",) * 6)
    for store in (thin, coded):
        check(lab, name, store, torch.float32, "dynamic_k", 17, "topk", 4)


def test_reference_gathers_a_few_rows_at_a_time(lab, monkeypatch):
    store, x_TH = neurons(lab), lab.tokens(17)
    inputs = lab.inputs(lab.routing("dynamic_k", 17, 0), "topk")
    whole = lab.executor("reference", store, spec_of(lab, store))
    monkeypatch.setattr(reference_backend, "GATHER_BYTES", 7 * store.nbytes // 6)
    sevens = lab.executor("reference", store, spec_of(lab, store))
    assert (whole.gathered.rows > 17 * 6, sevens.gathered.rows) == (True, 7)
    torch.testing.assert_close(sevens(x_TH, *inputs), whole(x_TH, *inputs), rtol=1e-6, atol=1e-6)


def test_reference_gathers_from_many_without_a_view_of_each(lab):
    store = neurons(lab, kinds=("gather",) * 20_000)
    executor = lab.executor("reference", store, spec_of(lab, store, max_k=16))
    indices_TK = torch.randint(20_000, (9, 16), generator=torch.Generator().manual_seed(1))
    indices_TK[0] = store.num_experts
    executor(lab.tokens(9), indices_TK, torch.rand(9, 16))
    assert "views" not in vars(executor.weights)
    assert executor.in_turn == []


def test_gradients_go_through_a_gather(lab):
    store, x_TH = neurons(lab), lab.tokens(17).requires_grad_()
    routing, grad_TH = lab.routing("dynamic_k", 17, 0), lab.tokens(17, seed=9)
    leaves = dataclasses.replace(store, gate_up=store.gate_up.requires_grad_(), down=store.down.requires_grad_())
    executor = lab.executor("reference", leaves, spec_of(lab, leaves, backward=True))
    y_TH = executor(x_TH, *lab.inputs(routing, "topk"))
    gradients = Gradients(*torch.autograd.grad(y_TH, (x_TH, leaves.gate_up, leaves.down), grad_TH))
    verdict = compare_gradients(gradients, reference_gradients(store, routing, x_TH, grad_TH), torch.float32)
    assert verdict.ok, verdict


# --- sequence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@relaxed
@cases
def test_attentions_agree_with_the_oracle(lab, name, dtype, archetype, count, boundary, seed):
    """An expert reads the whole sequence and answers the tokens that the routing gives to it."""
    check(lab, name, attentions(lab, seed % 7, dtype), dtype, archetype, count, boundary, seed)


@pytest.mark.parametrize("name", ATTENDING)
def test_attentions_in_codes(lab, name):
    from moebench.moe.codecs.rtn import round_to_nearest

    plain = attentions(lab)
    weights = [[round_to_nearest(w, Scheme("rtn", 8.0)) for w in part] for part in (plain.gate_up, plain.down)]
    store = ExpertStore(*weights, plain.kinds, heads=HEADS)
    check(lab, name, store, torch.float32, "dynamic_k", 17, "topk", 4)


# --- mistakes and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make"), [*((name, neurons) for name in GATHERING), *((name, attentions) for name in ATTENDING)]
)
def test_a_wrong_expert_is_seen(lab, name, make):
    good, bad, x_TH = make(lab), make(lab), lab.tokens(17)
    bad.down[2].mul_(1.25)
    routing = lab.routing("dynamic_k", 17, 0)
    expected = reference(good, routing, x_TH)
    for store, ok in ((good, True), (bad, False)):
        y_TH = lab.executor(name, store, spec_of(lab, store))(x_TH, *lab.inputs(routing, "topk"))
        assert compare(y_TH, expected, torch.float32).ok is ok


def test_a_look_ahead_and_another_number_of_heads_are_seen(lab):
    store, x_TH, routing = attentions(lab), lab.tokens(17), lab.routing("dynamic_k", 17, 0)
    expected, inputs = reference(store, routing, x_TH), lab.inputs(routing, "topk")
    y_TH = lab.executor("reference", store, spec_of(lab, store))(x_TH, *inputs)
    ahead_TH = lab.executor("reference", store, spec_of(lab, store))(x_TH.flip(0), *(i.flip(0) for i in inputs)).flip(0)
    other = dataclasses.replace(store, heads=HEADS // 2)
    other_TH = lab.executor("reference", other, spec_of(lab, other))(x_TH, *inputs)
    assert compare(y_TH, expected, torch.float32).ok
    assert not compare(ahead_TH, expected, torch.float32).ok
    assert not compare(other_TH, expected, torch.float32).ok


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("make", [neurons, attentions])
def test_other_backends_refuse_and_nothing_is_folded(lab, name, make):
    store = make(lab)
    answer = lab.backend(name).supports(spec_of(lab, store))
    assert isinstance(answer, Refusal)
    assert f"runs no '{store.kinds[0]}' experts; use the reference backend" in answer.reason
