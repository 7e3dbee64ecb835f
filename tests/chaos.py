"""Kill a run with SIGKILL at random moments and at every fault point; the same command must then end normally.

    python tests/chaos.py --suite quick --kills 10 [NAME=VALUE ...]

After each kill: every visible part is whole and no worker lives on; after the same command again: exit 0, every run
holds each case once, the unfinished run was resumed, and the database holds what the parts hold. Prints one summary
line; exits 1 where anything was lost, doubled or half-written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from moebench.results.database import DATABASE, connect_parts, open_database
from moebench.results.faults import POINTS, VARIABLE
from moebench.results.integrity import problems
from moebench.results.parts import list_parts, list_runs, verify_part

FAREWELL_S = 10.0


@dataclasses.dataclass(frozen=True)
class Command:
    """``moebench run`` with these settings, in this environment."""

    settings: Sequence[str]
    environment: Mapping[str, str]
    timeout_s: float = 900.0

    def start(self, store: Path, fault: str = "") -> subprocess.Popen[str]:
        env = {**self.environment, "MOEBENCH_STORE": str(store), VARIABLE: fault}
        command = [sys.executable, "-m", "moebench.bench", "run", "--quiet", *self.settings]
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def wait(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Return (exit status, what it said); it is killed where it takes too long."""
        with process:
            try:
                _, said = process.communicate(timeout=self.timeout_s)
            except BaseException:
                process.kill()
                raise
        return process.returncode, said


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a run gives that nobody kills. ``passes`` counts how often it passes each fault point."""

    seconds: float
    cases: frozenset[str]
    passes: Mapping[str, int]


def undisturbed(command: Command, store: Path) -> Undisturbed:
    """Run once without a kill."""
    started = time.monotonic()
    code, said = command.wait(command.start(store))
    seconds = time.monotonic() - started
    if code != 0:
        raise SystemExit(f"chaos: the undisturbed run ended with {code}: {said}")
    parts = list_parts(store)
    files = sum(1 for part in parts for file in part.rglob("*") if file.is_file()) + 2  # run.json twice
    passes = {"write": files, "fsync": files, "rename": 2 * (len(parts) + 2), "ingest": 2 * len(parts)}
    (run,) = cases_by_run(store).values()
    return Undisturbed(seconds, frozenset(run), passes)


def cases_by_run(store: Path, database: bool = False) -> dict[str, list[str]]:
    """Return run id -> its case keys, repeated where a row is there twice."""
    connection = open_database(store / DATABASE, read_only=True) if database else connect_parts(store)
    try:
        rows = connection.execute("SELECT run_id, list(case_key) FROM cases GROUP BY run_id").fetchall()
    finally:
        connection.close()
    return {run: sorted(keys) for run, keys in rows}


def statuses(store: Path) -> dict[str, str]:
    """Return run id -> status as ``run.json`` has it."""
    files = [folder / "run.json" for folder in list_runs(store)]
    return {file.parent.name: json.loads(file.read_text())["status"] for file in files if file.exists()}


def living_workers(store: Path) -> list[int]:
    """Return the ids of worker processes that write to ``store``."""
    found = []
    for process in psutil.process_iter():
        try:
            if "moebench.bench.worker" in process.cmdline() and process.environ().get("MOEBENCH_STORE") == str(store):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One kill


def killed_at_moment(command: Command, store: Path, seconds: float) -> int:
    """Start the command, kill it after ``seconds``, and return its exit status."""
    process = command.start(store)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return command.wait(process)[0]


def killed_at_fault(command: Command, store: Path, fault: str) -> int:
    """Run the command until it kills itself at a fault point, and return its exit status."""
    return command.wait(command.start(store, fault))[0]


def trial(command: Command, store: Path, expected: Undisturbed, kill: Callable[[Command, Path], int]) -> list[str]:
    """Kill once, run the same command again, and return one sentence for all that is wrong."""
    code = kill(command, store)
    wrong = [] if code in (0, -signal.SIGKILL) else [f"the killed run ended with {code}"]
    wrong += [sentence for part in list_parts(store) if (sentence := verify_part(part))]
    wrong += _orphans(store)
    before = statuses(store)
    code, said = command.wait(command.start(store))
    if code != 0:
        wrong.append(f"the same command then ended with {code}: {said.strip()}")
    return wrong + list(_losses(store, expected, before))


def _orphans(store: Path) -> list[str]:
    deadline = time.monotonic() + FAREWELL_S
    while (alive := living_workers(store)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"worker {pid} outlived its parent" for pid in alive]


def _losses(store: Path, expected: Undisturbed, before: Mapping[str, str]) -> Iterator[str]:
    after = statuses(store)
    unfinished = [run for run, status in before.items() if status != "finished"]
    if unfinished and set(after) != set(before):
        yield f"unfinished run {unfinished[0]} was not resumed"
    yield from (f"run {run} is {status}" for run, status in after.items() if status != "finished")
    for database in (False, True):
        found = cases_by_run(store, database)
        where = "database" if database else "parts"
        if set(found) != set(after):
            yield f"the {where} hold runs {sorted(found)} instead of {sorted(after)}"
        for run, keys in found.items():
            if keys != sorted(expected.cases):
                yield f"run {run} has {len(keys)} cases in the {where} instead of {len(expected.cases)}"
    for connection in (connect_parts(store), open_database(store / DATABASE, read_only=True)):
        yield from problems(connection)
        connection.close()
    yield from (f"{path} is left over" for run in after for path in (store / "runs" / run).glob(".tmp-*"))
    yield from (f"{path} was set aside" for path in (store / "corrupt").glob("*/*"))


# ---------------------------------------------------------------------------------------------------------------------
# All kills


def kills(
    expected: Undisturbed, moments: int, points: Sequence[str], seed: int
) -> dict[str, Callable[[Command, Path], int]]:
    """Return the kills by name: random moments, and each fault point at a random pass and at the last one."""
    rng = random.Random(seed)
    planned: dict[str, Callable[[Command, Path], int]] = {}
    for number in range(moments):
        seconds = expected.seconds * (number + rng.random()) / moments  # one in each equal part of the run
        planned[f"moment {seconds:.2f} s"] = lambda command, store, s=seconds: killed_at_moment(command, store, s)
    for point in points:
        passes = expected.passes[point]
        for n in (rng.randint(1, passes - 1), passes):
            fault = f"{point}:{n}"
            planned[f"fault {fault}"] = lambda command, store, f=fault: killed_at_fault(command, store, f)
    return planned


def chaos(
    command: Command, folder: Path, moments: int, points: Sequence[str] = POINTS, seed: int = 0, lanes: int = 1
) -> dict[str, list[str]]:
    """Return what each kill did wrong (empty lists where all is well); ``lanes`` kills at a time, in own stores."""
    expected = undisturbed(command, folder / "undisturbed")
    planned = kills(expected, moments, points, seed)

    def one(number: int, kill: Callable[[Command, Path], int]) -> list[str]:
        return trial(command, folder / f"kill-{number}", expected, kill)

    with ThreadPoolExecutor(lanes) as pool:
        return dict(zip(planned, pool.map(one, range(len(planned)), planned.values()), strict=True))


def main() -> int:
    """Run the long form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--kills", type=int, default=10, help="random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    options = parser.parse_args()
    command = Command([f"suite={options.suite}", *options.settings], os.environ)
    with tempfile.TemporaryDirectory(prefix="moebench-chaos-") as folder:
        results = chaos(command, Path(folder), options.kills, seed=options.seed)
    for name, wrong in results.items():
        print(f"{name}: {'; '.join(wrong) or 'nothing lost'}")
    bad = sum(bool(wrong) for wrong in results.values())
    print(f"chaos: {len(results)} kills of suite={options.suite}, {bad} with losses")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
