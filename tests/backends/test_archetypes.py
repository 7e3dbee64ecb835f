"""Every registered backend against the float64 oracle on six archetypes of routing, in each boundary and pass it takes.

A backend is met by being registered: on the first of two layers that it takes, dense in float32 or int8 in bfloat16.
"""

import os

import pytest
import torch

from moebench.contracts import LayerSpec, Refusal, Registry, Scheme
from moebench.moe.oracle import compare, reference
from moebench.moe.oracle_gradients import compare_gradients
from moebench.moe.routing import Routing

REGISTRY = Registry.load()
BACKENDS = REGISTRY.names("backend")
ARCHETYPES = ("dynamic_k", "empty", "hot", "signed", "null", "dropped")
LAYERS = ((torch.float32, None), (torch.bfloat16, Scheme("rtn", 8.0)))
TOKENS = 23


def layer_of(name, boundary="topk", backward=False):
    """The dtype and the scheme of the first layer that a backend takes, or None."""
    for dtype, scheme in LAYERS:
        spec = LayerSpec(
            32,
            32,
            ("ffn",) * 6,
            dtype=str(dtype).removeprefix("torch."),
            schemes=(scheme or Scheme(bits=8.0 * dtype.itemsize),) * 6,
            boundary=boundary,
            backward=backward,
            max_k=6,
        )
        if not isinstance(REGISTRY.get("backend", name).create({}).supports(spec), Refusal):
            return dtype, scheme
    return None


def taken(backward):
    """Every pair of a backend and a boundary that it takes."""
    pairs = [(name, boundary) for name in BACKENDS for boundary in ("topk", "sorted")]
    return [pair for pair in pairs if layer_of(*pair, backward=backward)]


@pytest.fixture
def available():
    """Skip what cannot run here, in the backend's own words, and what needs a process of another environment."""

    def check(name):
        needed = REGISTRY.get("backend", name).environment
        if not needed.items() <= os.environ.items():
            pytest.skip(f"needs {dict(needed)} in the environment of its process")
        answer = REGISTRY.get("backend", name).create({}).availability()
        if not answer.available:
            pytest.skip(answer.reason)
        if "cpu" not in answer.devices and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip(f"{name} runs on {', '.join(answer.devices)} here, and these tensors are the CPU's")

    return check


def test_the_built_in_backends_take_both_boundaries_and_three_declare_a_backward():
    built_in = {"reference", "eager", "batched", "grouped", "compiled", "packed", "duplex", "column_skip", "triton"}
    built_in.add("offload")
    assert built_in <= set(BACKENDS)
    assert {(name, boundary) for name in built_in for boundary in ("topk", "sorted")} <= set(taken(False))
    assert {name for name, _ in taken(True)} >= {"reference", "eager", "grouped"}


@pytest.mark.parametrize("archetype", ARCHETYPES)
@pytest.mark.parametrize(("name", "boundary"), taken(backward=False))
def test_forward(lab, available, name, boundary, archetype):
    available(name)
    dtype, scheme = layer_of(name, boundary)
    lab.check(name, lab.store(1, dtype, scheme, some_kinds=lab.kinds(archetype)), dtype, archetype, TOKENS, boundary, 5)


@pytest.mark.parametrize("archetype", ARCHETYPES)
@pytest.mark.parametrize(("name", "boundary"), taken(backward=True))
def test_forward_and_backward(lab, available, name, boundary, archetype):
    available(name)
    dtype, _ = layer_of(name, boundary, backward=True)
    actual, expected, *_ = lab.gradients(name, dtype, archetype, boundary, TOKENS)
    verdict = compare_gradients(actual, expected, dtype)
    assert verdict.ok, verdict


# --- the archetypes are what they are called, and each one shows the mistake that it is there for ---------------------


def test_the_archetypes_are_what_they_are_called(lab):
    made = {name: lab.routing(name, TOKENS, 5) for name in ARCHETYPES}
    assert set(made["dynamic_k"].k_T.tolist()) == set(range(7))
    empty_E = made["empty"].counts_E == 0
    assert empty_E.tolist() == [True, False, False, True, False, True]
    assert made["hot"].counts_E.tolist() == [0, 0, 0, TOKENS, 0, 0]
    sum_T = made["signed"].to_dense().sum(1)
    assert (sum_T[::3] == 0).all()
    assert (sum_T[1::3] < 0).all()
    assert (made["signed"].to_dense()[2::3] > 0).any()
    counts_E = made["null"].counts_E
    for kind in ("ffn", "zero", "copy", "constant"):
        assert counts_E[[other == kind for other in lab.kinds("null")]].sum() > 0
    assert (made["dropped"].k_T[::3] == 0).all()
    assert (made["dropped"].k_T[1::3] == 2).all()
    for routing in made.values():
        assert ((routing.to_dense().sum(1) - 1).abs() > 1e-3).any()


def two_at_most(routing, kinds):
    gate_TE = routing.to_dense()
    return Routing.dense(gate_TE * (gate_TE.argsort(1, descending=True).argsort(1) < 2))


def only_experts_with_tokens_counted(routing, kinds):
    return routing.relabel((routing.counts_E > 0).long().cumsum(0) - 1)


def twice_the_mean_at_most(routing, kinds):
    return routing.keep(routing.token_N < 2 * TOKENS // routing.num_experts)


def magnitudes(routing, kinds):
    return Routing(routing.token_N, routing.expert_N, routing.weight_N.abs(), routing.shape)


def weights_summing_to_one(routing, kinds):
    return routing.scaled(1 / magnitudes(routing, kinds).to_dense().sum(1)[routing.token_N])


def only_ffn(routing, kinds):
    return routing.keep(torch.tensor([kind == "ffn" for kind in kinds])[routing.expert_N])


def zero_experts_copying(routing, kinds):
    return routing.relabel(torch.tensor([kinds.index("copy") if k == "zero" else e for e, k in enumerate(kinds)]))


def every_token_served(routing, kinds):
    token_N = (routing.k_T == 0).nonzero().flatten()
    zeros_N = torch.zeros_like(token_N)
    return routing.concat(Routing(token_N, zeros_N, torch.ones(len(token_N)), routing.shape))


@pytest.mark.parametrize(
    ("archetype", "mistake"),
    [
        ("dynamic_k", two_at_most),
        ("empty", only_experts_with_tokens_counted),
        ("hot", twice_the_mean_at_most),
        ("signed", magnitudes),
        ("signed", weights_summing_to_one),
        ("null", only_ffn),
        ("null", zero_experts_copying),
        ("dropped", every_token_served),
    ],
)
def test_an_archetype_shows_the_mistake_that_it_is_there_for(lab, archetype, mistake):
    store, x_TH = lab.store(some_kinds=lab.kinds(archetype)), lab.tokens(TOKENS)
    routing = lab.routing(archetype, TOKENS, 5)
    expected = reference(store, routing, x_TH)
    run = lab.executor("reference", store, lab.spec(store, boundary="sorted"))
    for given, ok in ((routing, True), (mistake(routing, store.kinds), False)):
        assert compare(run(x_TH, *given.sorted()), expected, torch.float32).ok is ok
