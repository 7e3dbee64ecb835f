"""A trial on a GPU as a worker times it: the device's clock for its calls, its driver's readings around its turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ...contracts import Case, Facts
from .clock import Device, DeviceClock
from .nvml import open_gpu
from .watch import Watch


class Devices:
    """Opens a worker's GPU at the first case that is measured on it."""

    def __init__(self, open_device: Callable[[], Device]) -> None:
        self._open = open_device
        self._device: Device | None = None

    def timer_of(self, case: Case) -> Callable[[Any], DeviceTimer] | None:
        """Return what makes the timer of the case's trial; None where the CPU's clocks time it.

        A target of the user's own sources keeps the clock that it brings.
        """
        if case.device == "cpu" or case.protocol != "timed" or case.suite == "target":
            return None
        if self._device is None:
            self._device = self._open()
        return partial(DeviceTimer, self._device, case)


class DeviceTimer:
    """Times one trial on ``device``. ``told`` are the facts of the device that a row keeps."""

    def __init__(self, device: Device, case: Case, trial: Any) -> None:
        workload, facts = case.workload, device.facts()
        gpu = open_gpu(facts["uuid"])
        self.told = {**{name: value for name, value in gpu.facts().items() if value is not None}, **facts}
        self._clock = DeviceClock(device, workload.get("l2") == "flushed", bool(workload.get("cuda_graph", False)))
        self._watch = Watch(gpu.read)
        self._throttled: set[str] = set()
        self._clock.prepare(trial.run, trial.steps)

    def begin(self, run: Callable[[int], Any]) -> Callable[[int], Any]:
        """Begin a turn: read the driver, and return what calls ``run`` between two events of the device."""
        self._throttled = set(self._watch.look())
        return partial(self._clock.call, run)

    def end(self) -> dict[str, Any]:
        """End the turn: wait for the device once, and return the times of its calls and what held its clocks down."""
        launched = time.perf_counter()
        device_ns = self._clock.read()
        waited = time.perf_counter() - launched
        self._throttled |= set(self._watch.look())
        return {"device_ns": device_ns, "wait_s": waited, "throttled": sorted(self._throttled)}

    def added(self, facts: Facts) -> Facts:
        """Return ``facts`` with what the driver told."""
        metrics, series = (*facts.metrics, *self._watch.metrics()), (*facts.series, *self._watch.series())
        return dataclasses.replace(facts, metrics=metrics, series=series)
