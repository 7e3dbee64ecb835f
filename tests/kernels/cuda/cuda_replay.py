"""Builds the shim with a sanitizer or with mutants, and runs described launches in a process of their own."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from moebench.kernels.cuda import host

CUDA = Path(host.__file__).parent

RUNGS = {
    "plain": ("-O1",),
    "asan": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DSIM_ASAN"),
    "tsan": ("-O1", "-g1", "-fsanitize=thread", "-DSIM_TSAN"),
}
"""Compiler flags by the rung that they build."""

SECONDS = 60


class Outcome(NamedTuple):
    """What a schedule left: the shim's report and the buffers; None where the process did not come so far."""

    report: host.Report
    buffers: list


class Run(NamedTuple):
    """Exit code, what the sanitizer said, and the outcomes of the schedules that ended."""

    code: int
    said: str
    outcomes: list


def program(rung, tiles, sources=CUDA):
    """Return the program of a rung, built where the cache does not have it."""
    return host.built(tiles, f"replay-{rung}", sources, RUNGS[rung])


class Script:
    """Buffers and steps as ``shim/replay.cpp`` reads them; each step is a list of launches at the same time."""

    def __init__(self, steps):
        self.tensors, self.places = [], {}
        described = [self._step(step) for step in steps]
        head = [struct.pack("<q", len(self.tensors))]
        for tensor in self.tensors:
            raw = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
            head += [struct.pack("<q", tensor.nbytes), raw]
        self.bytes = b"".join([*head, struct.pack("<q", len(steps)), *described])

    def _step(self, launches):
        return struct.pack("<q", len(launches)) + b"".join(map(self._launch, launches))

    def _launch(self, one):
        name = one.kernel.encode()
        numbers = (one.blocks, one.threads, one.shared_bytes, len(one.arguments))
        head = struct.pack("<q", len(name)) + name + struct.pack("<4q", *numbers)
        return head + b"".join(map(self._argument, one.arguments))

    def _argument(self, value):
        if isinstance(value, tuple):
            return struct.pack(f"<{len(value) + 2}q", 2, len(value), *map(self._place, value))
        if isinstance(value, torch.Tensor):
            return struct.pack("<2q", 0, self._place(value))
        return struct.pack("<2q", 1, value)

    def _place(self, tensor):
        key = (tensor.data_ptr(), tensor.nbytes, id(tensor) if not tensor.nbytes else 0)
        if key not in self.places:
            self.places[key] = len(self.tensors)
            self.tensors.append(tensor)
        return self.places[key]

    def found(self, outcome, tensor):
        """Return what a schedule left in the buffer of ``tensor``."""
        return outcome.buffers[self._place(tensor)]

    def run(self, built, schedules, folder, seconds=SECONDS):
        """Run the steps under each schedule in one process of the program ``built``."""
        (folder / "in").write_bytes(self.bytes)
        words = [
            f"{host.ORDERS.index(one.order)},{int(one.late)},{one.multiprocessors},{one.seed},{one.mutant}"
            for one in schedules
        ]
        done = subprocess.run(
            [str(built), str(folder / "in"), str(folder / "out"), *words],
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66", "ASAN_OPTIONS": "exitcode=67"},
        )
        return Run(done.returncode, done.stderr, self._outcomes((folder / "out").read_bytes()))

    def _outcomes(self, raw):
        outcomes, at = [], 0
        whole = ctypes.sizeof(host.Report) + sum(tensor.nbytes for tensor in self.tensors)
        for start in range(0, len(raw) // whole * whole, whole):
            report = host.Report.from_buffer_copy(raw, start)
            at, buffers = start + ctypes.sizeof(host.Report), []
            for tensor in self.tensors:
                copy = torch.empty_like(tensor)
                ctypes.memmove(copy.data_ptr(), raw[at : at + tensor.nbytes], tensor.nbytes)
                at += tensor.nbytes
                buffers.append(copy)
            outcomes.append(Outcome(report, buffers))
        return outcomes
