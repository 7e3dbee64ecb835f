"""Kernels compiled for the tests: tiny ones of CUDA C++ here, those of Triton in a process that does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.kernels.cuda import nvrtc

AOT = Path(__file__).with_name("aot.py")


@pytest.fixture(scope="session")
def nvrtc_here():
    if nvrtc.missing():
        pytest.skip(nvrtc.missing())


@pytest.fixture(scope="session")
def triton_codes(tmp_path_factory):
    """Resources of the tiny Triton kernel of ``aot.py``, by target."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, str(AOT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
