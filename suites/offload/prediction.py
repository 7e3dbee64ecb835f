"""What is predicted of a run before it is timed: hits by the simulator and by Che, time by the two-tier model.

Imported by workers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...backends.offload.access import Event, Future
from ...backends.offload.file import SlabFile
from ...backends.offload.opening import make_cache
from ...backends.plugins import Offload
from ...contracts import Metric
from .figures import Turn
from .probes import Probes
from .recording import Recording


@dataclass(frozen=True)
class Prediction:
    """The simulated events of all accesses, the slots that there are, and the mean time and stall of a step."""

    events: tuple[tuple[Event, ...], ...]
    capacity: int
    step_s: float
    stall_s: float


def simulated(recording: Recording, params: Offload) -> tuple[tuple[tuple[Event, ...], ...], int]:
    """Return what a cache under ``params`` does with the recorded accesses, and its number of slots."""
    cache = make_cache(params, recording.layout, Future(recording.accesses))
    return tuple(tuple(cache.access(access)) for access in recording.accesses), cache.capacity


def predict(recording: Recording, params: Offload, file: SlabFile, probes: Probes) -> Prediction:
    """Predict a run of the recorded accesses."""
    events, capacity = simulated(recording, params)
    stall = 0.0
    for access in events[recording.prompt_accesses :]:
        for event in access:
            if event.kind == "miss" and event.how != "in_place":
                stall += probes.load_s["low" if event.how == "low" else "full"]
    stall /= recording.steps
    return Prediction(events, capacity, probes.step_s + stall, stall)


def figures(prediction: Prediction, turns: Sequence[Turn]) -> list[Metric]:
    """Return what was predicted, and its error where something was measured."""
    steps = sum(len(turn.step_ns) for turn in turns)
    metrics = [
        Metric("predicted_step_time", prediction.step_s * 1e9, "ns"),
        Metric("predicted_stall_per_step", prediction.stall_s * 1e9, "ns"),
    ]
    if steps:
        measured = sum(sum(turn.step_ns) for turn in turns) / steps / 1e9
        metrics.append(Metric("prediction_error", abs(prediction.step_s - measured) / measured, "1", n=steps))
    return metrics
