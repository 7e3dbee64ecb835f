"""Controllers: what training changes outside autograd, as pure functions from a state and what was seen to a state.

Shape letters: T tokens, E expert ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .balance.rows import valid_tokens
from .routing import Context, Routing


def bias_step(bias_E: Tensor, routing: Routing, rate: float = 0.001) -> Tensor:
    """Return b_e + rate * sign(mean load - load_e): aux-loss-free balance (DeepSeek-V3, arXiv 2412.19437).

    ``bias_E`` float32 is added to scores for selection only.
    """
    load_E = routing.counts_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(load_E.mean() - load_E)


def lambda_step(
    value: float, routings: Sequence[Routing], k: float, ctx: Context | None = None, growth: float = 1.2
) -> float:
    """Return lambda * growth ** sign(target - sparsity): ReMoE's coefficient of ``l1`` (arXiv 2412.14711).

    Sparsity is the share of (token, expert) pairs without an entry, averaged over the layers that share the
    coefficient (``routings``), and the target is 1 - k / E. ReMoE starts at 1e-8.
    """
    if value <= 0:
        raise ValueError(f"a coefficient of {value} cannot grow by a factor; start at a positive one, such as 1e-8.")
    tokens = [int(valid_tokens(routing, ctx).sum()) for routing in routings]
    pairs = [count * routing.num_experts for count, routing in zip(tokens, routings, strict=True)]
    active = [len(routing.token_N) / max(pair, 1) for pair, routing in zip(pairs, routings, strict=True)]
    target = [k / routing.num_experts for routing in routings]
    excess = sum(active) - sum(target)
    return value * growth ** ((excess > 0) - (excess < 0))


@dataclass(frozen=True)
class AdaptiveRule:
    """BlockFFN's schedule of a loss's coefficient (arXiv 2507.08771): it grows while the loss grows.

    After ``start`` steps, at the end of every ``window`` steps, the ratio of the window's mean loss to that of the
    window before becomes the ratio by which the coefficient moves, evenly over the next window. A ratio above 1 counts
    as at least ``least``; the coefficient never passes ``most`` times its first value.
    """

    start: int = 1000
    window: int = 100
    least: float = 1.025
    most: float = 4.0

    def __post_init__(self) -> None:
        if self.window < 1 or self.start < 2 * self.window or min(self.least, self.most) < 1:
            raise ValueError(
                f"start={self.start} must hold two windows of {self.window} steps, and least={self.least} and "
                f"most={self.most} be at least 1."
            )


@dataclass(frozen=True)
class AdaptiveState:
    """Where the schedule stands: the coefficient moves from ``origin`` to ``goal`` within a window.

    ``first`` is the coefficient at the start, ``step`` the steps taken, ``losses`` the sum of the losses of the window
    so far, and ``before`` the mean of the window before.
    """

    first: float
    origin: float
    goal: float
    step: int = 0
    losses: float = 0.0
    before: float | None = None

    @classmethod
    def at(cls, coefficient: float) -> AdaptiveState:
        """Return the state before the first step."""
        return cls(coefficient, coefficient, coefficient)

    def coefficient(self, rule: AdaptiveRule) -> float:
        """Return what the loss is multiplied by in the next step."""
        return self.origin + (self.goal - self.origin) * (self.step % rule.window) / rule.window


def adaptive_step(rule: AdaptiveRule, state: AdaptiveState, loss: float) -> AdaptiveState:
    """Return the state after a step whose loss, not multiplied by the coefficient, was ``loss``."""
    step, losses = state.step + 1, state.losses + loss
    if step % rule.window:
        return replace(state, step=step, losses=losses)
    mean = losses / rule.window
    goal = state.goal
    if step >= rule.start and state.before:
        ratio = mean / state.before
        goal = min(state.goal * (max(ratio, rule.least) if ratio > 1 else ratio), state.first * rule.most)
    return AdaptiveState(state.first, state.goal, goal, step, 0.0, mean)
