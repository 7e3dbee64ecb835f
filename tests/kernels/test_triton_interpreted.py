"""Runs the tests of folder ``triton`` where Triton's kernels are interpreted: in a process of their own.

``@triton.jit`` decides when it runs whether a kernel is compiled or interpreted, triton's own library included, so the
variable must be there before anything imports triton.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton 3.7")

TESTS = Path(__file__).parents[1]
MUTANTS = TESTS / "kernels" / "triton" / "test_mutants.py"
OTHERS = sorted({*MUTANTS.parent.glob("test_*.py")} - {MUTANTS})


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(command, env={**kept, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_mutants():
    run(MUTANTS)


def test_everything_else():
    run(*OTHERS)


def test_the_archetypes_of_routing():
    run(TESTS / "backends" / "test_archetypes.py", "-k", "test_forward and triton")
