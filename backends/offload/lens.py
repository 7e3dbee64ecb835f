"""MoE-Lens (arXiv 2504.09345): how fast a model whose weights are streamed each iteration can generate, by its memory.

[reconstructed] The paper's terms are known here, its equations are derived anew. All requests have ``prompt`` tokens
and generate ``generated``; every iteration streams all weights to the device, which takes delta. An iteration that
processes n tokens takes at least delta and at least the device's time for n tokens, so that only from n_sat on the
device is busy; how many tokens there are to process is bounded by the memory that their keys and values take. Imports
no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Streaming:
    """A model on a machine: bytes and FLOPs, per second where it says so.

    ``kv_bytes`` is the memory for keys and values, ``kv_per_token`` what a token takes there, ``kv_bandwidth`` how fast
    they are read when attention is computed where they lie.
    """

    weight_bytes: float
    bandwidth: float
    flops: float
    flops_per_token: float
    kv_bytes: float
    kv_per_token: float
    kv_bandwidth: float = math.inf

    @property
    def delta(self) -> float:
        """Seconds of streaming all weights once."""
        return self.weight_bytes / self.bandwidth

    @property
    def n_sat(self) -> float:
        """Tokens of an iteration from which the device is busy all the time."""
        return self.flops * self.delta / self.flops_per_token


@dataclass(frozen=True)
class Load:
    """Requests of one length: prompt tokens, and tokens generated."""

    prompt: int
    generated: int

    def __post_init__(self) -> None:
        if self.prompt < 0 or self.generated < 1:
            raise ValueError(f"prompt={self.prompt} must be at least 0, and generated={self.generated} at least 1.")


def execution_per_memory(load: Load) -> float:
    """Return PME, tokens processed for one token held in memory during one iteration: (p + g) / (g (p + g / 2)).

    A request processes p + g tokens, and holds p + i of them in its i-th iteration. 1/g for p >> g, 2/g without prompt.
    """
    return (load.prompt + load.generated) / (load.generated * (load.prompt + load.generated / 2))


@dataclass(frozen=True)
class StageOne:
    """The bound: most tokens of an iteration by memory, share of the device used, tokens generated per second."""

    n_max: float
    utilisation: float
    throughput: float


def stage_one(machine: Streaming, load: Load) -> StageOne:
    """Return what is reached in the long run, without ramp-up and drain."""
    n_max = execution_per_memory(load) * machine.kv_bytes / machine.kv_per_token
    processed = min(n_max, machine.n_sat) / machine.delta
    utilisation = min(1.0, n_max / machine.n_sat)
    return StageOne(n_max, utilisation, processed * load.generated / (load.prompt + load.generated))


@dataclass
class _Cohort:
    """Requests that were admitted together; ``age`` is the number of tokens that each has generated."""

    requests: int
    age: int = 0


@dataclass(frozen=True)
class StageTwo:
    """A replay: seconds and processed tokens of each iteration, and tokens generated per second over all of it."""

    seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    throughput: float


def stage_two(machine: Streaming, load: Load, requests: int, page: int = 16) -> StageTwo:
    """Return a replay of ``requests`` that wait from the beginning, with memory in pages of ``page`` tokens.

    An iteration streams the weights, computes the prompts of those admitted and one token of each that runs, and reads
    the keys and values of these, all at the same time: it takes as long as the slowest. Requests are admitted as long
    as the device has time to spare, the last prompt may take more than that, and as long as the pages suffice until
    the end of all of them: lengths are known, so nobody is ever thrown out. Never faster than ``stage_one``.
    """
    pages = int(machine.kv_bytes // (machine.kv_per_token * page))
    if _pages(load.prompt + load.generated, page) > pages:
        raise ValueError(f"memory of {pages} pages must hold one request of {load.prompt + load.generated} tokens.")
    running: list[_Cohort] = []
    seconds, tokens, waiting = [], [], requests
    while waiting or running:
        decoding = sum(one.requests for one in running)
        kv_tokens = sum(one.requests * (load.prompt + one.age) for one in running)
        for one in running:
            one.age += 1
        admitted = min(waiting, _admitted(running, decoding, machine, load, page, pages))
        waiting -= admitted
        tokens.append(decoding + admitted * load.prompt)
        compute = tokens[-1] * machine.flops_per_token / machine.flops
        attention = kv_tokens * machine.kv_per_token / machine.kv_bandwidth
        seconds.append(max(machine.delta, compute, attention))
        running = [one for one in running if one.age < load.generated]
        running += [_Cohort(admitted)] if admitted else []
    return StageTwo(tuple(seconds), tuple(tokens), requests * load.generated / sum(seconds) if requests else 0.0)


def _pages(tokens: int, page: int) -> int:
    return -(-tokens // page)


def _admitted(running: Sequence[_Cohort], decoding: int, machine: Streaming, load: Load, page: int, pages: int) -> int:
    """Return how many requests fit, in the device's time and in memory until all that run have ended.

    Memory is fullest when somebody ends; whoever comes now is the last to end.
    """
    spare = machine.n_sat - decoding
    by_time = math.ceil(max(spare, 0) / load.prompt) if load.prompt else pages
    fit = pages // _pages(load.prompt + load.generated, page)
    for ending in running:
        ahead = load.generated - ending.age  # iterations from now to the last one that holds its pages
        held = sum(
            one.requests * _pages(load.prompt + one.age + ahead, page)
            for one in running
            if one.age + ahead <= load.generated
        )
        fit = min(fit, (pages - held) // _pages(load.prompt + ahead, page)) if load.prompt + ahead else fit
    return max(0, min(by_time, fit))
