"""Batches that share experts, with their bound on waiting, and experts that are computed one by one."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.offload.batching import (
    distinct,
    expert_aware,
    fifo_rounds,
    first_come,
)

TOKENS = st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=25)


@given(tokens=TOKENS, size=st.integers(1, 5), patience=st.integers(0, 6), data=st.data())
@settings(max_examples=150, deadline=None)
def test_everybody_is_served_once_and_nobody_waits_longer_than_allowed(tokens, size, patience, data):
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(tokens), max_size=len(tokens)))
    arrivals = [sum(gaps[: place + 1]) for place in range(len(gaps))]
    served = fifo_rounds(arrivals, size)
    batches = expert_aware(tokens, size, patience, arrivals)
    assert sorted(token for batch in batches.values() for token in batch) == list(range(len(tokens)))
    for now, batch in batches.items():
        assert 0 < len(batch) <= size
        assert all(arrivals[token] <= now <= served[token] + patience for token in batch)
    in_turn = first_come(tokens, size, arrivals)
    assert {now: len(batch) for now, batch in batches.items()} == {now: len(batch) for now, batch in in_turn.items()}
    if patience == 0:
        assert batches == in_turn


def test_first_come_is_served_first():
    assert fifo_rounds([0, 0, 0, 5, 5], 2) == [0, 0, 1, 5, 5]
    assert fifo_rounds([0, 0, 0, 1], 2) == [0, 0, 1, 1]
    assert first_come([{0}] * 3, 2) == {0: [0, 1], 1: [2]}


def test_tokens_of_the_same_experts_come_together():
    tokens = [{0, 1}, {2, 3}, {0, 1}, {2, 3}]
    assert expert_aware(tokens, 2, patience=1) == {0: [0, 2], 1: [1, 3]}
    assert expert_aware(tokens, 2, patience=0) == {0: [0, 1], 1: [2, 3]}
    assert distinct(tokens, [0, 2]) == 2
    assert distinct(tokens, [0, 1]) == 4


def test_batches_of_a_mixed_queue_need_fewer_experts_the_longer_tokens_may_wait():
    rng = random.Random(4)
    groups = [rng.sample(range(64), 8) for _ in range(4)]
    tokens = [set(rng.sample(groups[rng.randrange(4)], 4)) for _ in range(160)]

    def needed(batches):
        return sum(distinct(tokens, batch) for batch in batches.values())

    found = [needed(expert_aware(tokens, 8, patience)) for patience in (0, 2, 8, 40)]
    assert needed(first_come(tokens, 8)) == found[0]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.6 * found[0]
