"""How many units of injected work make a call so many per cent longer, measured in fresh processes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent

PROCESSES = 5
ROUNDS = 60
PROBE = 64
"""Units per call while the cost of one is measured: about as many as will be injected."""


def units(file: Path, percent: float) -> list[int]:
    """Return the units for each case, from ``file`` where it holds them already."""
    if not file.exists():
        found = [_measured() for _ in range(PROCESSES)]
        shares = [statistics.median(one[case] for one in found) for case in range(len(found[0]))]
        file.write_text(json.dumps({"share_of_one_unit": shares, "processes": found}))
    shares = json.loads(file.read_text())["share_of_one_unit"]
    return [round(percent / 100 / share) for share in shares]


def _measured() -> list[float]:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    result: list[float] = json.loads(done.stdout)
    return result


def measure() -> list[float]:
    """Return for each case the share of a call's CPU time that one unit adds."""
    import layer

    shares = []
    for case in range(len(layer.CASES)):
        trial = layer.make_trial(case)
        times: dict[int, list[int]] = {0: [], PROBE: []}
        for number in range(2 * ROUNDS):
            trial.injected = PROBE * (number % 2)
            started = time.process_time_ns()
            trial.run(number // 2 % trial.steps)
            times[trial.injected].append(time.process_time_ns() - started)
        plain, extra = (statistics.median(values[5:]) for values in times.values())
        shares.append((extra / plain - 1) / PROBE)
    return shares


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    print(json.dumps(measure()))
