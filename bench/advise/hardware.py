"""What a machine can hold and how fast its tiers are; every rate says where it comes from. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...contracts import MoebenchError, unknown
from ...kernels.targets import device
from .program import Program
from .sizes import parse_rate

TIERS = ("vram", "link", "ram", "disk")
"""Bytes a second: a GPU's memory, host memory to GPU, host memory as its cores read it, disk to host memory."""
UNITS = ("gpu", "cpu")
"""Flop a second."""

MEASURED = "measured here"
GIVEN = "given"
ASSUMED = "assumed"


@dataclass(frozen=True)
class Rate:
    """So many bytes or flop a second, and where that comes from."""

    value: float
    source: str


DEFAULTS: Mapping[str, Rate] = {
    name: Rate(value, ASSUMED)
    for name, value in {"vram": 1e12, "link": 25e9, "ram": 50e9, "disk": 3e9, "gpu": 1e14, "cpu": 1e12}.items()
}
"""Round figures of a desktop of today with one GPU: what is taken where nothing is known."""


@dataclass(frozen=True)
class Hardware:
    """Bytes of GPU memory (0: no GPU) and of host memory, and the rates by the names of TIERS and UNITS.

    ``program`` is what this harness makes of them, where that is known.
    """

    vram: int
    ram: int
    rates: Mapping[str, Rate]
    program: Program | None = None

    def rate(self, name: str) -> float:
        """Return the value of a rate."""
        return self.rates[name].value

    def with_rates(self, more: Mapping[str, Rate]) -> Hardware:
        """Return the same with some rates replaced."""
        return replace(self, rates={**self.rates, **more})

    def scaled(self, shares: Mapping[str, float]) -> Hardware:
        """Return the same with some rates multiplied."""
        return self.with_rates(
            {name: replace(self.rates[name], value=self.rate(name) * shares[name]) for name in shares}
        )


def given_rates(settings: Sequence[str]) -> dict[str, Rate]:
    """Return the rates of ``NAME=VALUE`` settings."""
    found = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in (*TIERS, *UNITS):
            raise MoebenchError(unknown("rate", name, (*TIERS, *UNITS)))
        found[name] = Rate(parse_rate(value), GIVEN)
    return found


def device_rates(name: str | None) -> dict[str, Rate]:
    """Return the rates of a GPU by its data sheet, none without a name."""
    if name is None:
        return {}
    own = device(name)
    source = f"data sheet of {own.name}, from memory"
    return {"vram": Rate(own.bytes_per_s, source), "gpu": Rate(own.flops["bfloat16"], source)}


PROBES = """
SELECT m.name, c.dtype, c.threads, max(m.value) FROM metrics_raw m JOIN cases c USING (run_id, case_key)
JOIN hosts h USING (run_id) WHERE c.suite = 'roofline' AND c.status = 'ok' AND h.host_key = ? AND m.value > 0
GROUP BY m.name, c.dtype, c.threads
"""


def probed_rates(store: Path, host_key: str, dtype: str = "bfloat16", threads: int | None = None) -> dict[str, Rate]:
    """Return what suite ``roofline`` found at best on this host; nothing where the store has no probes of it.

    Flop are those of ``dtype``; ``threads`` None takes the number of threads that did most.
    """
    from ...results.database import connect_parts

    if not (store / "runs").is_dir():
        return {}
    connection = connect_parts(store)
    try:
        rows = connection.execute(PROBES, [host_key]).fetchall()
    finally:
        connection.close()
    fitting = [row for row in rows if threads in (None, row[2]) and (row[0] != "peak_flops" or row[1] == dtype)]
    found: dict[str, Rate] = {}
    for metric, tier in {"bandwidth_DRAM": "ram", "bandwidth_disk": "disk", "peak_flops": "cpu"}.items():
        best = max((value for name, _, _, value in fitting if name == metric), default=None)
        if best is not None:
            found[tier] = Rate(float(best), MEASURED)
    return found
