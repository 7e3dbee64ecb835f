"""Energy of the processor package, where the kernel lets it be read (RAPL)."""

from __future__ import annotations

from pathlib import Path

COUNTER = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def joules() -> float | None:
    """Return what the package has used since some moment, in joules; None where nobody may know. It wraps around."""
    try:
        return int(COUNTER.read_text()) / 1e6
    except (OSError, ValueError):
        return None
