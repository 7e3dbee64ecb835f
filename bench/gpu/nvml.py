"""What the driver of a GPU tells by NVML: clocks, power, energy, temperature and why clocks are held down.

Every figure is asked for on its own: a board that knows no power still tells its clocks. What cannot be had is None,
never 0. ``source`` says where figures come from: ``nvml``, ``none`` (no package, no driver, no such device), or
``fake`` for a library that stands in for the driver in tests and names itself so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FAKE_DRIVER = "-fake"
"""The driver version of a library that stands in for NVML ends so."""

HELD_DOWN = {
    "sw_power_cap": "SwPowerCap",
    "hw_slowdown": "HwSlowdown",
    "sync_boost": "SyncBoost",
    "sw_thermal_slowdown": "SwThermalSlowdown",
    "hw_thermal_slowdown": "HwThermalSlowdown",
    "hw_power_brake_slowdown": "HwPowerBrakeSlowdown",
}
"""Reasons of NVML for clocks below what was asked for, by our names; idleness and clocks set by a user are none."""


@dataclass(frozen=True)
class Reading:
    """One look at a GPU. ``at_ns`` is on the monotonic clock; ``throttled`` names the HELD_DOWN that were at work."""

    at_ns: int
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] | None = None


class Gpu:
    """A GPU as NVML knows it, or, without a handle, nothing: all figures are None and ``why`` says why."""

    def __init__(self, library: Any = None, handle: Any = None, why: str = "") -> None:
        self._nvml, self._handle, self.why = library, handle, why

    def __enter__(self) -> Gpu:
        return self

    def __exit__(self, *error: object) -> None:
        if self._nvml is not None:
            self._ask("nvmlShutdown")

    @property
    def source(self) -> str:
        """``nvml``, ``fake`` or ``none``."""
        if self._handle is None:
            return "none"
        return "fake" if str(self._ask("nvmlSystemGetDriverVersion")).endswith(FAKE_DRIVER) else "nvml"

    def facts(self) -> dict[str, Any]:
        """Return what does not change while it is measured."""
        memory = self._of("nvmlDeviceGetMemoryInfo")
        ecc = self._of("nvmlDeviceGetEccMode")
        return {
            "source": self.source,
            "driver": None if self._handle is None else self._ask("nvmlSystemGetDriverVersion"),
            "name": self._of("nvmlDeviceGetName"),
            "uuid": self._of("nvmlDeviceGetUUID"),
            "memory_bytes": None if memory is None else int(memory.total),
            "ecc": None if ecc is None else bool(ecc[0]),
        }

    def read(self) -> Reading:
        """Return the figures of this moment."""
        return Reading(
            time.monotonic_ns(),
            _times(self._of("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"), 1.0),
            _times(self._of("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"), 1.0),
            _times(self._of("nvmlDeviceGetPowerUsage"), 1e-3),
            _times(self._of("nvmlDeviceGetTotalEnergyConsumption"), 1e-3),
            _times(self._of("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"), 1.0),
            self._throttled(),
        )

    def _throttled(self) -> tuple[str, ...] | None:
        mask = self._of("nvmlDeviceGetCurrentClocksEventReasons")
        if mask is None:
            return None
        bits = {name: getattr(self._nvml, f"nvmlClocksEventReason{word}") for name, word in HELD_DOWN.items()}
        return tuple(name for name, bit in bits.items() if mask & bit)

    def _of(self, function: str, *constants: str) -> Any:
        """Ask about this device; None where it does not say."""
        if self._handle is None:
            return None
        return self._ask(function, self._handle, *(getattr(self._nvml, name) for name in constants))

    def _ask(self, function: str, *arguments: Any) -> Any:
        if not hasattr(self._nvml, function):  # an older package
            return None
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError:
            return None


def _times(value: Any, unit: float) -> float | None:
    return None if value is None else float(value) * unit


def open_gpu(uuid: str | None, load: Callable[[], Any] | None = None) -> Gpu:
    """Return the GPU with this uuid, or, with None, the first; ``load`` imports NVML's Python package."""
    try:
        library = (load or _pynvml)()
    except ImportError:
        return Gpu(why="NVML's package is not installed; run pip install nvidia-ml-py")
    try:
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByIndex(0) if uuid is None else library.nvmlDeviceGetHandleByUUID(uuid)
    except library.NVMLError as error:
        return Gpu(why=f"NVML answers: {error}")
    return Gpu(library, handle)


def all_gpus(load: Callable[[], Any] | None = None) -> list[dict[str, Any]] | None:
    """Return the facts of every GPU that NVML counts; None where there is no NVML to ask."""
    try:
        library = (load or _pynvml)()
        library.nvmlInit()
    except ImportError:
        return None
    except library.NVMLError:
        return None
    try:
        handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        return [Gpu(library, handle).facts() for handle in handles]
    except library.NVMLError:
        return None
    finally:
        library.nvmlShutdown()


def _pynvml() -> Any:
    import pynvml

    return pynvml
