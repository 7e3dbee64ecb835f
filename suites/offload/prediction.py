"""What is predicted of a run before it is timed: hits by the simulator and by popularity, time by the two-tier model.

Imported by workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...backends.offload import timeline
from ...backends.offload.access import Future
from ...backends.offload.che import inclusion, lru_hit_rate
from ...backends.offload.costs import ExpertCosts
from ...backends.offload.lens import Load, Streaming, stage_two
from ...backends.offload.opening import make_cache
from ...backends.offload.simulate import Simulated
from ...backends.plugins import Offload
from ...contracts import Metric
from .figures import Turn
from .recording import Recording


@dataclass(frozen=True)
class Prediction:
    """The simulated run, and the mean time and stall of a step by the two-tier model; ``bound_s`` is its closed form.

    ``popular`` is the hit rate of an LRU by the popularity of experts alone. ``lens_s`` is an iteration of MoE-Lens, in
    which the bytes that are streamed and the computing of all layers overlap: the longer one.
    """

    simulated: Simulated
    step_s: float
    stall_s: float
    late: float
    bound_s: float
    popular: float
    lens_s: float


def simulated(recording: Recording, params: Offload, costs: ExpertCosts | None = None) -> Simulated:
    """Return what a cache under ``params`` does with the recorded accesses."""
    cache = make_cache(params, recording.layout, Future(recording.accesses), costs, recording.popularity)
    initial = frozenset(cache.resident)
    events = tuple(tuple(cache.access(access)) for access in recording.accesses)
    return Simulated(cache.tally, events, cache.capacity, initial)


def predict(recording: Recording, run: Simulated, costs: timeline.TierCosts) -> Prediction:
    """Predict a run of the recorded accesses."""
    spent = timeline.predict(recording.accesses, run, costs)[recording.prompt_accesses :]
    first = recording.accesses[recording.prompt_accesses].step
    bound = [one for one in timeline.two_tier(recording.accesses, run, costs) if one.step >= first]
    steps, decoded = recording.steps, recording.accesses[recording.prompt_accesses :]
    return Prediction(
        run,
        sum(one.seconds for one in spent) / steps,
        sum(one.stall for one in spent) / steps,
        sum(one.late for one in spent) / steps,
        sum(one.seconds for one in bound) / steps,
        lru_hit_rate(inclusion(decoded, recording.layout), run.capacity),
        _iteration(recording, run, costs),
    )


def _iteration(recording: Recording, run: Simulated, costs: timeline.TierCosts) -> float:
    """Return the mean iteration of MoE-Lens' second stage (arXiv 2504.09345) [reconstructed], keys and values for free.

    What is streamed is what the simulated cache reads, in the mean, and not all weights.
    """
    first = recording.accesses[recording.prompt_accesses].step
    streamed = computing = 0.0
    for access, events in zip(recording.accesses, run.events, strict=True):
        if access.step >= first:
            tokens = dict(zip(access.keys, access.tokens, strict=True))
            uses = [event for event in events if event.kind != "prefetch"]
            streamed += sum(costs.read(event) for event in events)
            computing += costs.other + sum(costs.compute(event, tokens[event.key]) for event in uses)
    sequences = len(recording.final[0])
    machine = Streaming(
        weight_bytes=streamed / recording.steps,  # in seconds, with a bandwidth of one a second
        bandwidth=1.0,
        flops=sequences * recording.steps / computing,  # in tokens
        flops_per_token=1.0,
        kv_bytes=float(sequences * recording.steps),
        kv_per_token=1.0,
    )
    replay = stage_two(machine, Load(0, recording.steps), sequences, page=1)
    return sum(replay.seconds) / len(replay.seconds)


def figures(prediction: Prediction, turns: Sequence[Turn]) -> list[Metric]:
    """Return what was predicted, and its error where something was measured."""
    metrics = [
        Metric("predicted_step_time", prediction.step_s * 1e9, "ns"),
        Metric("predicted_stall_per_step", prediction.stall_s * 1e9, "ns"),
        Metric("predicted_late_per_step", prediction.late, "1"),
        Metric("two_tier_step_time", prediction.bound_s * 1e9, "ns"),
        Metric("lens_step_time", prediction.lens_s * 1e9, "ns"),
        Metric("che_hit_rate", prediction.popular, "1"),
    ]
    steps = sum(len(turn.step_ns) for turn in turns)
    if steps:
        measured = sum(sum(turn.step_ns) for turn in turns) / steps / 1e9
        metrics.append(Metric("prediction_error", abs(prediction.step_s - measured) / measured, "1", n=steps))
    return metrics
