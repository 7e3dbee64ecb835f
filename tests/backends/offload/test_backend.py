"""Backend ``offload``: bit for bit what ``eager`` computes, from a file and few slots, whoever decides what stays."""

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.backends import plugins
from moebench.backends.bridge import attach, moe_modules
from moebench.backends.gate_hints import Hinting, gates, hinting
from moebench.backends.offload import keeping
from moebench.backends.offload.access import Future
from moebench.backends.offload.backend import open_offload
from moebench.backends.offload.file import SlabFile, write_slabs
from moebench.backends.offload.names import POLICIES as POLICY_NAMES
from moebench.backends.offload.names import PREFETCHERS
from moebench.backends.offload.store import SlotStore
from moebench.contracts import LayerSpec, MoebenchError, Refusal, Registry, Scheme, load_file
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


# --- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Olmoe", "Mixtral"])
def test_an_attached_model_has_the_logits_of_eager(family):
    tiny = load_file(Path(__file__).parents[2] / "tiny_models.py")
    model = tiny.build(family)
    ids_BS = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    logits = []
    for name in ("eager", "offload"):
        with torch.no_grad(), attach(model, name) as session:
            logits.append(torch.cat([model(ids, use_cache=False).logits for ids in (ids_BS, ids_BS[:, :1])], 1))
            events = session.events()
    assert torch.equal(*logits)
    assert [(event["step"], event["layer"]) for event in events] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sum(event["miss"] for event in events) > 0


@pytest.mark.parametrize("family", ["Olmoe", "Mixtral", "Qwen3Moe", "DeepseekV3", "GraniteMoe"])
def test_an_attached_model_hints_at_what_the_next_gate_chooses(family):
    model = load_file(Path(__file__).parents[2] / "tiny_models.py").build(family)
    ids_BS, read = torch.arange(4)[None], []
    with torch.no_grad():
        expected = model(ids_BS, use_cache=False).logits
        with attach(model, backend("offload", prefetch="gate", capacity=0.75)) as session:
            session.asking.on_access = read.append
            first, second = moe_modules(model)
            experts = moe_modules(model)[first]
            experts.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
            outputs = [model(ids_BS, use_cache=False).logits for _ in range(3)]
            tally = session.store.cache.tally
    for logits in outputs:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    x_TH, access, later = read[:3]
    gate_EH = gates(model, moe_modules(model))[second]
    probs_TE = (x_TH.double() @ gate_EH.double().T).softmax(-1)
    chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(model.config.num_experts_per_tok).indices, 1.0)
    priority_E = (probs_TE * chosen_TE).sum(0)
    assert {key for key, _ in access.hints} == {(second, expert) for expert in priority_E.nonzero().flatten().tolist()}
    assert all(priority == pytest.approx(priority_E[key[1]].item(), rel=1e-4) for key, priority in access.hints)
    assert later.layer == second
    assert not later.hints
    assert tally.prefetched > 0


def test_a_session_that_reads_no_hints_is_given_none():
    model = load_file(Path(__file__).parents[2] / "tiny_models.py").build("Olmoe")
    with attach(model, "offload") as session, torch.no_grad():
        session.asking.on_access = lambda access: hints.extend(access.hints)
        hints = []
        model(torch.arange(4)[None], use_cache=False)
        assert not hints
        session.reads_hints = True
        assert all(isinstance(one, Hinting) for one in list(hinting(model, moe_modules(model), session).values())[:-1])


def test_an_attached_model_is_not_trained_by_mistake():
    tiny = load_file(Path(__file__).parents[2] / "tiny_models.py")
    model = tiny.build("Olmoe")
    with attach(model, "offload"), pytest.raises(MoebenchError, match="no backward; call it under torch"):
        model(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(MoebenchError, match="offload has no backward"), attach(model, "offload", backward=True):
        pass


# --- a session -------------------------------------------------------------------------------------------------------


def test_a_session_tells_what_the_cache_did_and_what_it_cost(model):
    file, stores = model
    session = open_offload(file, specs_of(stores), plugins.Offload(capacity=0.2, staging=3))
    x_TH = torch.randn(2, HIDDEN)
    for indices in ([[1, 2], [2, 4]], [[2, 4], [4, 2]]):
        session.layer(3)(x_TH, torch.tensor(indices), torch.ones(2, 2))
    slab = file.slab_bytes()
    first, second = session.events()
    told = {"event": "access", "step": 0, "layer": 3, "hit": 0, "covered": 0, "miss": 3, "prefetch": 0, "evicted": 0}
    assert told | {"in_place": 0, "low": 0, "deferred": 0, "bytes_read": 3 * slab, "late": 0} == {
        name: value for name, value in first.items() if name not in ("stall_ns", "read_ns")
    }
    assert min(first["stall_ns"], first["read_ns"]) > 0
    assert (second["step"], second["hit"], second["miss"], second["bytes_read"], second["stall_ns"]) == (1, 2, 0, 0, 0)
    assert session.resident_bytes() == session.layer(0).resident_bytes() == (3 + 3) * slab
    assert "3 of 18 experts in slots, the others read from a file (io=direct)" in session.executed().notes
    session.close()


def test_closing_ends_the_threads_and_the_session(model):
    file, stores = model
    before = set(threading.enumerate())
    session = open_offload(file, specs_of(stores), plugins.Offload(readers=3))
    executor = session.layer(0)
    executor(torch.randn(1, HIDDEN), torch.tensor([[0]]), torch.ones(1, 1))
    assert set(threading.enumerate()) > before
    session.close()
    session.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(MoebenchError, match="layer 0 was not loaded"):
        session.layer(0)
    with pytest.raises(MoebenchError, match="closed"):
        executor(torch.randn(1, HIDDEN), torch.tensor([[1]]), torch.ones(1, 1))


def test_accesses_have_steps_tokens_weights_and_the_hints_given_before(model):
    file, stores = model
    seen = []
    session = open_offload(file, specs_of(stores), plugins.Offload(), on_access=seen.append)
    x_TH, indices_TK = torch.randn(3, HIDDEN), torch.tensor([[4, 1], [1, EXPERTS], [1, 4]])
    weights_TK = torch.tensor([[0.5, 0.25], [0.125, 0.0], [1.0, -2.0]])
    session.hint(3, torch.tensor([5, EXPERTS, 0, -1]), 0.5)  # a gate may choose what is no expert
    session.hint(7, [1], 0.5)
    for layer, tokens in ((0, 3), (3, 0), (4, 3), (0, 3), (3, 0), (0, 3)):  # a call without tokens asks for nothing
        session.layer(layer)(x_TH[:tokens], indices_TK[:tokens], weights_TK[:tokens])
    first, *others = seen
    assert (first.experts, first.tokens, first.weights) == ((1, 4), (3, 2), (1.375, -1.5))
    assert first.hints == (((3, 5), 0.5), ((3, 0), 0.5))
    assert [(one.step, one.layer) for one in seen] == [(0, 0), (0, 4), (1, 0), (2, 0)]
    assert not any(one.hints for one in others)
    session.close()


@pytest.mark.parametrize(
    ("fault", "words"), [("read_error:3", "expert . of layer ."), ("read_slow:2", "expert . of layer .")]
)
def test_a_bad_disk_is_told_by_the_executor_and_the_session_stays_broken(model, monkeypatch, fault, words):
    file, stores = model
    monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", fault)
    monkeypatch.setenv("MOEBENCH_OFFLOAD_SLOW_S", "0.5")
    monkeypatch.setattr("moebench.backends.offload.store.SlotStore.__init__", in_haste(SlotStore.__init__))
    session = open_offload(file, specs_of(stores), plugins.Offload())
    run = list(calls(stores, 4, 0))
    with pytest.raises(MoebenchError, match=words):
        take(session, run)
    with pytest.raises(MoebenchError):
        session.layer(run[0][0])(*run[0][1:])
    session.close()


def take(session, run):
    for layer, *inputs in run:
        session.layer(layer)(*inputs)


def in_haste(init):
    """A store that waits a tenth of a second for a read."""

    def patient(self, *args, **settings):
        init(self, *args, **settings, deadline_s=0.1)

    return patient


def test_a_damaged_expert_is_named_on_both_tiers(model, tmp_path):
    file, stores = model
    slab = file.slab((3, 2))
    data = bytearray(file.path.read_bytes())
    data[file.data_begin + slab.offset + 7] ^= 1
    harmed = tmp_path / "harmed.safetensors"
    harmed.write_bytes(data)
    session = open_offload(harmed, specs_of(stores), plugins.Offload())
    with pytest.raises(MoebenchError, match="expert 2 of layer 3"):
        session.layer(3)(torch.randn(1, HIDDEN), torch.tensor([[2]]), torch.ones(1, 1))
    session.close()
    with pytest.raises(MoebenchError, match=r"expert 2 of layer 3 in .* is damaged"):
        open_offload(harmed, specs_of(stores), plugins.Offload(tier="host"))


# --- the file of a model ---------------------------------------------------------------------------------------------


def test_the_same_weights_are_written_once(tmp_path):
    folder = tmp_path / "cache" / "offload"
    stores = {0: experts(0), 2: experts(2)}
    backend("offload").load(stores, specs_of(stores)).close()
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    backend("offload", policy="lfru").load({2: experts(2), 0: experts(0)}, specs_of(stores)).close()
    assert [one.stat().st_mtime_ns for one in folder.iterdir()] == [written]


def test_a_process_that_had_to_wait_finds_what_the_other_one_wrote():
    """Both looked and found nothing; the file that the first one reads must not be taken from it by the second."""
    stores = {layer: experts(layer) for layer in (0, 1)}
    looked, go_on = os.pipe(), os.pipe()
    in_turn = keeping.in_turn

    def later(folder):
        os.write(looked[1], b".")
        os.read(go_on[0], 1)
        return in_turn(folder)

    child = os.fork()
    if child == 0:
        keeping.in_turn = later
        try:
            keeping.kept_file(stores)
        finally:
            os._exit(0)
    os.read(looked[0], 1)
    session = backend("offload", capacity=0.1).load(stores, specs_of(stores))
    os.write(go_on[1], b".")
    os.waitpid(child, 0)
    assert same_as_eager(session, stores, calls(stores, 3, 0))
    session.close()


def test_a_file_that_is_not_whole_is_written_anew():
    stores = {0: experts(0)}
    path = keeping.kept_file(stores).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])
    session = backend("offload").load(stores, specs_of(stores))
    assert path.read_bytes() == whole
    assert same_as_eager(session, stores, calls(stores, 3, 0))
    session.close()


def test_other_weights_have_another_file():
    changed = experts(0)
    changed.down[5, 3, 3] += 1e-3
    models = [
        {0: experts(0)},
        {0: changed},
        {1: experts(0)},
        {0: experts(0, activation="gelu")},
        {0: experts(0, torch.float64)},
        {0: experts(0, scheme=INT8)},
        {0: experts(0, scheme=INT4)},
    ]
    digests = [keeping.digest(stores) for stores in models]
    digests += [keeping.digest(models[0], low) for low in ("int8", "int4")]
    assert len(set(digests)) == len(models) + 2
    assert keeping.digest({0: experts(0)}) == digests[0]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"policy": "belady"}, "belady looks at accesses to come; use suite=offload"),
        ({"prefetch": "oracle:2"}, "oracle:2 looks at accesses to come; use suite=offload"),
        ({"policy": "lur"}, "unknown policy 'lur': did you mean 'lru'"),
        ({"policy": "pattern"}, "lacks its argument"),
        ({"prefetch": "gates"}, "did you mean 'gate'"),
    ],
)
def test_what_cannot_be_decided_is_refused_in_a_sentence(params, words):
    answer = backend("offload", **params).supports(spec_of(experts(0)))
    assert isinstance(answer, Refusal)
    assert words in answer.reason
    assert not answer.reason.endswith(".")


@pytest.mark.parametrize("params", [{"capacity": 0.0}, {"capacity": 1.5}, {"readers": 0}, {"staging": 65}])
def test_parameters_have_bounds(params):
    with pytest.raises(MoebenchError, match=f"{next(iter(params))}=.* must"):
        backend("offload", **params)


def test_io_that_the_system_has_not_is_told(monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT")
    assert backend("offload").availability().reason.endswith("use io=page_cache")
    assert backend("offload", io="page_cache").availability().available
    assert backend("offload", tier="host").availability().available


def test_layers_and_files_that_do_not_belong_together_are_refused(model):
    file, stores = model
    with pytest.raises(MoebenchError, match=r"has layers \[0, 3, 4\], not \[0, 3\]; write it anew"):
        open_offload(file, {layer: specs_of(stores)[layer] for layer in (0, 3)}, plugins.Offload())
    fewer = LayerSpec(HIDDEN, WIDTH, ("ffn",) * 5)
    with pytest.raises(MoebenchError, match="layer 0 has 5 experts, the file 6"):
        open_offload(file, {**specs_of(stores), 0: fewer}, plugins.Offload())
    with pytest.raises(MoebenchError, match="different experts"):
        backend("offload").load({0: stores[0]}, {0: fewer})
    uneven = {0: stores[0], 1: ExpertStore(stores[0].gate_up[:4], stores[0].down[:4], ("ffn",) * 4)}
    for tier in ("disk", "host"):
        with pytest.raises(MoebenchError, match=r"layer 1 has 4 experts|layers have \[4, 6\] experts"):
            backend("offload", tier=tier).load(uneven, {layer: spec_of(one) for layer, one in uneven.items()})
