"""Controllers: one step by hand, and where many steps lead."""

import pytest
import torch

from moebench.contracts import Selection
from moebench.moe.controllers import AdaptiveRule, AdaptiveState, adaptive_step, bias_step, lambda_step
from moebench.moe.router import select
from moebench.moe.routing import Context, Routing


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def of_load(*load):
    expert_T = torch.repeat_interleave(torch.arange(len(load)), torch.tensor(load))
    return Routing.topk(expert_T[:, None], torch.ones(len(expert_T), 1), len(load))


# --- aux-free bias ---------------------------------------------------------------------------------------------------


def test_bias_moves_one_step_against_the_load():
    bias_E = torch.tensor([0.5, 0.0, -0.5, 0.0])
    moved_E = bias_step(bias_E, of_load(6, 0, 2, 0), rate=0.25)
    assert moved_E.tolist() == [0.25, 0.25, -0.5, 0.25]
    assert bias_E.tolist() == [0.5, 0.0, -0.5, 0.0], "a pure function"


def test_bias_flattens_a_skewed_load():
    """R6 (DeepSeekV3): offsets -2 to 2 on logits of 16 experts, 400 updates of 0.005: 4.4 -> 1.11 (said: 4.38 -> 1.08).

    What is left is the last step itself, to and fro: scores lie so close that 0.005 is a tenth of the load.
    """
    rule = Selection("sigmoid", 2, True, bias=True)
    offset_E, bias_E = torch.linspace(-2, 2, 16), torch.zeros(16)

    def routing_of(step, tokens=4096):
        indices_TK, weights_TK = select(seeded(tokens, 16, seed=step) + offset_E, rule, bias_E)
        return Routing.topk(indices_TK, weights_TK, 16)

    def imbalance(routing):
        return float(routing.counts_E.max() / routing.counts_E.float().mean())

    before = imbalance(routing_of(1000, tokens=65536))
    for step in range(400):
        bias_E = bias_step(bias_E, routing_of(step), 0.005)
    assert before == pytest.approx(4.4, abs=0.1)
    assert imbalance(routing_of(1000, tokens=65536)) < 1.13
    for step in range(400, 600):
        bias_E = bias_step(bias_E, routing_of(step), 0.0005)
    assert imbalance(routing_of(1000, tokens=65536)) < 1.03


# --- ReMoE's lambda --------------------------------------------------------------------------------------------------


def of_k(k, tokens=8, experts=16):
    return Routing.topk(torch.arange(k).expand(tokens, k), torch.ones(tokens, k), experts)


@pytest.mark.parametrize(("k", "factor"), [(5, 1.2), (4, 1.0), (3, 1 / 1.2)])
def test_lambda_grows_while_too_many_experts_are_active(k, factor):
    assert lambda_step(1e-8, [of_k(k)], 4) == pytest.approx(1e-8 * factor)


def test_lambda_is_shared_by_the_layers_that_are_given():
    assert lambda_step(1.0, [of_k(2), of_k(6)], 4) == 1.0
    assert lambda_step(1.0, [of_k(2), of_k(7)], 4, growth=2.0) == 2.0


def test_lambda_does_not_count_padding():
    valid_T = torch.arange(8) < 4
    routing = of_k(4).keep(torch.arange(32) < 16)
    assert lambda_step(1.0, [routing], 4, Context(valid_T=valid_T)) == 1.0
    assert lambda_step(1.0, [routing], 4) == pytest.approx(1 / 1.2)


def test_lambda_steers_relu_gates_to_k():
    """Logits that an L1 of strength lambda pushes down settle where k of 16 experts are active."""
    z_TE, shift, value = seeded(512, 16, seed=3), 0.0, 1e-3
    for _ in range(600):
        routing = Routing.dense((z_TE - shift).relu())
        value = lambda_step(value, [routing], 4)
        shift += 0.05 * (value - 0.2 * shift)  # the task pulls back
    assert len(routing.token_N) / 512 == pytest.approx(4, abs=1.5)


def test_lambda_must_be_positive():
    with pytest.raises(ValueError, match="start at a positive one"):
        lambda_step(0.0, [of_k(4)], 4)


# --- BlockFFN's schedule ---------------------------------------------------------------------------------------------


RULE = AdaptiveRule(start=6, window=3)


def run(losses, rule=RULE, first=2.0):
    """The coefficient before each step, and after the last."""
    state, seen = AdaptiveState.at(first), []
    for loss in losses:
        seen.append(state.coefficient(rule))
        state = adaptive_step(rule, state, loss)
    return [*seen, state.coefficient(rule)], state


def test_the_coefficient_waits_and_then_follows_the_ratio_of_mean_losses():
    seen, state = run([1.0] * 3 + [1.5] * 3 + [1.5] * 3)
    assert seen[:7] == [2.0] * 7
    assert seen[7:] == pytest.approx([2 + 1 / 3, 2 + 2 / 3, 3.0])
    assert state.goal == 3.0


def test_a_slow_rise_counts_as_the_least_ratio_and_a_fall_as_it_is():
    assert run([1.0] * 3 + [1.001] * 3)[1].goal == pytest.approx(2 * 1.025)
    assert run([1.0] * 6)[1].goal == 2.0
    assert run([1.0] * 3 + [0.9] * 3)[1].goal == pytest.approx(2 * 0.9)


def test_the_coefficient_is_capped():
    seen, state = run([2.0**window for window in range(9) for _ in range(3)])
    assert state.goal == 8.0
    assert max(seen) == 8.0


def test_the_mean_is_that_of_the_window():
    assert run([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])[1].goal == pytest.approx(4.0)


def test_published_numbers_are_the_defaults():
    assert AdaptiveRule() == AdaptiveRule(1000, 100, 1.025, 4.0)
    with pytest.raises(ValueError, match="must hold two windows"):
        AdaptiveRule(start=100, window=100)
