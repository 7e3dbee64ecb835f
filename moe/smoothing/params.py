"""Parameters of smoothing and of the router's quantization. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...contracts import Scheme


@dataclass(frozen=True)
class Smoothing:
    """Smooth a layer's inputs before it is quantized: by each of its ``experts`` and its router (EAQuant).

    The controls: by the whole ``input`` with no expert known (SmoothQuant), or by the ``router`` alone. ``alpha`` is
    the share of the activations in the scale; ``hidden`` smooths what ``down`` reads, too, by expert.
    """

    by: Literal["experts", "input", "router"] = "experts"
    alpha: float = 0.5
    hidden: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie between 0 and 1")


@dataclass(frozen=True)
class RouterQuantization:
    """The router's weight in ``bits`` bits with one scale per expert; ``align`` calibrates it (EAQuant), else RTN."""

    bits: int = 4
    align: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits={self.bits} cannot be packed; use 2, 4 or 8")

    def scheme(self) -> Scheme:
        """Return the scheme of the router's weight."""
        return Scheme("rtn", float(self.bits), None, True)
