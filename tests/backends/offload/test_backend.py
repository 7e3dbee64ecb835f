"""Backend ``offload``: bit for bit what ``eager`` computes, from a file and few slots, whoever decides what stays."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.backends import plugins
from moebench.backends.offload.access import Future
from moebench.backends.offload.backend import open_offload
from moebench.backends.offload.file import SlabFile, write_slabs
from moebench.backends.offload.names import POLICIES as POLICY_NAMES
from moebench.backends.offload.names import PREFETCHERS
from moebench.contracts import LayerSpec, Registry, Scheme
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore

REGISTRY = Registry.load()
HIDDEN, WIDTH, EXPERTS = 32, 32, 6
LAYERS = (0, 3, 4)
POLICIES = (
    "lru",
    "lru_k:2",
    "lfu:8",
    "lfru",
    "per_layer",
    "static",
    "cpu_moe:1",
    "pattern:blk.3",
    "eam:4",
    "hobbit",
    "belady",
    "belady:2",
)
INT8, INT4 = Scheme("rtn", 8.0), Scheme("rtn", 4.0, 32, symmetric=False)
relaxed = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(file, stores by layer) of dense experts in float32."""
    stores = {layer: experts(layer) for layer in LAYERS}
    return SlabFile.open(write_slabs(tmp_path_factory.mktemp("model") / "m.safetensors", stores.items())), stores


def experts(seed, dtype=torch.float32, scheme=None, gated=True, activation="silu", sparsity=None):
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(EXPERTS, (1 + gated) * WIDTH, HIDDEN, generator=generator).div(HIDDEN**0.5).to(dtype)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator).div(WIDTH**0.5).to(dtype)
    if scheme is not None:
        gate_up, down = (tuple(round_to_nearest(one, scheme) for one in weight) for weight in (gate_up, down))
    return ExpertStore(gate_up, down, ("ffn",) * EXPERTS, activation, gated, sparsity=sparsity)


def spec_of(store, dtype="float32", **changes):
    return LayerSpec(
        HIDDEN, WIDTH, store.kinds, dtype, store.activation, store.gated, store.schemes, max_k=EXPERTS, **changes
    )


def specs_of(stores, dtype="float32", **changes):
    return {layer: spec_of(store, dtype, **changes) for layer, store in stores.items()}


def backend(name, **params):
    return REGISTRY.get("backend", name).create(params)


def calls(stores, steps, seed, dtype=torch.float32):
    """(layer, x_TH, indices_TK, weights_TK) of every call of a run, with some experts more popular than others."""
    generator = torch.Generator().manual_seed(seed)
    popular_E = torch.rand(EXPERTS, generator=generator)
    for step in range(steps):
        tokens = (1, 1, 4, 0)[(step + seed) % 4]
        for layer in stores:
            score_TE = torch.rand(tokens, EXPERTS, generator=generator) + popular_E.roll(layer)
            weights_TK, indices_TK = score_TE.topk(2)
            yield layer, torch.randn(tokens, HIDDEN, generator=generator).to(dtype), indices_TK, weights_TK


def same_as_eager(session, stores, run, dtype="float32"):
    """Whether every call gives the very bits of ``eager``; the next layer's experts are hinted at."""
    eager = backend("eager").load(stores, specs_of(stores, dtype))
    run = list(run)
    for place, (layer, *inputs) in enumerate(run):
        after = run[(place + 1) % len(run)]
        session.hint(after[0], after[2].flatten().tolist(), 1.0)
        if not torch.equal(session.layer(layer)(*inputs), eager.layer(layer)(*inputs)):
            return False
    return True


def accesses_of(file, stores, run):
    """What a run asks for."""
    seen = []
    session = open_offload(file, specs_of(stores), plugins.Offload(capacity=1.0), on_access=seen.append)
    for layer, *inputs in run:
        session.layer(layer)(*inputs)
    session.close()
    return seen


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_run(model):
    """(calls, their outputs by ``eager``, the accesses they make): twenty steps, so that matrices are finished."""
    file, stores = model
    run = list(calls(stores, 20, 1))
    eager = backend("eager").load(stores, specs_of(stores))
    return run, [eager.layer(layer)(*inputs) for layer, *inputs in run], accesses_of(file, stores, run)


PAIRS = [(policy, prefetch) for policy in POLICIES for prefetch in ("none", "oracle:2")]
PAIRS += [("lru", prefetch) for prefetch in ("gate", "eam", "frequency", "pregate:2")]


@pytest.mark.parametrize(("policy", "prefetch"), PAIRS)
def test_every_policy_and_prefetcher_gives_the_bits_of_eager(model, long_run, policy, prefetch):
    file, stores = model
    run, expected, accesses = long_run
    session = open_offload(file, specs_of(stores), plugins.Offload(policy, prefetch), Future(accesses))
    for (layer, *inputs), expected_TH, (after, _, indices_TK, _) in zip(run, expected, [*run[1:], run[0]], strict=True):
        session.hint(after, indices_TK.flatten().tolist(), 1.0)
        assert torch.equal(session.layer(layer)(*inputs), expected_TH)
    tally = session.store.cache.tally
    assert tally.misses > 0
    assert tally.requests == sum(len(access.experts) for access in accesses)
    assert policy != "lru" or (tally.prefetched > 0) == (prefetch != "none")
    session.close()


def test_all_policies_and_prefetchers_are_tried_above():
    assert {policy.partition(":")[0] for policy, _ in PAIRS} == set(POLICY_NAMES)
    assert {prefetch.partition(":")[0] for _, prefetch in PAIRS} == set(PREFETCHERS)


@relaxed
@given(
    policy=st.sampled_from(["lru", "lfu:8", "eam:2", "belady"]),
    prefetch=st.sampled_from(["none", "gate", "oracle:2"]),
    capacity=st.sampled_from([0.01, 0.2, 0.5, 1.0]),
    io=st.sampled_from(["direct", "page_cache"]),
    readers=st.integers(1, 3),
    staging=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_slots_threads_and_reads_do_not_change_a_bit(model, policy, prefetch, capacity, io, readers, staging, seed):
    file, stores = model
    run = list(calls(stores, 6, seed))
    params = plugins.Offload(policy, prefetch, capacity=capacity, io=io, readers=readers, staging=staging)
    session = open_offload(file, specs_of(stores), params, Future(accesses_of(file, stores, run)))
    assert same_as_eager(session, stores, run)
    session.close()


@pytest.mark.parametrize("boundary", ["topk", "sorted"])
@pytest.mark.parametrize("archetype", ["dynamic_k", "empty", "hot", "signed", "dropped"])
@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [
        ("float32", None),
        ("bfloat16", None),
        ("float32", INT8),
        ("bfloat16", INT4),
        ("bfloat16", Scheme("rtn", 8.0, act_bits=8)),
    ],
)
def test_archetypes_give_the_bits_of_eager(lab, archetype, boundary, dtype, scheme):
    torch_dtype = getattr(torch, dtype)
    store = lab.store(1, torch_dtype, scheme)
    spec = lab.spec(store, dtype, boundary)
    x_TH, inputs = lab.tokens(23, torch_dtype), lab.inputs(lab.routing(archetype, 23, 5), boundary)
    offload, eager = (backend(name).load({5: store}, {5: spec}) for name in ("offload", "eager"))
    out_TH = torch.full_like(x_TH, float("nan"))
    assert offload.layer(5)(x_TH, *inputs, out_TH=out_TH) is out_TH
    assert torch.equal(out_TH, eager.layer(5)(x_TH, *inputs))
    assert offload.executed().weights == backend("offload").supports(spec).weights
    offload.close()


@pytest.mark.parametrize(("activation", "gated"), [("gelu", True), ("relu", False)])
def test_other_experts_give_the_bits_of_eager(activation, gated):
    stores = {2: experts(1, torch.float64, gated=gated, activation=activation)}
    session = backend("offload").load(stores, specs_of(stores, "float64"))
    assert same_as_eager(session, stores, calls(stores, 4, 0, torch.float64), "float64")
    session.close()
