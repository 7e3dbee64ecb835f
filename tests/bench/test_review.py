"""What a turn must not allow: an answer kept from another call, or a sample that says more than was done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.bench.sampling import MAX_CALLS, whole_rounds
from moebench.bench.worker import _Held
from moebench.contracts import Check

# ---------------------------------------------------------------------------------------------------------------------
# Rounds


class Rounds:
    """A trial that writes down what the engine asks of it."""

    def __init__(self, steps):
        self.steps, self.asked = steps, []

    def begin_turn(self):
        self.asked.append("begin")

    def run(self, step):
        self.asked.append(step)
        return (step, len(self.asked))

    def verify(self, step, output):
        return Check(output[0] == step, 0.0, flips=1)


@pytest.mark.parametrize("residency", ["warm", "cold"])
@pytest.mark.parametrize(("steps", "calls", "first"), [(3, 9, 0), (3, 9, 2), (1, 4, 0), (5, 4, 3), (3, 7, 1)])
def test_no_input_is_used_twice_without_being_exchanged(steps, calls, first, residency, case):
    trial = Rounds(steps)
    held = _Held(trial, case(residency=residency))
    reply = held.turn(first, calls)
    assert len(reply["ns"]) == calls
    timed = trial.asked[1:] if residency == "warm" else trial.asked  # the untimed call comes before the first exchange
    rounds = " ".join(map(str, timed)).split("begin")[1:]
    assert [step for part in rounds for step in map(int, part.split())] == [(first + n) % steps for n in range(calls)]
    assert all(len(set(part.split())) == len(part.split()) for part in rounds)
    check = held.verify()
    assert check.ok
    assert check.flips == len(rounds[-1].split())  # every output of the last round, and no output that was exchanged


@given(st.integers(1, 10**6), st.integers(1, 2000))
def test_a_turn_of_several_rounds_has_whole_ones(calls, steps):
    rounded = whole_rounds(calls, steps)
    assert 1 <= rounded <= MAX_CALLS
    assert rounded <= steps or rounded % steps == 0
    assert rounded >= min(calls, MAX_CALLS - steps + 1)
