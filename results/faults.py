"""Places where a test may kill the process, so that crash safety is tested by crashes.

``MOEBENCH_FAULT=<point>[:n]`` kills the process with SIGKILL the n-th time (default: the first) that it passes the
point. Every process counts for itself. The points are:

- ``write``: half of a file is written (Parquet files, blobs, manifests and ``run.json`` alike);
- ``fsync``: a file is written and synced, and not yet part of anything that readers see;
- ``rename``: twice for each rename, right before it and right after it;
- ``ingest``: twice for each part, inside the database transaction right before the commit, and right after it.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

from .errors import ResultsError

VARIABLE = "MOEBENCH_FAULT"
POINTS = ("write", "fsync", "rename", "ingest")

_passed: Counter[str] = Counter()


def fault(point: str) -> None:
    """Pass a fault point: die here when $MOEBENCH_FAULT says so, otherwise do nothing."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    name, _, number = wanted.partition(":")
    if name not in POINTS or not (number or "1").isdigit():
        raise ResultsError(f"{VARIABLE}={wanted} names no fault point; write one of {', '.join(POINTS)}, then ':n'.")
    _passed[point] += 1
    if point == name and _passed[point] == int(number or 1):
        os.kill(os.getpid(), signal.SIGKILL)
