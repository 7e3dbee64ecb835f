"""Faults that a test may ask for, so that what a bad disk does is tested by doing it.

``MOEBENCH_OFFLOAD_FAULT=<what>[:n]`` makes the n-th read or write (default: the first) of a store or a writer fail, and
every later one where n ends in ``+``. Each reader pool and each writer counts for itself. What can happen:

- ``read_error``: the system answers EIO;
- ``read_short``: the system gives half of what was asked for, and the rest when asked again;
- ``read_slow``: the read takes $MOEBENCH_OFFLOAD_SLOW_S seconds longer (default 1);
- ``no_direct``: the file system refuses O_DIRECT (there is nothing to count);
- ``write_full``: the disk is full.
"""

from __future__ import annotations

import os
import threading
from collections import Counter

from .errors import OffloadError

VARIABLE, SLOW_S = "MOEBENCH_OFFLOAD_FAULT", "MOEBENCH_OFFLOAD_SLOW_S"
FAULTS = ("read_error", "read_short", "read_slow", "no_direct", "write_full")


class Faults:
    """What the environment asks for, as it is when this is made."""

    def __init__(self) -> None:
        self.wanted, _, number = os.environ.get(VARIABLE, "").partition(":")
        self.onwards, number = number.endswith("+"), number.removesuffix("+") or "1"
        if self.wanted and (self.wanted not in FAULTS or not number.isdigit()):
            raise OffloadError(
                f"{VARIABLE}={self.wanted}:{number} is no fault; write one of {', '.join(FAULTS)}, ':n'."
            )
        self.number, self.slow_s = int(number), float(os.environ.get(SLOW_S, "1"))
        self._passed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def strikes(self, what: str) -> bool:
        """Pass a place where ``what`` may happen, and return whether it does."""
        if what != self.wanted:
            return False
        with self._lock:
            self._passed[what] += 1
            return self._passed[what] == self.number or (self.onwards and self._passed[what] > self.number)
