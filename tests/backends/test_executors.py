"""What each backend computes: against the float64 oracle on random layers, and what is its own."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.backends.batched import BatchedExecutor, pair_bytes
from moebench.backends.compiled import Compiled
from moebench.backends.plugins import DESCRIPTORS
from moebench.contracts import MoebenchError, Scheme, Selection
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore
from moebench.moe.oracle import compare, reference
from moebench.moe.router import select
from moebench.moe.routing import Routing

DENSE = ("reference", "eager", "batched", "grouped")
needs_compiler = pytest.mark.skipif(not Compiled().availability().available, reason="compiled needs a C++ compiler")
HAS_CC = next(one for one in DESCRIPTORS if one.name == "column_skip").create().availability().available
SKIPPING = pytest.param("column_skip", marks=pytest.mark.skipif(not HAS_CC, reason="column_skip needs a C compiler"))
PLAIN = (*DENSE, SKIPPING)
ALL_DENSE = (*PLAIN, pytest.param("compiled", marks=needs_compiler))
INT8, INT4 = Scheme("rtn", 8.0), Scheme("rtn", 4.0, 32, symmetric=False)
ARCHETYPES = ("dynamic_k", "empty", "hot", "signed", "null", "dropped")

relaxed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
cases = given(
    archetype=st.sampled_from(ARCHETYPES),
    count=st.sampled_from([0, 1, 3, 17]),
    boundary=st.sampled_from(["topk", "sorted"]),
    seed=st.integers(0, 2**20),
    sparse=st.booleans(),
)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@relaxed
@cases
def test_dense_backends_agree_with_the_oracle(lab, name, dtype, archetype, count, boundary, seed, sparse):
    sparsity = lab.sparsity() if sparse else None
    store = lab.store(seed % 7, dtype, sparsity=sparsity, some_kinds=lab.kinds(archetype))
    lab.check(name, store, dtype, archetype, count, boundary, seed)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(relaxed, max_examples=25)
@cases
def test_compiled_agrees_with_the_oracle(lab, dtype, archetype, count, boundary, seed, sparse):
    sparsity = lab.sparsity() if sparse else None
    store = lab.store(seed % 7, dtype, sparsity=sparsity, some_kinds=lab.kinds(archetype))
    lab.check("compiled", store, dtype, archetype, count, boundary, seed)


@needs_compiler
def test_compiled_compiles_when_it_loads_and_never_again(lab):
    from torch._dynamo.utils import counters

    small, other = lab.store(), lab.store(1)
    session = lab.backend("compiled").load({0: small, 1: other}, {0: lab.spec(small), 1: lab.spec(other)})
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for layer in (0, 1):
        for count in (1, 2, 40):
            for archetype in ("hot", "dynamic_k"):
                session.layer(layer)(lab.tokens(count), *lab.inputs(lab.routing(archetype, count, 0), "topk"))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("scheme", [INT8, INT4, Scheme("rtn", 4.0, 32)])
@settings(relaxed, max_examples=40)
@cases
def test_packed_agrees_with_the_oracle(lab, scheme, archetype, count, boundary, seed, sparse):
    sparsity = lab.sparsity() if sparse else None
    store = lab.store(seed % 7, torch.bfloat16, scheme, sparsity, some_kinds=lab.kinds(archetype))
    lab.check("packed", store, torch.bfloat16, archetype, count, boundary, seed)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [INT8, INT4, Scheme("rtn", 2.0, 32, symmetric=False)])
def test_dense_backends_run_dequantized_weights(lab, name, dtype, scheme):
    store = lab.store(3, dtype, scheme)
    spec = lab.spec(store, str(dtype).removeprefix("torch."))
    assert lab.backend(name).supports(spec).weights == "dequantized"
    lab.check(name, store, dtype, "dynamic_k", 17, "topk", 11)
    session = lab.backend(name).load({0: store}, {0: spec})
    assert session.executed().weights == "dequantized"
    assert session.resident_bytes() > store.nbytes


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("activation", "gated"), [("gelu", True), ("relu", False), ("silu", False)])
def test_other_activations_and_ungated_experts(lab, name, activation, gated):
    store = lab.store(1, activation=activation, gated=gated)
    lab.check(name, store, torch.float32, "signed", 17, "sorted", 5)


@pytest.mark.parametrize("name", PLAIN)
def test_sparsity_with_channel_weights(lab, name):
    store = lab.store(2, sparsity=lab.sparsity(0.6, weights=True))
    lab.check(name, store, torch.float32, "dynamic_k", 17, "topk", 2)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float16") for name in DENSE] + [(name, "float64") for name in ("reference", "eager", "batched")],
)
def test_other_dtypes(lab, name, dtype):
    store = lab.store(4, getattr(torch, dtype))
    lab.check(name, store, getattr(torch, dtype), "signed", 17, "topk", 9)


@pytest.mark.parametrize("name", [*ALL_DENSE, "packed", "duplex"])
def test_verify_fails_when_one_expert_is_perturbed(lab, name):
    dtype, scheme = (torch.bfloat16, INT8) if name in ("packed", "duplex") else (torch.float32, None)
    good = lab.store(0, dtype, scheme)
    bad = lab.store(0, dtype)
    bad.down[2].mul_(1.25)
    if scheme is not None:
        bad = ExpertStore(
            good.gate_up, [*good.down[:2], round_to_nearest(bad.down[2], scheme), *good.down[3:]], good.kinds
        )
    x_TH, routing = lab.tokens(17, dtype), lab.routing("dynamic_k", 17, 0)
    expected = reference(good, routing, x_TH)
    for store, ok in ((good, True), (bad, False)):
        executor = lab.executor(name, store, lab.spec(store, str(dtype).removeprefix("torch.")))
        verdict = compare(executor(x_TH, *lab.inputs(routing, "topk")), expected, dtype)
        assert verdict.ok is ok, verdict


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("bias", [False, True])
def test_boundary_logits_selects_as_the_router_does(lab, name, bias):
    store, x_TH = lab.store(), lab.tokens(9)
    selection = Selection("sigmoid", 2, renormalize=True, scale=2.5, bias=bias, groups=(3, 2))
    logits_TE = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    bias_E = torch.linspace(-1, 1, 6) if bias else None
    executor = lab.executor(name, store, lab.spec(store, boundary="logits", selection=selection))
    inputs = (logits_TE, bias_E) if bias else (logits_TE,)
    routing = Routing.topk(*select(logits_TE, selection, bias_E), 6)
    assert compare(executor(x_TH, *inputs), reference(store, routing, x_TH), torch.float32).ok
    if bias:
        with pytest.raises(MoebenchError, match="pass \\(logits_TE, bias_E\\)"):
            executor(x_TH, logits_TE)


def test_dense_weights_are_not_copied(lab):
    store = lab.store()
    for name in ("reference", "eager", "batched", "grouped"):
        executor = lab.executor(name, store, lab.spec(store))
        assert executor.weights.gate_up is store.gate_up
        assert executor.weights.down is store.down


def test_batched_in_turns_gives_the_same_output(lab):
    store, x_TH = lab.store(), lab.tokens(17)
    spec, inputs = lab.spec(store), lab.inputs(lab.routing("dynamic_k", 17, 0), "topk")
    whole = BatchedExecutor(store, spec, 2**30)
    one_pair = BatchedExecutor(store, spec, 1)
    seven = BatchedExecutor(store, spec, 7 * pair_bytes(spec))
    assert (whole.pairs > 17 * 6, one_pair.pairs, seven.pairs) == (True, 1, 7)
    expected = whole(x_TH, *inputs)
    for executor in (one_pair, seven):
        torch.testing.assert_close(executor(x_TH, *inputs), expected, rtol=1e-6, atol=1e-6)


def test_session_answers_and_refuses_in_a_sentence(lab):
    store = lab.store()
    session = lab.backend("eager").load({2: store, 4: store}, {2: lab.spec(store), 4: lab.spec(store)})
    assert session.resident_bytes() == 2 * store.nbytes
    assert session.executed().kernels == ("aten::linear", "aten::index_add_")
    session.hint(2, [0], 1.0)
    assert list(session.events()) == []
    with pytest.raises(MoebenchError, match="layer 3 was not loaded; this session has \\[2, 4\\]"):
        session.layer(3)
    session.close()
    with pytest.raises(MoebenchError, match="layer 2 was not loaded"):
        session.layer(2)
    with pytest.raises(MoebenchError, match="different experts"):
        lab.backend("eager").load({0: store}, {0: lab.spec(store, kinds=("ffn",) * 5)})
