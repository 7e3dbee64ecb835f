"""The rules that other tools gate by, on the same layer on the same machine: launches one after the other.

pytest-benchmark (``--benchmark-compare-fail=mean:5%``): fails where the mean grew by more than 5 %. asv (``compare``):
worse where medians differ by more than a factor of 1.1 and a two-sided Mann-Whitney test has p < 0.002. Both take what
one launch of each side sampled; the sampling time is given with the results.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent

WARMUP_CALLS = 5


def launch(environment: Mapping[str, str], seconds: float) -> list[list[int]]:
    """Return wall times in ns of every case from one fresh process that samples each for ``seconds``."""
    command = [sys.executable, str(HERE / "naive.py"), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(environment))
    result: list[list[int]] = json.loads(done.stdout)
    return result


def sample(seconds: float) -> list[list[int]]:
    """Sample every case in this process."""
    import gc

    import layer

    found = []
    for case in range(len(layer.CASES)):
        trial = layer.make_trial(case)
        for call in range(WARMUP_CALLS):
            trial.run(call % trial.steps)
        gc.collect()
        gc.disable()
        times: list[int] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter_ns()
            trial.run(len(times) % trial.steps)
            times.append(time.perf_counter_ns() - started)
        gc.enable()
        found.append(times)
    return found


def mean_rule(base: Sequence[int], candidate: Sequence[int], percent: int = 5) -> bool:
    """Return whether pytest-benchmark's ``mean:N%`` fails."""
    return statistics.fmean(candidate) / statistics.fmean(base) * 100 - 100 > percent


def asv_rule(base: Sequence[int], candidate: Sequence[int], factor: float = 1.1, p: float = 0.002) -> bool:
    """Return whether asv calls the candidate worse."""
    from scipy import stats

    different = stats.mannwhitneyu(base, candidate, alternative="two-sided").pvalue < p
    return bool(different and statistics.median(candidate) > factor * statistics.median(base))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    print(json.dumps(sample(float(sys.argv[1]))))
