"""Checks that run a program: the sanitizers of CUDA, and a gate of a backend against itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from checks import FAILED, PASSED, SKIPPED, Result

HERE = Path(__file__).resolve().parent
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
SANITIZED = ("triton", "cuda_fused", "grouped")
FOUND = 9
"""What the sanitizer exits with where it found something."""

UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
"""Each tensor is an allocation of its own: in torch's pool, memcheck would see no access beyond one."""

A_A = (
    *("--base-backend", "grouped", "--candidate-backend", "grouped", "--budget", "4m", "suite=throughput"),
    *("model=small", "axes.tokens=64", "axes.dtype=bfloat16", "axes.residency=warm", "device=cuda"),
)

Run = Callable[[Sequence[str], float], tuple[int, str]]


def run_program(command: Sequence[str], timeout: float) -> tuple[int, str]:
    """Run a program; return its exit status and what it printed. One that takes too long has status 124."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return 124, f"it took longer than {timeout:g} s"
    return done.returncode, done.stdout + done.stderr


def sanitizers(run: Run = run_program, which: Callable[[str], str | None] = shutil.which) -> Iterator[Result]:
    """Run the kernels' conformance under memcheck and racecheck, where the program is."""
    for tool in TOOLS:
        program = which(SANITIZER)
        if program is None:
            yield Result(tool, SKIPPED, f"{SANITIZER} is not installed; it comes with the CUDA toolkit")
            continue
        command = ["env", UNCACHED, program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable]
        code, said = run([*command, str(HERE / "check.py"), "--only", ",".join(SANITIZED)], 240.0)
        if code == 0:
            yield Result(tool, PASSED)
        else:
            told = "it found errors" if code == FOUND else f"it ended with status {code}"
            yield Result(tool, FAILED, f"{told}: {_last(said)}", {"output": said[-4000:]})


def a_a_gate(store: Path, run: Run = run_program) -> Iterator[Result]:
    """Gate a backend against itself: anything but `passed` is a false alarm, or a machine that is too noisy to tell."""
    out = store / "a-a.json"
    command = [sys.executable, "-m", "moebench.bench", "gate", *A_A, "--store", str(store), "--json", str(out)]
    code, said = run(command, 360.0)
    data: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    reason = "" if code == 0 else f"the gate exits with {code}: {_last(said)}"
    yield Result("a/a gate of grouped", FAILED if code else PASSED, reason, data)


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"
