"""Check everything that only a GPU can show, and write what it said; no check begins after 15 minutes.

    python tests/gpu_check/check.py [--out docs/gpu] [--only BACKEND,...]

Exits 0 where nothing failed, 1 where something did, and 3, loudly, where there is no GPU: nothing is checked then. With
`--only` the conformance of these backends alone is run, and nothing is written: what a sanitizer looks at.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checks import Check, document, exit_code, run_all

NO_GPU = 3
ROOT = Path(__file__).resolve().parents[2]


def absent() -> str:
    """Return why there is nothing to check here, or an empty string."""
    from moebench.kernels import devices

    return devices.missing("CUDA", "ROCm") or _torch_absent()


def _torch_absent() -> str:
    import torch

    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU; install its build for one"


def machine() -> dict[str, Any]:
    """Return what was checked on what: the device, its driver, versions, and the state of the sources."""
    from moebench.bench import host
    from moebench.bench.gpu.nvml import open_gpu
    from moebench.bench.gpu.torch_device import TorchDevice

    device = TorchDevice().facts()
    with open_gpu(device["uuid"]) as gpu:
        driver = gpu.facts()
    commit, dirty = host.git_facts(ROOT)
    installed = host.packages()
    names = ("torch", "triton", "cuda-bindings", "nvidia-ml-py", "vllm", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "driver": driver,
        "commit": commit,
        "uncommitted_changes": dirty,
        "python": platform.python_version(),
        "packages": {name: installed.get(name) for name in names},
    }


def all_checks(store: Path, target: str) -> dict[str, Check]:
    """Return every check by name, the quick ones first."""
    import conformance
    import programs
    import registers
    import timing

    from moebench.contracts import Registry

    registry = Registry.load()
    return {
        "conformance": lambda: conformance.checks(registry, "cuda"),
        "registers": lambda: registers.checks(registers.loaded_kernels(0), ROOT / "docs" / "gpu-static.json", target),
        "timing": lambda: timing.table(store / "timing", registry.names("backend")),
        "a/a gate": lambda: programs.a_a_gate(store),
        "sanitizers": programs.sanitizers,
    }


def only(names: str) -> int:
    """Run the conformance of some backends and return the exit status."""
    import conformance

    from moebench.contracts import Registry

    found = run_all({"conformance": lambda: conformance.checks(Registry.load(), "cuda", names.split(","))}, print)
    return exit_code(found)


def write(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write the document as <device>-<date>.json and return its path."""
    device = re.sub(r"[^a-z0-9]+", "-", str(found["machine"]["device"]["name"]).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device}-{found['machine']['date'][:10]}.json"
    path.write_text(json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return path


def main(arguments: list[str]) -> int:
    """Check, tell, write."""
    parser = argparse.ArgumentParser(description="Check what only a GPU can show.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu", help="folder of the document")
    parser.add_argument("--only", metavar="LIST", help="conformance of these backends alone")
    options = parser.parse_args(arguments)
    why = absent()
    if why:
        print(f"gpu_check: NOT RUN, nothing was checked: {why}.", file=sys.stderr)
        return NO_GPU
    if options.only:
        return only(options.only)
    told = machine()
    target = f"sm_{told['device']['capability'].replace('.', '')}"
    with tempfile.TemporaryDirectory() as store:
        os.environ["MOEBENCH_STORE"] = store
        results = run_all(all_checks(Path(store), target), print)
    found = document(told, results)
    path = write(options.out, found)
    print(f"{found['counts']}; written to {path}; commit it, with the figures as they are")
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
