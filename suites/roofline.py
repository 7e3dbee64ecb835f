"""Suite ``roofline``: what this host can do at best, as probes stored per host. Imports torch only in workers.

``gemm`` multiplies square matrices (peak flop/s of a dtype); ``read`` takes the dot product of a buffer with itself
(byte/s of the cache level that holds it, or of DRAM); ``disk`` reads a file past the page cache, where asked to. Rates
are those of the fastest call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..contracts import Case, Check, Choice, Cost, Facts, Planned, Registry, Trial
from .base import SuiteConfig, plain_case, threads_refusal

if TYPE_CHECKING:
    from torch import Tensor

DRAM_BYTES = 2**28
"""The smallest buffer that counts as lying in DRAM."""


@dataclass(frozen=True)
class Roofline:
    """The suite; the size of the matrices and the levels to read are its parameters in the configuration."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield, for each number of threads, one gemm probe per dtype and one read probe per memory level."""
        params = config.suite_params
        levels = {**params.levels, "DRAM": int(max(config.cache_bytes * params.dram_factor, DRAM_BYTES))}
        for threads in config.axes["threads"]:
            for dtype in config.axes["dtype"]:
                yield self._planned(config, threads, dtype, {"probe": "gemm", "size": params.size})
            for level, size in levels.items():
                yield self._planned(config, threads, "float32", {"probe": "read", "level": level, "size": size})
        if params.disk_bytes:
            probe = {"probe": "disk", "level": "disk", "size": params.disk_bytes}
            yield self._planned(config, config.axes["threads"][0], "float32", probe)

    @staticmethod
    def _planned(config: SuiteConfig, threads: int, dtype: str, probe: dict[str, Any]) -> Planned:
        case = plain_case(config, backend=Choice("probe", probe), dtype=dtype, threads=threads)
        size = 0 if probe["probe"] == "gemm" else probe["size"]
        if 2 * size > config.memory_bytes:
            return Planned(case, f"a buffer of {size / 2**30:.1f} GiB does not fit; lower suite.dram_factor.")
        return Planned(case, threads_refusal(threads))

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the probe."""
        from .disk import Disk

        kinds: dict[str, Callable[[Case], Trial]] = {"gemm": Gemm, "read": Read, "disk": Disk}
        return kinds[case.backend.params["probe"]](case)


class Gemm:
    """C = A B for square matrices of the case's dtype."""

    state: Literal["none"] = "none"
    steps = 1

    def __init__(self, case: Case) -> None:
        import torch

        self.torch, self.size = torch, int(case.backend.params["size"])
        dtype = getattr(torch, case.dtype)
        rng = torch.Generator().manual_seed(case.seed)
        self.a, self.b = (torch.randn(self.size, self.size, generator=rng).to(dtype) for _ in range(2))
        self.out = torch.empty_like(self.a)
        self.expected = self.a[:8].double() @ self.b.double()
        self.bound = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-2)

    def begin_turn(self) -> None:
        """Fill the output with NaN."""
        self.out.fill_(self.torch.nan)

    def run(self, step: int) -> Tensor:
        """Multiply."""
        result: Tensor = self.torch.mm(self.a, self.b, out=self.out)
        return result

    def verify(self, step: int, output: Tensor) -> Check:
        """Check the first rows against float64, and that everything was written."""
        error = float((output[:8].double() - self.expected).norm() / self.expected.norm())
        finite = bool(self.torch.isfinite(output).all())
        return Check(finite and error <= self.bound, error, self.bound, "" if finite else "unwritten or NaN")

    def cost(self, step: int) -> Cost:
        """Return 2 n^3 flops over three matrices."""
        moved = 3.0 * self.a.nbytes
        return Cost(2.0 * self.size**3, moved, footprint=moved)

    def facts(self) -> Facts:
        """Name the rate that the fastest call establishes."""
        return Facts(notes={"rate": "peak_flops", "per": "flops"})

    def close(self) -> None:
        """Nothing to free."""


class Read:
    """One pass over a buffer: x . x."""

    state: Literal["none"] = "none"
    steps = 1

    def __init__(self, case: Case) -> None:
        import torch

        self.torch, self.level = torch, str(case.backend.params["level"])
        self.x = torch.ones(int(case.backend.params["size"]) // 4)
        self.x[::2] = -1  # every square is 1: the sum counts what was read, and float32 lanes add it exactly
        self.out = torch.empty(())

    def begin_turn(self) -> None:
        """Fill the output with NaN."""
        self.out.fill_(self.torch.nan)

    def run(self, step: int) -> Tensor:
        """Read the buffer once."""
        result: Tensor = self.torch.dot(self.x, self.x, out=self.out)
        return result

    def verify(self, step: int, output: Tensor) -> Check:
        """Check that every element was counted."""
        error = abs(float(output) / len(self.x) - 1)
        return Check(error <= 1e-6, error, 1e-6, "" if error <= 1e-6 else "the sum does not count every element")

    def cost(self, step: int) -> Cost:
        """Return two flops per element, each element read once."""
        return Cost(2.0 * len(self.x), float(self.x.nbytes), footprint=float(self.x.nbytes))

    def facts(self) -> Facts:
        """Name the rate that the fastest call establishes."""
        return Facts(notes={"rate": f"bandwidth_{self.level}", "per": "bytes"})

    def close(self) -> None:
        """Nothing to free."""


def create(params: Any) -> Roofline:
    """Make the suite."""
    return Roofline()
