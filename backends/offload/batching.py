"""Which tokens are computed together, and in which order: batches that share experts, experts one by one. No torch."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from itertools import pairwise
from typing import TypeVar

Expert = TypeVar("Expert", bound=Hashable)


def fifo_rounds(arrivals: Sequence[int], size: int) -> list[int]:
    """Return the round in which each token is served first come, first served, ``size`` at most a round.

    ``arrivals`` are the rounds from which tokens wait, not falling.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 token a batch.")
    if any(a > b for a, b in pairwise(arrivals)):
        raise ValueError("arrivals must not fall.")
    rounds: list[int] = []
    for place, arrival in enumerate(arrivals):
        after = rounds[place - size] + 1 if place >= size else arrival
        rounds.append(max(arrival, after, rounds[-1] if rounds else arrival))
    return rounds


def expert_aware(
    tokens: Sequence[Collection[Expert]], size: int, patience: int, arrivals: Sequence[int] | None = None
) -> dict[int, list[int]]:
    """Return batches, of places in ``tokens`` and by round, that need few distinct experts (Read-ME, NeurIPS 2024).

    ``tokens`` are the experts that each will need in all layers, known ahead by pre-gating. A batch begins with those
    that may wait no longer, else with the oldest; whoever adds the fewest experts comes next, of these the oldest.
    [reconstructed] Read-ME has no bound on waiting. Here nobody is served more than ``patience`` rounds after the round
    of first come, first served, and as many are served in each round: at most ``size`` tokens have the same round
    there, so at most so many may wait no longer at a time, and all of them fit. With ``patience`` 0 the batches are
    those of first come, first served.
    """
    arrivals = [0] * len(tokens) if arrivals is None else arrivals
    if patience < 0:
        raise ValueError(f"patience={patience} must be at least 0 rounds.")
    if len(arrivals) != len(tokens):
        raise ValueError(f"{len(arrivals)} arrivals and {len(tokens)} tokens must be as many.")
    latest = [served + patience for served in fifo_rounds(arrivals, size)]
    queue, now = list(range(len(tokens))), 0
    batches: dict[int, list[int]] = {}
    while queue:
        now = max(now, arrivals[queue[0]])
        here = [token for token in queue if arrivals[token] <= now]
        batch = [token for token in here if latest[token] <= now] or here[:1]
        needed: set[Expert] = set().union(*(tokens[token] for token in batch))
        rest = [token for token in here if token not in batch]
        while rest and len(batch) < size:
            best = min(rest, key=lambda token: (len(set(tokens[token]) - needed), token))
            rest.remove(best)
            batch.append(best)
            needed |= set(tokens[best])
        batches[now] = sorted(batch)
        queue = [token for token in queue if token not in batch]
        now += 1
    return batches


def first_come(
    tokens: Sequence[Collection[Expert]], size: int, arrivals: Sequence[int] | None = None
) -> dict[int, list[int]]:
    """Return the batches of first come, first served, by round."""
    batches: dict[int, list[int]] = {}
    for token, served in enumerate(fifo_rounds([0] * len(tokens) if arrivals is None else arrivals, size)):
        batches.setdefault(served, []).append(token)
    return batches


def distinct(tokens: Sequence[Collection[Expert]], batch: Sequence[int]) -> int:
    """Return how many distinct experts a batch needs."""
    return len(set().union(*(tokens[token] for token in batch)))
