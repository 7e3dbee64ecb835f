"""Descriptors and parameters of the built-in backends. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..contracts import Descriptor


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
        "backend", "packed", "int8 and int4 codes by torch's packed CPU products", "moebench.backends.packed:create"
    ),
]
