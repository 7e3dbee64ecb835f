"""How much of the machine a case used, and what that costs: MoE-CAP's figures (arXiv 2412.07067) for what we measure.

S-MBU is the bytes that a call must really touch (weights of the *distinct* experts that its routing chose, shared ones,
inputs and outputs) per second, over the memory bandwidth that suite ``roofline`` reached on the same host. S-MFU is the
same of the flops of the assignments really made, over the peak of the dtype. MoE-CAP's code halves its peak and leaves
k out; these are its definitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from .query import select

PEAKS = """
SELECT r.host_key, c.device, c.threads, c.evidence, lower(m.name) AS name,
       CASE WHEN m.name = 'peak_flops' THEN c.dtype END AS dtype, max(m.value) AS value
FROM metrics_raw m JOIN cases c USING (run_id, case_key) JOIN runs r USING (run_id)
WHERE c.suite = 'roofline' AND c.status = 'ok' AND m.value > 0 AND lower(m.name) IN ('peak_flops', 'bandwidth_dram')
GROUP BY ALL ORDER BY ALL"""
"""The best that each host ever showed, by threads and, for arithmetic, by dtype."""

Bounds = tuple[float, float | None, float | None]
"""(value, lo, hi)."""

MILLION = 1e6


@dataclass(frozen=True)
class Peaks:
    """What probes reached, by (host, device, threads, evidence, name, dtype); ``sql`` is what found them."""

    values: Mapping[tuple[Any, ...], float]
    sql: str

    def bandwidth(self, row: Mapping[str, Any]) -> float | None:
        """Return bytes per second from memory where the case ran, or None without a probe."""
        return self.values.get((*_where(row), "bandwidth_dram", None))

    def flops(self, row: Mapping[str, Any]) -> float | None:
        """Return flops per second in the case's dtype where it ran, or None without a probe."""
        return self.values.get((*_where(row), "peak_flops", row["dtype"]))


def _where(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["host_key"], row["device"], row["threads"], row["evidence"]


def load_peaks(connection: duckdb.DuckDBPyConnection) -> Peaks:
    """Return the peaks of every host of the store."""
    _, rows = select(connection, PEAKS)
    return Peaks({tuple(key): float(value) for *key, value in rows}, PEAKS.strip())


def s_mbu(row: Mapping[str, Any], peaks: Peaks) -> Bounds | None:
    """Return the sparse memory bandwidth utilisation; None without bytes, time or a probe."""
    return share_of_peak(row["bytes"], row, peaks.bandwidth(row))


def s_mfu(row: Mapping[str, Any], peaks: Peaks) -> Bounds | None:
    """Return the sparse flops utilisation; None without flops, time or a probe."""
    return share_of_peak(row["flops"], row, peaks.flops(row))


def share_of_peak(amount: float | None, row: Mapping[str, Any], peak: float | None) -> Bounds | None:
    """Return ``amount`` of one call per second over ``peak``, with the bounds that those of the time give."""
    if amount is None or not peak or not row["median_ns"]:
        return None
    value, lo, hi = (None if not ns else amount / (ns * 1e-9 * peak) for ns in _times(row))
    return None if value is None else (value, hi, lo)


def cost_of_tokens(row: Mapping[str, Any], price_per_hour: float | None) -> Bounds | None:
    """Return what a million tokens through the layers of one call cost, in the currency of the price."""
    if price_per_hour is None or not row["tokens"] or not row["median_ns"]:
        return None
    per_ns = price_per_hour / 3600e9 * MILLION / row["tokens"]
    value, lo, hi = (None if ns is None else ns * per_ns for ns in _times(row))
    return None if value is None else (value, lo, hi)


def _times(row: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    return row["median_ns"], row["lo_ns"], row["hi_ns"]
