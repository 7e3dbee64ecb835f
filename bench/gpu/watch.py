"""Readings of a GPU around and during measurements, and the metrics that rows keep of them. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...contracts import Metric, Series
from .nvml import Reading, open_gpu

Read = Callable[[], Reading]

INTERVAL_S = 0.1
"""A sampler reads this often: boards renew their power and energy some ten times a second."""


@dataclass
class Watch:
    """Readings before and after each turn of one case."""

    read: Read
    readings: list[Reading] = field(default_factory=list)

    def look(self) -> tuple[str, ...]:
        """Read once; return what held the clocks down, which may be nothing or unknown."""
        self.readings.append(self.read())
        return self.readings[-1].throttled or ()

    def metrics(self) -> list[Metric]:
        """Return the clocks before the first and after the last turn, and the lowest of all; NULL if not told."""
        found = []
        for name in ("sm_clock", "memory_clock"):
            values = _known(self.readings, f"{name}_mhz")
            ends = (("before", values[:1]), ("after", values[-1:]), ("lowest", values))
            found += [Metric(f"gpu_{name}_{when}", min(v) if v else None, "MHz", n=len(v)) for when, v in ends]
        told = [one.throttled for one in self.readings if one.throttled is not None]
        share = sum(bool(one) for one in told) / len(told) if told else None
        temperatures = _known(self.readings, "temperature_c")
        hottest = Metric("gpu_temperature_highest", max(temperatures, default=None), "C", n=len(temperatures))
        return [*found, hottest, Metric("gpu_throttled_share", share, "1", n=len(told))]

    def series(self) -> list[Series]:
        """Return the SM clock reading by reading, where all readings have it."""
        values = tuple(_known(self.readings, "sm_clock_mhz"))
        return [Series("gpu_sm_clock", values, "MHz")] if values and len(values) == len(self.readings) else []


class Sampler:
    """Reads in a thread of its own while it is open, at the beginning, every ``interval`` seconds, and at the end."""

    def __init__(self, read: Read, interval: float = INTERVAL_S) -> None:
        self._read, self._interval = read, interval
        self.readings: list[Reading] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampler:
        self.readings.append(self._read())
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.readings.append(self._read())

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.readings.append(self._read())

    def metrics(self) -> list[Metric]:
        """Return energy, power and seconds of the whole time that it was open, for whatever ran meanwhile.

        ``gpu_sitting_energy`` is the difference of the board's own counter; a board without one has the integral of its
        power under another name, ``gpu_sitting_energy_integrated``. What neither tells is NULL.
        """
        seconds = (self.readings[-1].at_ns - self.readings[0].at_ns) / 1e9
        powers = _known(self.readings, "power_w")
        counters = _known(self.readings, "energy_j")
        whole = len(counters) == len(self.readings)
        energy = Metric("gpu_sitting_energy", counters[-1] - counters[0] if whole else None, "J", n=len(counters))
        found = [energy, Metric("gpu_sitting_seconds", seconds, "s", n=len(self.readings))]
        if not whole:
            found.append(Metric("gpu_sitting_energy_integrated", integral(self.readings), "J", n=len(powers)))
        mean = sum(powers) / len(powers) if powers else None
        return [*found, Metric("gpu_sitting_power_mean", mean, "W", n=len(powers))]


@contextlib.contextmanager
def watched(device: Mapping[str, Any] | None) -> Iterator[list[Metric]]:
    """Sample the driver of a worker's GPU while it measures, from the parent, where no launch has to wait for it.

    ``device`` are the facts that a worker told, None where it measures on the CPU. The list has its metrics at the end.
    """
    told: list[Metric] = []
    if device is None:
        yield told
        return
    with open_gpu(device["uuid"]) as gpu:
        with Sampler(gpu.read) as sampler:
            yield told
        told.extend(sampler.metrics())


def integral(readings: Sequence[Reading]) -> float | None:
    """Return the joules under the power of all readings by the trapezoid rule; None with fewer than two."""
    known = [(one.at_ns, one.power_w) for one in readings if one.power_w is not None]
    if len(known) < 2:
        return None
    steps = itertools.pairwise(known)
    return sum((later - at) / 1e9 * (power + after) / 2 for (at, power), (later, after) in steps)


def _known(readings: Sequence[Reading], name: str) -> list[float]:
    return [value for value in (getattr(one, name) for one in readings) if value is not None]
