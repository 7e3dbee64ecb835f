"""The trial of a compiled kernel: its only step compiles and reads it; bars that code must pass are its oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..contracts import Case, Check, Cost, ExecutedPath, Facts, Metric
from ..kernels.isa import Code, Resources, resources
from ..kernels.occupancy import Occupancy, occupancy
from ..kernels.targets import Target, target
from ..moe.shapes import ModelShape
from .static_compile import cuda_code, triton_code
from .static_kernels import Kernel, kernel_named


@dataclass(frozen=True)
class Compiled:
    """A kernel's code, and what was found in it."""

    code: Code
    found: Resources
    held: Occupancy


class StaticTrial:
    """Compiles one kernel for one target."""

    state: Literal["none"] = "none"
    steps = 1

    def __init__(self, case: Case, shape: ModelShape) -> None:
        self.case, self.shape = case, shape
        self.kernel = kernel_named(case.backend.params["kernel"])
        self.target = target(case.workload["target"])
        self.compiled: Compiled | None = None

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> Compiled:
        """Compile the kernel and read its code."""
        case, name = self.case, self.kernel.name
        if self.kernel.backend == "cuda_fused":
            code = cuda_code(name, self.shape, case.dtype, self.target)
        else:
            code = triton_code(name, case.backend.params["tile"], self.shape, case.tokens, case.dtype, self.target)
        found = resources(code)
        self.compiled = Compiled(code, found, occupancy(self.target, code.threads, found.registers, found.shared))
        return self.compiled

    def verify(self, step: int, output: Compiled) -> Check:
        """Check the bars."""
        reason = broken_bar(output.found, output.held, self.kernel, self.case.dtype, self.target)
        return Check(not reason, reason=reason)

    def cost(self, step: int) -> Cost:
        """Return nothing: compiling has no time to compare work with."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return what the code needs and what it is made of; nothing before it is compiled."""
        if self.compiled is None:
            return Facts()
        executed = ExecutedPath("dense", kernels=(self.compiled.code.name,), notes=f"compiled for {self.target.name}")
        return Facts(metrics_of(self.compiled), executed=executed)

    def close(self) -> None:
        """Nothing to free."""


def broken_bar(found: Resources, held: Occupancy, kernel: Kernel, dtype: str, on: Target) -> str:
    """Return the first bar that the code of ``kernel`` breaks, in words; an empty string where it breaks none.

    Spills are looked at before registers: a kernel that spills may show few of them.
    """
    if found.stack or found.spills:
        return f"the code spills: {found.stack} bytes of stack a thread, {found.spills} spills"
    if found.shared > on.shared_per_block:
        return f"{found.shared} bytes of shared memory are more than the {on.shared_per_block} of a block on {on.name}"
    if not held.blocks:
        return f"no block fits a multiprocessor of {on.name}, by its {' and '.join(held.limits)}"
    for kind in kernel.needs(dtype):
        if not found.kinds[kind] and (kind != "async_copy" or on.async_copy):
            return f"the code has no {kind} instruction"
    return ""


def metrics_of(compiled: Compiled) -> tuple[Metric, ...]:
    """Return the numbers of a row."""
    found, held = compiled.found, compiled.held
    numbers = {
        "registers": (found.registers, "1"),
        "stack": (found.stack, "byte"),
        "spills": (found.spills, "1"),
        "shared_memory": (found.shared, "byte"),
        "threads_per_block": (compiled.code.threads, "1"),
        "blocks_per_processor": (held.blocks, "1"),
        "occupancy": (held.share, "1"),
        "instructions": (found.instructions, "1"),
        **{f"{kind}_instructions": (number, "1") for kind, number in found.kinds.items()},
    }
    return tuple(Metric(name, float(value), unit) for name, (value, unit) in numbers.items())
