"""Descriptors and parameters of the built-in backends. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..contracts import Descriptor
from ..kernels import devices


@dataclass(frozen=True)
class Batched:
    """``limit_mib`` bounds the copies of expert weights that one batched product reads; more pairs go in turns.

    Copies below 32 MiB stay in memory that the allocator has already; larger ones cost page faults (measured: 3 times).
    A layer whose call would copy more than ``call_mib`` in all is refused before it takes minutes.
    """

    limit_mib: int = 24
    call_mib: int = 2048

    def __post_init__(self) -> None:
        for name in ("limit_mib", "call_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Duplex:
    """Experts with at least ``crossover`` tokens in a call multiply dequantized weights, the others packed codes.

    None measures it when a layer is loaded, on the layer's own experts. 0 dequantizes all, a number above all tokens
    keeps all packed.
    """

    crossover: int | None = None

    def __post_init__(self) -> None:
        if self.crossover is not None and not 0 <= self.crossover < 2**31:
            raise ValueError(f"crossover={self.crossover} must be a number of tokens; 0 dequantizes all experts")


@dataclass(frozen=True)
class ColumnSkip:
    """An expert's tokens go in chunks of at most ``chunk``, and of each the union of kept channels is read."""

    chunk: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.chunk <= 256:
            raise ValueError(f"chunk={self.chunk} must lie between 1 and 256")


@dataclass(frozen=True)
class Triton:
    """``combine`` says how assignments become tokens: by float32 atomics, or as rows added up in a fixed order.

    Calls of at most ``decode_tokens`` tokens go slot by slot, always in a fixed order; 0: none do.
    """

    combine: Literal["atomic", "deterministic"] = "deterministic"
    decode_tokens: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.decode_tokens <= 64:
            raise ValueError(f"decode_tokens={self.decode_tokens} must lie between 0 and 64")


def interpreting() -> Mapping[str, str]:
    """Return what a worker of Triton kernels needs in its environment: without a device they are interpreted."""
    return {"TRITON_INTERPRET": "1"} if devices.missing("CUDA", "ROCm") else {}


@dataclass(frozen=True)
class CudaFused:
    """``fused`` is one persistent launch of tile tasks, ``two_kernels`` are two plain launches of the same tiles.

    ``deterministic`` adds each token's rows in a fixed order, ``atomic`` as they come.
    """

    variant: Literal["fused", "two_kernels"] = "fused"
    combine: Literal["deterministic", "atomic"] = "deterministic"


@dataclass(frozen=True)
class Offload:
    """``capacity`` is the share of all loaded experts that have a slot; ``policy`` says which, ``prefetch`` who comes
    ahead of time, ``execution`` what becomes of those that are missing: NAME or NAME:ARGUMENT.

    ``tier`` is where the others lie: ``disk``, a file that ``readers`` threads read past the page cache (``io=direct``)
    or through it, with ``staging`` buffers beside the slots; or ``host``, RAM, as they are stored, and a slot holds one
    of them dequantized. ``low`` names the quantization of a second copy of few bits, for executions that fetch it.
    """

    policy: str = "lru"
    prefetch: str = "none"
    execution: str = "fetch"
    capacity: float = 0.25
    tier: Literal["disk", "host"] = "disk"
    io: Literal["direct", "page_cache"] = "direct"
    readers: int = 1
    staging: int = 2
    low: str = "none"

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity={self.capacity} must be a share of the experts, above 0 and at most 1")
        for name in ("readers", "staging"):
            if not 1 <= getattr(self, name) <= 64:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 1 and 64")


DESCRIPTORS = [
    Descriptor(
        "backend", "reference", "every expert in turn in float32, plainly right", "moebench.backends.reference:create"
    ),
    Descriptor("backend", "eager", "sorted loop over experts in the case's dtype", "moebench.backends.eager:create"),
    Descriptor(
        "backend",
        "batched",
        "weights gathered for each (token, slot) pair, then bmm",
        "moebench.backends.batched:Batched",
        Batched,
    ),
    Descriptor("backend", "grouped", "torch grouped_mm on sorted tokens", "moebench.backends.grouped:create"),
    Descriptor("backend", "compiled", "the expert FFN through torch.compile", "moebench.backends.compiled:create"),
    Descriptor(
        "backend", "packed", "int8, int4 and W8A8 codes by torch's CPU products", "moebench.backends.packed:create"
    ),
    Descriptor(
        "backend",
        "duplex",
        "cold experts packed, hot ones dequantized, by measured crossover",
        "moebench.backends.duplex:Duplex",
        Duplex,
    ),
    Descriptor(
        "backend",
        "column_skip",
        "a C kernel that reads the weights of kept channels alone",
        "moebench.backends.column_skip:ColumnSkip",
        ColumnSkip,
    ),
    Descriptor(
        "backend",
        "triton",
        "Triton kernels: grouped products over sorted blocks; interpreted without a GPU",
        "moebench.backends.triton:Triton",
        Triton,
        requires=("triton",),
        environment=interpreting(),
    ),
    Descriptor(
        "backend",
        "cuda_fused",
        "our CUDA kernels of a whole layer; on the CPU through a host shim, untimed",
        "moebench.backends.cuda_fused:CudaFused",
        CudaFused,
    ),
    Descriptor(
        "backend",
        "offload",
        "experts read from a file into a share of slots, by a cache policy",
        "moebench.backends.offload.backend:Offload",
        Offload,
    ),
]
