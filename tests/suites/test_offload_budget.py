"""A trial of suite ``offload`` holds a quarter of the experts and no more, seen from outside its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.contracts import load_file

lab = load_file(Path(__file__).parent / "offload_lab.py")

BIG = ("model.hidden=256", "model.width=512", "model.experts=16")
BYTES = 4 * 16 * 3 * 256 * 512 * 4  # layers, experts, matrices, float32

CHILD = """
import json
import sys
import torch
from moebench.bench.worker import _Held
from moebench.contracts import Case, Registry

torch.set_num_threads(1)
registry = Registry.load()
for line in sys.stdin:
    case = Case.from_json(json.loads(line))
    trial = registry.get("suite", "offload").create().prepare(case, registry)
    held = _Held(trial, case)
    held.turn(0, trial.steps)
    check = held.verify()
    print(json.dumps([check.ok, trial.session.resident_bytes()]), flush=True)
"""


@pytest.fixture
def child(cache):
    environment = {**os.environ, "MOEBENCH_CACHE": str(cache), "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.kill()


def after(child, case):
    """Let the child run a trial, which stays open; return what it said, and the resident bytes that the kernel has."""
    child.stdin.write(json.dumps(case.to_json()) + "\n")
    child.stdin.flush()
    said = json.loads(child.stdout.readline())
    (line,) = [line for line in Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines() if line[:4] == "Rss:"]
    return said, int(line.split()[1]) * 1024


def test_a_trial_holds_its_share_and_eager_all(child):
    by_name = {case.backend.name: case for case in lab.cases(*BIG, "axes.backend=[offload,eager]")}
    (small,) = lab.cases(*lab.offloaded())
    _, before = after(child, small)  # what the first use of everything takes
    (ok, resident), with_offload = after(child, by_name["offload"])
    assert ok
    assert 0.25 * BYTES < resident < 0.3 * BYTES
    assert with_offload - before < 0.45 * BYTES
    (ok, resident), with_all = after(child, by_name["eager"])
    assert (ok, resident) == (True, BYTES)
    assert with_all - before > 0.9 * BYTES
