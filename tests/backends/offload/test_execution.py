"""What becomes of missing experts: computed in place, fetched in few bits, deferred; each by its exact formula."""

import random
import threading
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.backends import plugins
from moebench.backends.offload.access import Access
from moebench.backends.offload.backend import open_offload
from moebench.backends.offload.cache import Cache
from moebench.backends.offload.costs import Curve, ExpertCosts
from moebench.backends.offload.execution import Deferral
from moebench.backends.offload.file import SlabFile, write_slabs
from moebench.backends.offload.keeping import low_form
from moebench.backends.offload.measuring import host_experts, measured
from moebench.backends.offload.policies.recency import LRU
from moebench.backends.offload.store import SlotStore
from moebench.backends.packed import PackedExecutor
from moebench.contracts import LayerSpec, MoebenchError, Refusal, Registry, Scheme, load_file
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore, expert_forward

REGISTRY = Registry.load()
HIDDEN, WIDTH, EXPERTS, LAYERS = 32, 32, 6, (0, 1, 4)
INT8, INT4 = Scheme("rtn", 8.0), Scheme("rtn", 4.0, 32, symmetric=False)
FREE, DEAR = Curve.line(0, 0), Curve.line(1, 1)
relaxed = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def backend(name, **params):
    return REGISTRY.get("backend", name).create(params)


def experts(seed, dtype=torch.float32, scheme=None, size=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(EXPERTS, 2 * size, size, generator=generator).div(size**0.5).to(dtype)
    down = torch.randn(EXPERTS, size, size, generator=generator).div(size**0.5).to(dtype)
    if scheme is not None:
        gate_up, down = (tuple(round_to_nearest(one, scheme) for one in weight) for weight in (gate_up, down))
    return ExpertStore(gate_up, down, ("ffn",) * EXPERTS)


def specs_of(stores, dtype="float32"):
    return {
        layer: LayerSpec(one.hidden, one.width, one.kinds, dtype, schemes=one.schemes, max_k=EXPERTS)
        for layer, one in stores.items()
    }


def steps_of(layers, count, seed, dtype=torch.float32, tokens=(1, 1, 5, 40)):
    """[{layer: (x_TH, indices_TK, weights_TK)}]: all layers of a step have the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for step in range(count):
        number, one = tokens[(step + seed) % len(tokens)], {}
        for layer in layers:
            weights_TK, indices_TK = torch.rand(number, EXPERTS, generator=generator).topk(3)
            one[layer] = (torch.randn(number, HIDDEN, generator=generator).to(dtype), indices_TK, weights_TK)
        made.append(one)
    return made


def rows_of(inputs, expert):
    """(token_N, weight_N1) of one expert, tokens ascending."""
    _, indices_TK, weights_TK = inputs
    token_N, slot_N = (indices_TK == expert).nonzero(as_tuple=True)
    return token_N, weights_TK[token_N, slot_N][:, None]


def added(y_TH, inputs, expert, output):
    """Add ``output(x_NH)`` of one expert."""
    token_N, weight_N1 = rows_of(inputs, expert)
    y_TH.index_add_(0, token_N, (output(inputs[0][token_N]) * weight_N1).to(y_TH.dtype))


def dense_output(store, expert, dtype=torch.float32):
    gate_up, down = store.weights(expert, dtype)
    return lambda x_NH: expert_forward(x_NH, gate_up, down, store, expert)


def packed_output(executor, expert, x_NH):
    return executor.ffn(x_NH, *executor.experts[expert], expert)


def how_of(session):
    """{expert: how} of the last access; ``hit`` for whom was there."""
    asked = [event for event in session.store.log[-1] if event.kind != "prefetch"]
    return {event.key[1]: event.how if event.kind == "miss" else "hit" for event in asked}


@pytest.fixture
def held(monkeypatch, tmp_path):
    """The cache folder of a test."""
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    return tmp_path


# --- in place: the tier in RAM ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[INT8, INT4], ids=["int8", "int4"])
def packed_model(request, tmp_path_factory):
    """(file, stores) of quantized experts for tokens in bfloat16."""
    stores = {layer: experts(layer, torch.bfloat16, request.param) for layer in LAYERS}
    return SlabFile.open(write_slabs(tmp_path_factory.mktemp("packed") / "m.safetensors", stores.items())), stores


def open_host(model, costs, execution="fiddler", policy="lru", capacity=0.25):
    file, stores = model
    params = plugins.Offload(policy, execution=execution, capacity=capacity, tier="host")
    return open_offload(file, specs_of(stores, "bfloat16"), params, costs=costs)


@pytest.mark.parametrize(
    ("costs", "name"), [(ExpertCosts(1.0, FREE, FREE), "packed"), (ExpertCosts(0.0, FREE, DEAR), "eager")]
)
def test_all_in_place_is_packed_and_none_is_eager_bit_for_bit(packed_model, costs, name):
    _, stores = packed_model
    session = open_host(packed_model, costs)
    other = backend(name).load(stores, specs_of(stores, "bfloat16"))
    for step in steps_of(LAYERS, 4, 0, torch.bfloat16):
        for layer, inputs in step.items():
            assert torch.equal(session.layer(layer)(*inputs), other.layer(layer)(*inputs))
            assert ("in_place" in how_of(session).values()) == (name == "packed")
    session.close()


@relaxed
@given(
    each=st.sampled_from([0.05, 0.3, 2.0]),
    execution=st.sampled_from(["fiddler", "fiddler:max", "duplex"]),
    capacity=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_who_is_there_dense_and_who_is_not_packed(packed_model, each, execution, capacity, seed):
    _, stores = packed_model
    specs = specs_of(stores, "bfloat16")
    packed = {layer: PackedExecutor(one, specs[layer]) for layer, one in stores.items()}
    session = open_host(
        packed_model, ExpertCosts(1.0, Curve.line(0.1, 0.01), Curve.line(0.0, each)), execution, "lru", capacity
    )
    for step in steps_of(LAYERS, 4, seed, torch.bfloat16):
        for layer, inputs in step.items():
            y_TH = session.layer(layer)(*inputs)
            expected_TH = torch.zeros_like(y_TH)
            for expert, how in sorted(how_of(session).items()):
                fast = dense_output(stores[layer], expert, torch.bfloat16)
                slow = partial(packed_output, packed[layer], expert)
                added(expected_TH, inputs, expert, slow if how == "in_place" else fast)
            assert torch.equal(y_TH, expected_TH)
    session.close()


def test_fiddler_computes_in_place_below_its_crossover(packed_model):
    """Five tokens in place take as long as bringing the expert: fewer stay, five or more come."""
    session = open_host(packed_model, ExpertCosts(5.0, FREE, Curve.line(0, 1)), capacity=0.01)
    x_TH = torch.randn(9, HIDDEN).to(torch.bfloat16)
    for tokens in (1, 4, 5, 9):
        session.layer(0)(x_TH[:tokens], torch.full((tokens, 1), 2), torch.ones(tokens, 1))
        assert how_of(session)[2] == ("in_place" if tokens < 5 else "fetch")
        session.layer(1)(x_TH[:5], torch.full((5, 1), 3), torch.ones(5, 1))  # takes the only slot
    session.close()


def test_costs_are_measured_on_the_experts_where_they_are_not_given(packed_model):
    file, stores = packed_model
    specs = specs_of(stores, "bfloat16")
    session = open_host(packed_model, None, "duplex")
    costs = session.store.cache.execution.costs
    assert costs.load > 0
    for curve in (costs.fast, costs.in_place):
        assert [number for number, _ in curve.points] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
        assert min(seconds for _, seconds in curve.points) > 0
        assert curve(256) > curve(1)
    session.close()
    few = LayerSpec(**{**vars(specs[0]), "tokens": 3})
    weights = {(0, expert): (stores[0].gate_up[expert], stores[0].down[expert]) for expert in range(EXPERTS)}
    told = measured(list(host_experts(weights, few, in_place=True).values()), stores[0], few)
    assert [number for number, _ in told.in_place.points] == [1, 2, 3]
    assert file.layout.layers == LAYERS


@pytest.mark.parametrize("name", ["fetch", "defer:1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tier_in_ram_takes_every_store(dtype, name):
    """Dense or quantized; a load keeps the store's own weights, and slots are filled with copies."""
    for scheme in (None, INT8):
        stores = {3: experts(3, getattr(torch, dtype), scheme)}
        specs = specs_of(stores, dtype)
        session = backend("offload", tier="host", execution=name, capacity=0.5).load(stores, specs)
        eager = backend("eager").load(stores, specs)
        for step in steps_of((3,), 6, 1, getattr(torch, dtype)):
            assert torch.equal(session.layer(3)(*step[3]), eager.layer(3)(*step[3]))
        slot = 3 * WIDTH * HIDDEN * getattr(torch, dtype).itemsize
        assert session.resident_bytes() == stores[3].nbytes + 3 * slot
        assert session.executed().weights == backend("offload", tier="host").supports(specs[3]).weights
        session.close()


def test_a_closed_or_broken_session_in_ram_serves_no_more():
    stores, inputs = {3: experts(3)}, (torch.randn(1, HIDDEN), torch.tensor([[1, 2]]), torch.ones(1, 2))
    closed, broken = (backend("offload", tier="host").load(stores, specs_of(stores)) for _ in range(2))
    executor = closed.layer(3)
    closed.close()
    broken.store.experts.pop((3, 2))
    with pytest.raises(KeyError):
        broken.layer(3)(*inputs)
    for one in (executor, broken.layer(3)):
        with pytest.raises(MoebenchError, match="closed, or an access of it broken off; open a new one"):
            one(*inputs)
    assert len(broken.events()) == 1
    broken.close()


def test_a_session_in_ram_that_is_closed_while_it_owes_experts_says_so():
    stores, inputs = {layer: experts(layer) for layer in (0, 1)}, (torch.randn(1, HIDDEN), torch.tensor([[1, 2]]))
    session = backend("offload", tier="host", execution="defer:1").load(stores, specs_of(stores))
    after = session.layer(1)
    session.layer(0)(*inputs, torch.ones(1, 2))
    session.close()
    assert session.resident_bytes() == 0
    for _ in range(2):
        with pytest.raises(MoebenchError, match="closed, or an access of it broken off; open a new one"):
            after(*inputs, torch.ones(1, 2))


def test_in_ram_too_what_is_prefetched_was_asked_for_rightly():
    stores = {layer: experts(layer, torch.bfloat16, INT8) for layer in LAYERS}
    specs = specs_of(stores, "bfloat16")
    session = backend("offload", tier="host", prefetch="frequency:1", readers=2).load(stores, specs)
    eager = backend("eager").load(stores, specs)
    for step in steps_of(LAYERS, 8, 2, torch.bfloat16):
        for layer, inputs in step.items():
            assert torch.equal(session.layer(layer)(*inputs), eager.layer(layer)(*inputs))
    assert session.store.cache.tally.covered > 0
    session.close()


def test_both_tiers_have_the_same_events(packed_model):
    file, stores = packed_model
    logs = []
    for tier in ("disk", "host"):
        params = plugins.Offload("lfru", "frequency:1", capacity=0.3, tier=tier)
        session = open_offload(file, specs_of(stores, "bfloat16"), params)
        for step in steps_of(LAYERS, 6, 3, torch.bfloat16):
            for layer, inputs in step.items():
                session.layer(layer)(*inputs)
        logs.append(session.store.log)
        session.close()
    assert logs[0] == logs[1]


# --- a copy of few bits ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["int8", "nf4"])
def model_of_two_forms(request, tmp_path_factory):
    """(file, stores, the stores in few bits): rows of 64, which nf4's groups divide."""
    low, stores = low_form(request.param), {layer: experts(layer, size=64) for layer in LAYERS}
    file = write_slabs(tmp_path_factory.mktemp("low") / "m.safetensors", stores.items(), low)
    return SlabFile.open(file), stores, {layer: low(one) for layer, one in stores.items()}


@relaxed
@given(threshold=st.sampled_from([0.0, 0.4, 0.6]), capacity=st.sampled_from([0.2, 0.5]), seed=st.integers(0, 99))
def test_unimportant_experts_come_in_few_bits(model_of_two_forms, threshold, capacity, seed):
    file, stores, coded = model_of_two_forms
    params = plugins.Offload(execution=f"hobbit:{threshold}", capacity=capacity)
    session, seen = open_offload(file, specs_of(stores), params), set()
    for step in steps_of(LAYERS, 4, seed):
        for layer, (x_TH, *where) in step.items():
            inputs = (x_TH.repeat(1, 2), *where)
            y_TH = session.layer(layer)(*inputs)
            expected_TH = torch.zeros_like(y_TH)
            for expert, how in sorted(how_of(session).items()):
                seen.add(how)
                added(expected_TH, inputs, expert, dense_output((coded if how == "low" else stores)[layer], expert))
            assert torch.equal(y_TH, expected_TH)
    assert {"low", "fetch"} <= seen
    session.close()


def test_a_load_writes_the_copies_of_few_bits(held):
    stores, step = {layer: experts(layer) for layer in LAYERS}, steps_of(LAYERS, 1, 0)[0]
    coded = {layer: low_form("int8")(one) for layer, one in stores.items()}
    session = backend("offload", execution="hobbit:0", low="int8").load(stores, specs_of(stores))
    y_TH, expected_TH = session.layer(0)(*step[0]), torch.zeros_like(step[0][0])
    for expert, how in sorted(how_of(session).items()):
        added(expected_TH, step[0], expert, dense_output((coded if how == "low" else stores)[0], expert))
    assert torch.equal(y_TH, expected_TH)
    assert "low" in how_of(session).values()
    session.close()


def test_with_threshold_1_nothing_comes_in_few_bits(held):
    stores = {layer: experts(layer) for layer in LAYERS}
    session = backend("offload", execution="hobbit:1", low="int8").load(stores, specs_of(stores))
    eager = backend("eager").load(stores, specs_of(stores))
    for step in steps_of(LAYERS, 4, 0):
        for layer, inputs in step.items():
            assert torch.equal(session.layer(layer)(*inputs), eager.layer(layer)(*inputs))
    session.close()


# --- deferral --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    stores = {layer: experts(layer) for layer in LAYERS}
    return SlabFile.open(write_slabs(tmp_path_factory.mktemp("model") / "m.safetensors", stores.items())), stores


@relaxed
@given(
    count=st.integers(0, 3),
    capacity=st.sampled_from([0.01, 0.2, 0.6]),
    staging=st.integers(1, 2),
    prefetch=st.sampled_from(["none", "frequency:1"]),
    policy=st.sampled_from(["lru", "static"]),
    tier=st.sampled_from(["disk", "host"]),
    seed=st.integers(0, 99),
)
def test_what_is_deferred_is_added_by_the_next_layer(model, count, capacity, staging, prefetch, policy, tier, seed):
    file, stores = model
    params = plugins.Offload(policy, prefetch, f"defer:{count}", capacity, tier, staging=staging)
    session, seen = open_offload(file, specs_of(stores), params), 0
    for step in steps_of(LAYERS, 5, seed, tokens=(1, 4)):
        owed = []
        for layer, inputs in step.items():
            y_TH = session.layer(layer)(*inputs)
            inputs = (inputs[0].clone(), *inputs[1:])
            expected_TH, now = torch.zeros_like(y_TH), []
            for those, expert, output in owed:
                added(expected_TH, those, expert, output)
            for expert, how in sorted(how_of(session).items()):
                output = dense_output(stores[layer], expert)
                if how == "deferred":
                    now.append((inputs, expert, output))
                else:
                    added(expected_TH, inputs, expert, output)
            assert torch.equal(y_TH, expected_TH)
            step[layer][0].fill_(float("nan"))  # a caller may use its buffers anew
            seen, owed = seen + len(now), now
        assert not owed
    assert seen > 0 or count == 0
    session.close()


def test_a_step_adds_up_to_what_it_would_without_deferral(model):
    file, stores = model
    session = open_offload(file, specs_of(stores), plugins.Offload(execution="defer:2"))
    eager = backend("eager").load(stores, specs_of(stores))
    for step in steps_of(LAYERS, 6, 0, tokens=(3,)):
        sums = [sum(one.layer(layer)(*inputs).double() for layer, inputs in step.items()) for one in (session, eager)]
        torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5)
    assert sum(event["deferred"] for event in session.events()) > 0
    session.close()


def test_a_layer_returns_before_what_it_deferred_has_been_read(model, monkeypatch):
    """The third read, the deferred expert's, waits for the test: only the next layer waits for it."""
    file, stores = model
    session = open_offload(file, specs_of(stores), plugins.Offload(execution="defer:1", capacity=0.5))
    readers, begun, go_on = session.store._readers, [], threading.Event()
    landing = readers._landing

    def third_waits(slot, nbytes):
        begun.append(slot)
        assert len(begun) != 3 or go_on.wait(20)
        return landing(slot, nbytes)

    monkeypatch.setattr(readers, "_landing", third_waits)
    x_TH, indices_TK, weights_TK = torch.randn(1, HIDDEN), torch.tensor([[5, 1, 2]]), torch.tensor([[0.2, 0.5, 0.3]])
    first_TH = session.layer(0)(x_TH, indices_TK, weights_TK)
    assert how_of(session) == {1: "fetch", 2: "fetch", 5: "deferred"}
    assert session.store.ledger[0].reads == 2
    with pytest.raises(MoebenchError, match="deferred; take them before the next access"):
        next(session.store.serve(None))
    go_on.set()
    y_TH = session.layer(1)(x_TH, torch.full((1, 1), EXPERTS), torch.zeros(1, 1))
    assert session.store.ledger[0].reads == 3
    expected_TH = torch.zeros_like(y_TH)
    added(expected_TH, (x_TH, indices_TK, weights_TK), 5, dense_output(stores[0], 5))
    assert torch.equal(y_TH, expected_TH)
    assert first_TH.any()
    session.close()


@pytest.mark.parametrize("eager", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)], ids=str)
def test_a_device_has_its_time_with_what_is_deferred(model, eager):
    """Work given to the fake device reads its slot late: it must still be the expert that was asked for."""
    file, stores = model
    link = load_file(Path(__file__).parent / "fake_link.py").Link(*eager, seed=3)
    layout, rng = file.layout, random.Random(0)
    store = SlotStore(file, Cache(LRU(), 4, layout, None, None, Deferral(2)), staging=1, device=link, carry=True)
    asked, done = [], []

    def look(served):
        gate_up, down = (
            weights[served.key[1]] for weights in (stores[served.key[0]].gate_up, stores[served.key[0]].down)
        )
        done.append((served.key, torch.equal(served.gate_up, gate_up) and torch.equal(served.down, down)))

    for step, layer in product(range(12), LAYERS):
        chosen = tuple(sorted(rng.sample(range(EXPERTS), 3)))
        asked += [(layer, expert) for expert in chosen]
        for served in store.deferred():
            link.launch(partial(look, served))
        for served in store.serve(Access(step, layer, chosen, (1, 1, 1), (0.5, 0.3, 0.2))):
            link.launch(partial(look, served))
    link.synchronize()
    store.close()
    assert not link.wrong
    assert sorted(done) == sorted((key, True) for key in asked)
    assert any(event.how == "deferred" for events in store.log for event in events)


class AtOnce:
    """A store that hands out deferred experts like all others."""

    def __init__(self, store):
        self.store, self.log, self.ledger, self.resident_bytes = store, store.log, store.ledger, store.resident_bytes

    def serve(self, access):
        yield from self.store.serve(access)
        if access.layer != LAYERS[-1]:
            yield from self.store.deferred()

    def close(self):
        self.store.close()


def test_a_store_may_hand_out_what_is_deferred_at_once(model):
    file, stores = model
    late, at_once = (open_offload(file, specs_of(stores), plugins.Offload(execution="defer:2")) for _ in range(2))
    at_once.asking.store = AtOnce(at_once.store)
    for step in steps_of(LAYERS, 4, 0, tokens=(3,)):
        for layer, inputs in step.items():
            assert torch.equal(late.layer(layer)(*inputs), at_once.layer(layer)(*inputs))
    for session in (late, at_once):
        session.close()


def test_a_layer_without_tokens_of_its_own_adds_what_was_deferred(model):
    file, stores = model
    session = open_offload(file, specs_of(stores), plugins.Offload(execution="defer:1"))
    x_TH, indices_TK, weights_TK = torch.randn(2, HIDDEN), torch.tensor([[1, 2], [1, 2]]), torch.full((2, 2), 0.5)
    session.layer(0)(x_TH, indices_TK, weights_TK)
    y_TH = session.layer(1)(x_TH, torch.full((2, 1), EXPERTS), torch.zeros(2, 1))
    late = next(expert for expert, how in how_of(session).items() if how == "deferred")
    expected_TH = torch.zeros_like(y_TH)
    added(expected_TH, (x_TH, indices_TK, weights_TK), late, dense_output(stores[0], late))
    assert torch.equal(y_TH, expected_TH)
    session.close()


def test_layers_out_of_order_and_other_tokens_are_refused_with_deferral(model):
    file, stores = model
    inputs = (torch.randn(2, HIDDEN), torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2))
    fewer = tuple(one[:1] for one in inputs)
    for layer, those, said in (
        (4, inputs, "layer after 0 must add"),
        (0, inputs, "call all layers in their order"),
        (1, fewer, "experts of 2 tokens and layer 1 has 1"),
    ):
        session = open_offload(file, specs_of(stores), plugins.Offload(execution="defer:1"))
        session.layer(0)(*inputs)
        with pytest.raises(MoebenchError, match=said):
            session.layer(layer)(*those)
        session.close()


class AllDeferred:
    """Defers whatever is missing, at every layer."""

    def decide(self, missing, moment):
        return dict.fromkeys(missing, "deferred")


def test_at_the_last_layer_nothing_is_deferred_whoever_decides(model, monkeypatch):
    file, stores = model
    monkeypatch.setattr("moebench.backends.offload.opening.make_execution", lambda spec, costs: AllDeferred())
    session = open_offload(file, specs_of(stores), plugins.Offload(capacity=0.01))
    eager = backend("eager").load(stores, specs_of(stores))
    for _ in range(2):
        step = steps_of(LAYERS, 1, 0, tokens=(4,))[0]
        outputs = {layer: session.layer(layer)(*inputs) for layer, inputs in step.items()}
        whole = {layer: eager.layer(layer)(*inputs) for layer, inputs in step.items()}
        assert not outputs[0].any()
        assert torch.equal(outputs[1], whole[0])
        torch.testing.assert_close(outputs[4], whole[1] + whole[4])
    session.close()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "dtype", "scheme", "words"),
    [
        ({"execution": "fiddler"}, "bfloat16", INT8, "nobody can on a disk; use tier=host"),
        ({"execution": "duplex", "tier": "host"}, "float32", INT8, "bfloat16, not float32"),
        ({"execution": "duplex", "tier": "host"}, "bfloat16", None, "choose quantization=int8"),
        ({"execution": "fiddler:least", "tier": "host"}, "bfloat16", INT8, "sum or max"),
        ({"execution": "fiddler", "tier": "host"}, "bfloat16", Scheme("rtn", 8.0, act_bits=8), "not rounded to 8 bits"),
        ({"execution": "hobbit"}, "float32", None, "name their quantization, as in low=int4"),
        ({"execution": "hobbit", "low": "int5"}, "float32", None, "unknown quantization 'int5': did you mean"),
        ({"execution": "hobbit", "low": "gptq"}, "float32", None, "low=gptq is calibrated"),
        ({"execution": "hobbit", "low": "int4"}, "bfloat16", INT8, "are made of dense experts"),
        ({"execution": "hobbit", "low": "int4", "tier": "host"}, "float32", None, "from a file; use tier=disk"),
        ({"execution": "defer:x"}, "float32", None, "defer:x"),
        ({"execution": "deferr"}, "float32", None, "unknown execution 'deferr': did you mean 'defer'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(params, dtype, scheme, words):
    stores = {0: experts(0, getattr(torch, dtype), scheme)}
    answer = backend("offload", **params).supports(specs_of(stores, dtype)[0])
    assert isinstance(answer, Refusal)
    assert words in answer.reason
    assert "\n" not in answer.reason
    assert not answer.reason.endswith(".")


def test_a_file_without_copies_of_few_bits_is_refused(model):
    file, stores = model
    with pytest.raises(MoebenchError, match="has no copies of few bits; write it with them"):
        open_offload(file, specs_of(stores), plugins.Offload(execution="hobbit"))


def test_groups_that_do_not_divide_are_told_with_the_name(held):
    stores = {0: experts(0)}
    with pytest.raises(MoebenchError, match=r"low=int4: .*choose another quantization"):
        backend("offload", execution="hobbit", low="int4").load(stores, specs_of(stores))
