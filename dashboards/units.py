"""Numbers as people read them: a unit that fits, digits that mean something, and a dash for what was not measured."""

from __future__ import annotations

import math

DASH = "–"  # noqa: RUF001 - the sign for "not measured"

TIME_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))
SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def digits(value: float | None, significant: int = 4) -> str:
    """Return ``value`` with about four significant digits, in powers of ten only where it must."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 7:
        return f"{value:.{significant - 2}e}"
    return f"{value:,.{max(0, significant - 1 - magnitude)}f}"


def time_unit(ns: float | None) -> tuple[float, str]:
    """Return (nanoseconds in the unit, its name) for a time of this size."""
    for size, name in TIME_UNITS:
        if ns is not None and abs(ns) >= size:
            return size, name
    return 1e3, "µs"


def time(ns: float | None, unit: tuple[float, str] | None = None) -> str:
    """Return a time given in nanoseconds, such as ``12.34 µs``."""
    if ns is None:
        return DASH
    size, name = unit or time_unit(ns)
    return f"{digits(ns / size)} {name}"


def interval(ns: tuple[float | None, float | None], unit: tuple[float, str]) -> str:
    """Return an interval of times in a given unit, without naming it, such as ``[12.1, 12.6]``; empty where unknown."""
    lo, hi = ns
    if lo is None or hi is None:
        return ""
    return f"[{digits(lo / unit[0])}, {digits(hi / unit[0])}]"


def si(value: float | None, unit: str = "", significant: int = 4) -> str:
    """Return a quantity with an SI prefix, such as ``1.234 Gflop/s``."""
    if value is None or not math.isfinite(value):
        return DASH
    for size, prefix in SI:
        if abs(value) >= size:
            return f"{digits(value / size, significant)} {prefix}{unit}".rstrip()
    return f"{digits(value, significant)} {unit}".rstrip()


def storage(value: float | None) -> str:
    """Return a number of bytes, such as ``1.5 GiB``."""
    if value is None:
        return DASH
    for size, name in BINARY:
        if abs(value) >= size:
            return f"{value / size:.4g} {name}"
    return f"{value:.4g} B"


def scale(value: float, unit: str) -> tuple[float, str]:
    """Return (how much of ``unit`` is one of the shown unit, its name) for a value of this size."""
    if unit == "ns":
        return time_unit(value)
    prefixes = BINARY if unit == "byte" else tuple((size, f"{prefix}{unit}") for size, prefix in SI)
    if unit != "byte" and not unit.endswith("/s"):
        return 1.0, "" if unit == "1" else unit
    return next(((float(size), name) for size, name in prefixes if abs(value) >= size), (1.0, unit))
