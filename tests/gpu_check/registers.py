"""Registers and spills of the Triton kernels that ran in this process, beside what was found by compiling alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checks import FAILED, PASSED, SKIPPED, Result

PACKAGE = "moebench.kernels.triton"


def loaded_kernels(device: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, registers, spills) of every binary of our Triton kernels that the driver loaded on ``device``."""
    modules = [module for name, module in sys.modules.items() if name.startswith(PACKAGE)]
    seen: set[int] = set()
    for kernel in (value for module in modules for value in vars(module).values()):
        if not hasattr(kernel, "device_caches") or id(kernel) in seen:
            continue
        seen.add(id(kernel))
        for binary in kernel.device_caches[device][0].values():
            yield kernel.__name__, int(binary.n_regs), int(binary.n_spills)


def checks(kernels: Iterator[tuple[str, int, int]], static: Path, target: str) -> Iterator[Result]:
    """Yield a result for every kernel: no binary may spill; its registers are told beside those found by compiling."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, registers, spills in kernels:
        found.setdefault(name, []).append((registers, spills))
    if not found:
        yield Result("registers", SKIPPED, "no Triton kernel of ours ran")
        return
    known = static_registers(json.loads(static.read_text()), target)
    for name, figures in found.items():
        spilled = [spills for _, spills in figures if spills]
        data = {"registers": sorted({r for r, _ in figures}), "static_registers": sorted(known.get(name, set()))}
        reason = f"{len(spilled)} of {len(figures)} binaries spill" if spilled else ""
        yield Result(f"registers {name}", FAILED if spilled else PASSED, reason, data)
    if not known:
        yield Result("registers beside static figures", SKIPPED, f"{static.name} holds no figures for {target}")


def static_registers(document: Any, target: str) -> dict[str, set[int]]:
    """Return the registers that ``docs/gpu-static.json`` has for ``target``, by the names of Triton kernels in code.

    They are those of every tile, dtype and layer that was compiled: what ran here need not be among them.
    """
    result: dict[str, set[int]] = {}
    for row in document["rows"]:
        if row["backend"] == "triton" and row["target"] == target and row["status"] == "ok":
            kernel = f"{row['kernel'].removesuffix('_atomic')}_kernel"
            result.setdefault(kernel, set()).add(int(row["metrics"]["registers"]))
    return result
