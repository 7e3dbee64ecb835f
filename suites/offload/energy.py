"""Energy of the processor package, where the kernel lets it be read (RAPL)."""

from __future__ import annotations

from pathlib import Path

COUNTER = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def microjoules() -> int | None:
    """Return what the package has used since some moment, which wraps around; None where nobody may know."""
    try:
        return int(COUNTER.read_text())
    except (OSError, ValueError):
        return None
