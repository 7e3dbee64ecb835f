"""A model several times larger than its budget runs, and the budget is really held, seen from outside the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.contracts import load_file

lab = load_file(Path(__file__).parent / "slab_lab.py")

MIB = 2**20
LAYERS, EXPERTS = tuple(range(8)), 8
STAGING = 2
SLACK = 2 * MIB

CHILD = """
import sys
import torch
from moebench.backends.offload.access import Access
from moebench.backends.offload.cache import Cache
from moebench.backends.offload.file import SlabFile
from moebench.backends.offload.policies.recency import LRU
from moebench.backends.offload.store import SlotStore

torch.set_num_threads(1)
x = torch.ones(1, 341)


def run(capacity, rounds):
    file, total = SlabFile.open(sys.argv[1]), 0.0
    with SlotStore(file, Cache(LRU(), capacity, file.layout), readers=2, staging=2) as store:
        for step in range(rounds):
            for layer in file.layout.layers:
                for first in range(0, file.layout.experts, 2):
                    chosen = (first, first + 1)
                    for served in store.serve(Access(step, layer, chosen, (1, 1), (0.5, 0.5))):
                        total += float((x @ served.gate_up.T).sum() + served.down.sum())
        read = sum(entry.bytes_read for entry in store.ledger)
        print(total, read, store.resident_bytes(), flush=True)
        input()


run(1, 1)  # what the first use of everything takes is there before it is measured
while True:
    print("idle", flush=True)
    run(int(input()), 2)
"""


def memory(child, name, where="smaps_rollup"):
    """Return a figure of a process in bytes, as the kernel has it."""
    for line in Path(f"/proc/{child.pid}/{where}").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} in {where}")


def told(child, text):
    child.stdin.write(f"{text}\n")
    child.stdin.flush()


def answer(child):
    total, read, resident = child.stdout.readline().split()
    return float(total), int(read), int(resident)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """64 experts of a MiB each."""
    path = tmp_path_factory.mktemp("slabs") / "model.safetensors"
    made = ((layer, lab.store(layer, experts=EXPERTS, width=256, hidden=341)) for layer in LAYERS)
    return lab.SlabFile.open(lab.write_slabs(path, made))


@pytest.fixture
def child(model):
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(model.path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        answer(process)
        told(process, "")
        yield process
        process.kill()


def grown(child, capacity):
    """Let the child run with a capacity; return its answer, and by how much its memory grew: then, and at its peak."""
    assert child.stdout.readline() == "idle\n"
    before = [memory(child, name) for name in ("Rss", "Anonymous")]
    Path(f"/proc/{child.pid}/clear_refs").write_text("5")  # the peak is that of what follows
    told(child, capacity)
    said = answer(child)
    now = max(memory(child, name) - then for name, then in zip(("Rss", "Anonymous"), before, strict=True))
    peak = memory(child, "VmHWM", "status") - before[0]
    told(child, "")
    return said, now, peak


def test_a_quarter_of_the_experts_takes_a_quarter_of_the_memory(model, child):
    slab, size = model.slab_bytes(), model.layout.size
    budget = (size // 4 + STAGING) * slab
    assert model.path.stat().st_size > 3 * (budget + SLACK)
    (total, read, resident), now, peak = grown(child, size // 4)
    assert (read, resident) == (2 * size * slab, budget)  # LRU under a cycle hits nothing: all went through, twice
    assert budget - SLACK < now <= budget + SLACK
    assert peak <= budget + SLACK
    (all_total, all_read, _), now, peak = grown(child, size)
    assert (all_total, all_read) == (total, size * slab)
    assert min(now, peak) > 3 * budget  # so the bounds above can fail
