"""Hash and THOR: nothing is learned, every token has one expert with weight 1."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.router_params.lookup import DESCRIPTORS, Hash, Thor
from moebench.moe.routers.lookup import balanced_table, random_table
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("hash", Hash(), {}),
    ("hash", Hash(table="balanced", vocabulary=500), {}),
    ("thor", Thor(), {}),
    ("thor", Thor(draw="segment"), {}),
]
SHAPE = ModelShape(32, 8, 16, 2, (0, 1), Selection("softmax", 2, True))
TOKENS = 48
every_variant = pytest.mark.parametrize(("name", "params", "changes"), VARIANTS)


def build(name, params, seed=0, **changes):
    shape = SHAPE.with_(**changes)
    gate_up, down = torch.zeros(shape.experts, 16, 32), torch.zeros(shape.experts, 32, 8)
    factory = next(descriptor.factory for descriptor in DESCRIPTORS if descriptor.name == name)
    return load_attribute(factory)(params)(LayerWeights(gate_up, down), shape, seed)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def context(seed=0, tokens=TOKENS, **changes):
    ids_T = torch.randint(500, (tokens,), generator=generator(7))
    segment_T = torch.arange(tokens) // 12
    return Context(rng=generator(seed), token_ids_T=ids_T, segment_T=segment_T, **changes)


def experts_of(routing):
    """The expert of every token; fails where a token has none or more than one."""
    indices_T1, weights_T1 = routing.padded()
    assert indices_T1.shape == (routing.num_tokens, 1)
    assert (weights_T1 == 1).all()
    return indices_T1[:, 0]


@every_variant
def test_one_expert_with_weight_one_and_nothing_to_learn(name, params, changes):
    bundle = build(name, params, **changes)
    expert_T = experts_of(bundle.router(torch.zeros(TOKENS, 32), context()))
    assert bundle.kinds == ("ffn",) * SHAPE.experts
    assert (expert_T < SHAPE.experts).all()
    assert not list(bundle.router.parameters())
    assert params.selection(SHAPE) is None
    assert params.max_k(SHAPE) == 1


@every_variant
def test_invalid_tokens_have_no_entries(name, params, changes):
    router = build(name, params, **changes).router
    valid_T = torch.arange(TOKENS) % 3 != 0
    routing = router(torch.zeros(TOKENS, 32), context(valid_T=valid_T))
    assert torch.equal(routing.k_T, valid_T.long())
    whole = router(torch.zeros(TOKENS, 32), context())
    assert torch.equal(routing.to_dense()[valid_T], whole.to_dense()[valid_T])


@every_variant
def test_no_tokens(name, params, changes):
    routing = build(name, params, **changes).router(torch.zeros(0, 32), context(tokens=0))
    assert (routing.shape, len(routing.token_N)) == ((0, 16), 0)


@every_variant
def test_an_absent_field_is_named(name, params, changes):
    router = build(name, params, **changes).router
    for field in sorted(router.needs):
        ctx = context()
        ctx = replace(ctx, **{field: None})
        with pytest.raises(ValueError, match=f"'{field}'"):
            router(torch.zeros(TOKENS, 32), ctx)


def test_hash_is_a_function_of_the_id_alone():
    router = build("hash", Hash(vocabulary=500)).router
    ctx = context()
    expert_T = experts_of(router(torch.randn(TOKENS, 32, generator=generator()), ctx))
    assert torch.equal(expert_T, router.table_V[ctx.token_ids_T])
    assert torch.equal(expert_T, experts_of(router(torch.zeros(TOKENS, 32), ctx)))
    assert not torch.equal(random_table(500, 16, seed=0), random_table(500, 16, seed=1))


def test_an_id_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"must lie in \[0, 400\)"):
        build("hash", Hash(vocabulary=400)).router(torch.zeros(TOKENS, 32), context())


def test_one_id_per_token():
    with pytest.raises(ValueError, match=r"'token_ids_T' is \(48,\) for 3 tokens"):
        build("hash", Hash()).router(torch.zeros(3, 32), context())


def test_balanced_table_by_hand():
    """5 goes to expert 0, 4 and then 2 to expert 1; 1 finds 5 against 6."""
    assert balanced_table(torch.tensor([1.0, 5.0, 4.0, 2.0]), 2).tolist() == [0, 0, 1, 1]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=80), st.integers(1, 8))
def test_greedy_loads_differ_by_one_id_at_most(frequencies, experts):
    frequency_V = torch.tensor(frequencies, dtype=torch.float64)
    load_E = torch.zeros(experts, dtype=torch.float64).index_add(0, balanced_table(frequency_V, experts), frequency_V)
    assert load_E.max() - load_E.min() <= frequency_V.max()


def test_balanced_table_evens_out_what_a_random_one_does_not():
    """Zipf frequencies with exponent 0.7 over 5000 ids and 16 experts."""
    frequency_V = torch.arange(1, 5001, dtype=torch.float64) ** -0.7
    tables = (balanced_table(frequency_V, 16), random_table(5000, 16, seed=0))
    even, random = (torch.zeros(16, dtype=torch.float64).index_add(0, table_V, frequency_V) for table_V in tables)
    assert even.max() / even.mean() < 1.001
    assert random.max() / random.mean() > 1.05


def test_thor_trains_one_expert_per_batch():
    router = build("thor", Thor()).router
    drawn = [experts_of(router(torch.zeros(TOKENS, 32), context(seed, training=True))).unique() for seed in range(40)]
    assert all(len(expert) == 1 for expert in drawn)
    assert len({int(expert) for expert in drawn}) > 8


def test_thor_is_balanced_at_inference():
    """The largest load is 1.125 times the mean at T=4096, E=16 with one seed; about 1.1 is expected."""
    routing = build("thor", Thor()).router(torch.zeros(4096, 32), Context(rng=generator()))
    assert routing.counts_E.max() / 256 < 1.25


def test_thor_draws_per_segment():
    router = build("thor", Thor(draw="segment")).router
    expert_ST = experts_of(router(torch.zeros(TOKENS, 32), context())).view(4, 12)
    assert (expert_ST == expert_ST[:, :1]).all()
    assert len(expert_ST[:, 0].unique()) > 1


def test_thor_repeats_with_the_generator():
    router = build("thor", Thor()).router
    first, again, other = (experts_of(router(torch.zeros(TOKENS, 32), context(seed))) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="vocabulary=0"):
        Hash(vocabulary=0)
