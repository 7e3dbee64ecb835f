"""Duplex: an expert goes to the packed or to the dequantized product by its tokens, and where that turns is found."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.backends import duplex
from moebench.backends.crossover import ROUNDS, Split, crossover, is_faster, split
from moebench.contracts import MoebenchError, Scheme
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.oracle import compare, reference

INT8, INT4 = Scheme("rtn", 8.0), Scheme("rtn", 4.0, 32, symmetric=False)
ARCHETYPES = ("dynamic_k", "empty", "hot", "signed", "dropped")
NEVER = 10**9

relaxed = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
layers = given(
    schemes=st.lists(st.sampled_from([INT8, INT4]), min_size=6, max_size=6),
    archetype=st.sampled_from(ARCHETYPES),
    count=st.sampled_from([0, 1, 3, 17]),
    boundary=st.sampled_from(["topk", "sorted"]),
    seed=st.integers(0, 2**20),
    sparse=st.booleans(),
)


def mixture(lab, schemes, seed=0, sparsity=None):
    dense = lab.store(seed, torch.bfloat16)
    rounded = {
        name: tuple(
            round_to_nearest(weight, scheme) for weight, scheme in zip(getattr(dense, name), schemes, strict=True)
        )
        for name in ("gate_up", "down")
    }
    return dataclasses.replace(dense, sparsity=sparsity, **rounded)


def loaded(lab, store, **params):
    """A session of one layer, on a duplex with these parameters."""
    spec = lab.spec(store, "bfloat16", boundary=params.pop("boundary", "topk"), tokens=params.pop("tokens", None))
    return lab.backend("duplex", **params).load({0: store}, {0: spec})


# --- what is computed ------------------------------------------------------------------------------------------------


@relaxed
@layers
def test_dequantizing_all_is_grouped_and_none_is_packed_bit_for_bit(
    lab, schemes, archetype, count, boundary, seed, sparse
):
    store = mixture(lab, schemes, seed % 7, lab.sparsity() if sparse else None)
    x_TH = lab.tokens(count, torch.bfloat16, seed)
    inputs = lab.inputs(lab.routing(archetype, count, seed), boundary)
    for given_crossover, name in ((0, "grouped"), (1, "grouped"), (NEVER, "packed")):
        expected = lab.executor(name, store, lab.spec(store, "bfloat16", boundary))(x_TH, *inputs)
        actual = loaded(lab, store, crossover=given_crossover, boundary=boundary).layer(0)(x_TH, *inputs)
        assert torch.equal(actual, expected)


@relaxed
@layers
def test_every_crossover_agrees_with_the_oracle(lab, schemes, archetype, count, boundary, seed, sparse):
    store = mixture(lab, schemes, seed % 7, lab.sparsity() if sparse else None)
    x_TH, routing = lab.tokens(count, torch.bfloat16, seed), lab.routing(archetype, count, seed)
    run = loaded(lab, store, crossover=seed % 20, boundary=boundary).layer(0)
    out_TH = torch.full_like(x_TH, float("nan"))
    run(x_TH, *lab.inputs(routing, boundary), out_TH=out_TH)
    verdict = compare(out_TH, reference(store, routing, x_TH), torch.bfloat16)
    assert verdict.ok, verdict


@relaxed
@given(bound=st.integers(0, 18), seed=st.integers(0, 2**20))
def test_each_expert_goes_where_its_tokens_say(lab, bound, seed):
    store, routing = mixture(lab, [INT8, INT4] * 3), lab.routing("dynamic_k", 17, seed)
    run = loaded(lab, store, crossover=bound).layer(0)
    went = {}
    for side in ("cold", "hot"):
        getattr(run, side).add_sorted = lambda y_TH, x_TH, token_N, offsets_E1, weight_N, side=side: went.update(
            {side: (token_N, offsets_E1, weight_N)}
        )
    run(lab.tokens(17, torch.bfloat16, seed), *lab.inputs(routing, "topk"))
    hot_N = (routing.counts_E >= bound)[routing.expert_N]
    for side, entries in (("hot", routing.keep(hot_N)), ("cold", routing.keep(~hot_N))):
        assert all(torch.equal(sent, own) for sent, own in zip(went[side], entries.sorted(), strict=True))


@relaxed
@given(bound=st.integers(1, 6), beyond=st.integers(0, 40), seed=st.integers(0, 2**20))
def test_hot_experts_of_a_kind_pay_for_the_call_together_or_stay_packed(lab, bound, beyond, seed):
    run = loaded(lab, mixture(lab, [INT8, INT4] * 3), crossover=bound).layer(0)
    run.beyond_K[:] = beyond
    counts_E = lab.routing("dynamic_k", 17, seed).counts_E
    hot_E = run._hot(counts_E)
    for kind in ([0, 2, 4], [1, 3, 5]):
        more = [int(counts_E[expert]) - bound for expert in kind]
        pays = sum(max(number, 0) for number in more) >= beyond
        assert hot_E[kind].tolist() == [pays and number >= 0 for number in more]


# --- where it turns --------------------------------------------------------------------------------------------------


@given(limit=st.integers(0, 300), turn=st.integers(1, 320))
def test_a_predicate_that_turns_once_is_met_exactly_and_asked_seldom(limit, turn):
    asked = []
    assert crossover(lambda tokens: asked.append(tokens) or tokens >= turn, limit) == min(turn, limit + 1)
    assert all(1 <= tokens <= limit for tokens in asked)
    assert len(asked) == len(set(asked)) <= 2 * limit.bit_length() + 1


@given(tokens=st.integers(1, 60), steps=st.integers(0, 20))
def test_two_crossovers_tell_the_price_of_a_token_from_that_of_a_call(tokens, steps):
    beyond = 16 * steps  # tokens that pay for a call: shared by 4 and by 16 experts without a rest
    assert split(4, tokens + beyond // 4, 16, tokens + beyond // 16, 500) == Split(tokens, beyond)


@pytest.mark.parametrize(("few", "at_few", "many", "at_many"), [(4, 9, 4, 9), (2, 9, 2, 9), (4, 5, 16, 9)])
def test_one_crossover_alone_or_one_that_falls_with_fewer_experts_leaves_the_call_free(few, at_few, many, at_many):
    assert split(few, at_few, many, at_many, 64) == Split(at_many)


def test_few_experts_that_are_never_hot_do_not_tell_the_price_of_a_call(lab, monkeypatch):
    assert split(4, 257, 16, 9, 256) == Split(9, few_to=256)
    assert split(4, 256, 16, 9, 256) == Split(1, 128)
    assert split(4, 257, 16, 257, 256) == Split(257)

    def only_many(hot, cold):
        offsets_E1 = next(hot.args[1])[3]
        return int((offsets_E1.diff() > 0).sum()) > duplex.FEW

    monkeypatch.setattr(duplex, "is_faster", only_many)
    session = loaded(lab, mixture(lab, [INT8] * 6), tokens=64)
    assert set(session.layer(0).splits.values()) == {Split(1, few_to=64)}
    assert "from measured 1 (int8, few experts: not up to 64) tokens per expert on" in session.executed().notes


@pytest.mark.parametrize(("cost", "faster"), [((3, 5), True), ((5, 3), False), ((4, 4), False)])
def test_the_faster_of_two_is_found_in_turns_and_a_first_call_is_free(cost, faster):
    now, order = [0], []

    def call(name, price):
        def run():
            now[0] += price if name in order else 1000
            order.append(name)

        return run

    assert is_faster(call("a", cost[0]), call("b", cost[1]), lambda: now[0]) is faster
    assert order[:2] == ["a", "b"]
    assert order[2:] == [name for turn in range(ROUNDS) for name in ("ab" if turn % 2 else "ba")]


def test_one_slow_call_decides_nothing():
    calls, now = [], [0]

    def candidate():
        calls.append(1)
        now[0] += 10**6 if len(calls) == 4 else 2

    def other():
        now[0] += 3

    assert is_faster(candidate, other, lambda: now[0])


def test_kinds_of_experts_are_measured_apart_on_the_layers_own_experts(lab, monkeypatch):
    seen = []

    def turn_at(number):
        def is_faster(hot, cold):
            calls = list(hot.args[1])
            assert all(a is b for a, b in zip(calls, cold.args[1], strict=True))
            loads = [offsets_E1.diff().tolist() for _, _, _, offsets_E1, _ in calls]
            tokens = max(loads[0])
            seen.append(({sum(load) // tokens for load in loads}, {e for load in loads for e in range(6) if load[e]}))
            return tokens >= (number if seen[-1][1] == {0} else 2 * number)

        return is_faster

    monkeypatch.setattr(duplex, "is_faster", turn_at(7))
    session = loaded(lab, mixture(lab, [INT8, *[INT4] * 5]), tokens=64)
    assert session.layer(0).splits == {
        (("aten::_weight_int8pack_mm", None),) * 2: Split(7),
        (("aten::_weight_int4pack_mm_for_cpu", 32),) * 2: Split(14),
    }
    assert ({1}, {0}) in seen
    assert ({5}, {1, 2, 3, 4, 5}) in seen
    assert ({duplex.FEW}, {1, 2, 3, 4, 5}) in seen  # the five of int4 in turns
    assert "from measured 7 (int8), 14 (int4 in groups of 32) tokens per expert on" in session.executed().notes


@pytest.mark.parametrize(("tokens", "most"), [(None, duplex.LIMIT), (10**6, duplex.LIMIT), (5, 5)])
def test_no_more_tokens_are_tried_than_a_call_will_have(lab, monkeypatch, tokens, most):
    tried = []
    monkeypatch.setattr(duplex, "is_faster", lambda hot, cold: tried.append(len(next(hot.args[1])[1])))
    executor = loaded(lab, mixture(lab, [INT8] * 6), tokens=tokens).layer(0)
    assert max(tried) == most
    assert set(executor.splits.values()) == {Split(most + 1)}


def test_a_real_measurement_leaves_the_random_numbers_alone_and_is_told(lab):
    store = mixture(lab, [INT8] * 6)
    state = torch.random.get_rng_state()
    session = loaded(lab, store, tokens=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    (found,) = session.layer(0).splits.values()
    assert 1 <= found.tokens <= 9
    assert session.executed().notes.startswith(f"layer 0: dequantized from measured {found.tokens} (int8")


# --- what is told ----------------------------------------------------------------------------------------------------


def test_both_forms_are_counted_and_said(lab):
    store = mixture(lab, [INT8] * 3 + [INT4] * 3)
    session = loaded(lab, store, crossover=5)
    packed = 3 * 3 * 32 * (32 + 2) + 3 * 3 * 32 * (16 + 4)
    dequantized = 6 * 3 * 32 * 32 * 2
    assert session.resident_bytes() == packed + dequantized
    executed = session.executed()
    assert executed.weights == lab.backend("duplex").supports(lab.spec(store, "bfloat16")).weights == "dequantized"
    held = f"{packed / 2**20:.2f} MiB of packed and {dequantized / 2**20:.2f} MiB of dequantized weights held"
    assert executed.notes.endswith(held)


@pytest.mark.parametrize(
    ("bound", "tokens", "packed", "grouped"),
    [(0, 8, False, True), (1, None, False, True), (5, 8, True, True), (9, 8, True, False), (NEVER, None, True, True)],
)
def test_only_kernels_that_can_run_are_named(lab, bound, tokens, packed, grouped):
    kernels = loaded(lab, mixture(lab, [INT8] * 6), crossover=bound, tokens=tokens).executed().kernels
    assert ("aten::_weight_int8pack_mm" in kernels, "aten::_grouped_mm" in kernels) == (packed, grouped)


def test_a_mixture_with_an_expert_that_no_kernel_reads_names_it_at_load(lab):
    store = mixture(lab, [INT8] * 5 + [Scheme("rtn", 2.0, 32)])
    spec = lab.spec(store, "bfloat16", schemes=(Scheme("mixed", 7.0),) * 6)
    with pytest.raises(MoebenchError, match="expert 5 cannot be packed"):
        lab.backend("duplex").load({0: store}, {0: spec})
