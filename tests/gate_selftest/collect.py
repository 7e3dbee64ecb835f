"""Call the gate again and again on a layer against itself, with and without injected work, and keep what it said.

    python tests/gate_selftest/collect.py --folder FOLDER [--calls 12] [--minutes 90]

Cells: injected work of 0 and +5 %, machine idle and with one busy process; their calls take turns, so that a slow hour
meets all of them. A call that is finished is never repeated: the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import calibrate
import naive
from layer import CASES

from moebench.bench import host
from moebench.bench.gate.cases import Cases, target_case
from moebench.bench.gate.command import run_gate
from moebench.bench.gate.config import GateConfig, PairedCase
from moebench.bench.gate.sides import Side
from moebench.results.parts import write_json_atomic

HERE = Path(__file__).resolve().parent

CELLS = tuple((percent, busy) for percent in (0, 5) for busy in (False, True))
SECONDS = 10.0
NAIVE_SECONDS = 1.0
"""Per side and case of the other tools' rules: pytest-benchmark's own default of max_time."""

NAIVE_EVERY = 2
"""The other tools' rules are asked in every second call: they need no more to be told from the gate."""

BURNER = "import numpy as np\na = np.ones((512, 512))\nwhile True: a @ a"


def cases() -> Cases:
    """Return the eight cases of a call."""
    found = []
    for number, (tokens, experts, k) in enumerate(CASES):
        case = target_case("layer:make_trial", arguments=[number])
        found.append(PairedCase(f"T={tokens} E={experts} k={k}", case, case))
    return Cases((tuple(found),))


def side(name: str, injected: list[int]) -> Side:
    """Return a side that injects so many units of work into each case."""
    variables = {"PYTHONPATH": str(HERE), "MOEBENCH_INJECTED": ",".join(map(str, injected))}
    return Side(name, sys.executable, variables, None, f"injected {injected}")


@contextlib.contextmanager
def load(busy: bool) -> Iterator[None]:
    """Keep one process busy beside the gate; the system places it where it likes."""
    if not busy:
        yield
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", BURNER], env=environment) as process:
        try:
            yield
        finally:
            process.kill()


def one_call(folder: Path, percent: int, busy: bool, number: int, units: list[int]) -> dict[str, Any]:
    """Gate the layer once and return what was said of each case, with what the other tools' rules said."""
    nothing = [0] * len(CASES)
    injected = units if percent else nothing
    sides = {"base": side("base", nothing), "candidate": side("candidate", injected)}
    config = GateConfig(seconds=SECONDS, max_seconds=SECONDS, seed=number)
    with load(busy):
        time.sleep(1.0)
        before = os.getloadavg()
        result = run_gate(sides, cases(), config, folder / "store")
        finished = time.monotonic()
        other = naive_rules(sides) if number % NAIVE_EVERY == 0 else {"mean": [], "asv": []}
    return {
        "percent": percent,
        "busy": busy,
        "call": number,
        "run_id": result.run_id,
        "seconds": result.seconds,
        "naive_seconds": time.monotonic() - finished,
        "load": list(before),
        "noise": asdict(result.noise) if result.noise else None,
        "judged": [asdict(one) for one in result.judged if one.kind == "time"],
        "skipped": [asdict(one) for one in result.skipped],
        "naive": other,
    }


def naive_rules(sides: Mapping[str, Side]) -> dict[str, list[bool]]:
    """Return what the other tools' rules say of each case."""
    samples = [naive.launch({**os.environ, **side.environment}, NAIVE_SECONDS) for side in sides.values()]
    return {
        "mean": [naive.mean_rule(a, b) for a, b in zip(*samples, strict=True)],
        "asv": [naive.asv_rule(a, b) for a, b in zip(*samples, strict=True)],
    }


def collect(folder: Path, calls: int, minutes: float) -> None:
    """Make all calls that the folder does not hold, as far as the minutes reach."""
    deadline = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    facts = host.host_facts()
    kept = folder / "host.json"
    if not kept.exists():
        write_json_atomic(kept, facts)
    elif json.loads(kept.read_text())["host_key"] != facts["host_key"]:
        raise SystemExit(f"{folder} holds calls of another machine; name an empty folder with MOEBENCH_SELFTEST.")
    units = calibrate.units(folder / "calibration.json", 5.0)
    for number in range(calls):
        for percent, busy in CELLS:
            target = folder / f"call-{percent}-{'busy' if busy else 'idle'}-{number:02d}.json"
            if target.exists():
                continue
            if time.monotonic() > deadline:
                print("out of time; the same command goes on", flush=True)
                return
            found = one_call(folder, percent, busy, number, units)
            write_json_atomic(target, plain(found))
            said = [one["verdict"] for one in found["judged"]]
            print(f"{target.stem}: {found['seconds']:.0f} s, {', '.join(said)}", flush=True)


def plain(value: Mapping[str, Any]) -> Any:
    """Return the record as plain JSON values."""
    return json.loads(json.dumps(value, default=str))


def main() -> None:
    """Parse the arguments and collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=600.0)
    options = parser.parse_args()
    collect(options.folder, options.calls, options.minutes)


if __name__ == "__main__":
    main()
