"""Parameters of smoothing and of the router's quantization. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Scheme
from ..codecs.integer_params import Gptq, Rtn
from ..shapes import ModelShape


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


@dataclass(frozen=True)
class EAQuant:
    """EAQuant (arXiv 2506.13329): weights and tokens in few bits after smoothing that knows the experts.

    The layer is smoothed by ``smoothing`` before it is quantized: by each of its ``experts`` and its router (a), or,
    as controls, by the whole ``input`` (SmoothQuant), by the ``router`` alone, or not at all; ``alpha`` is the share of
    the activations in a scale. ``hidden`` smooths what ``down`` reads, expert by expert, whatever ``smoothing`` is. The
    gate is kept in ``router`` bits with one scale per expert, null for as it is; with ``align`` it is calibrated to
    choose the same experts (b), without it is rounded to nearest. Its tokens are not rounded. The last ``spare`` part
    of the calibration tokens is set aside: with ``balance`` above 0 tokens are drawn from it until each expert has
    ``balance`` times its expected share, and count for starved experts only (c); with 0 nobody looks at them, so that
    settings with and without differ in what was drawn alone. The paper puts this before DuQuant's rotations; here
    weights are in ``codec``, ``group`` input channels to a scale, and tokens in ``act_bits`` with a scale each (null
    leaves them). Shared experts are smoothed as the others and keep their weights.
    """

    calibrated: ClassVar[bool] = True
    rescales: ClassVar[bool] = True
    fold: ClassVar[str] = "moebench.moe.smoothing.fold:fold"
    """Where the step is that changes a layer before it is quantized."""

    bits: int = 4
    act_bits: int | None = 4
    group: int | None = 128
    symmetric: bool = True
    codec: Literal["rtn", "gptq"] = "rtn"
    smoothing: Literal["experts", "input", "router", "none"] = "experts"
    alpha: float = 0.5
    hidden: bool = True
    router: int | None = 4
    align: bool = True
    balance: float = 1.0
    spare: float = 0.5

    def __post_init__(self) -> None:
        self.weights()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie between 0 and 1")
        if self.act_bits is not None and not 2 <= self.act_bits <= 8:
            raise ValueError(f"act_bits={self.act_bits} must lie between 2 and 8, or be null")
        if self.router is not None:
            RouterQuantization(self.router, self.align)
        if not 0 <= self.spare < 1 or self.balance < 0:
            raise ValueError(f"spare={self.spare} must lie in [0, 1), and balance={self.balance} not be negative")
        if self.balance > 0 and self.spare == 0:
            raise ValueError("balance draws from the spare tokens; give spare a part of them, such as 0.5")

    def weights(self) -> Rtn:
        """Return the parameters of the weights' codec."""
        return {"rtn": Rtn, "gptq": Gptq}[self.codec](self.bits, self.group, self.symmetric)

    def scheme(self) -> Scheme:
        """Return the scheme of every expert."""
        return Scheme(self.codec, float(self.bits), self.group, self.symmetric, act_bits=self.act_bits)


@dataclass(frozen=True)
class Outliers:
    """The same function with ``channels`` of the layer's inputs ``factor`` times as large, as large models have them.

    Which channels depends on the seed alone, so that they are the same in every layer. Experts read them so, with
    weights that are smaller by the factor; a power of two changes no bit of what they compute. For comparisons of
    quantizations on models without outliers of their own. Smoothing by any rule asks for ``factor`` times the scale
    there, and so undoes it whole: what it leaves is as it would be without.
    """

    rescales: ClassVar[bool] = True

    channels: int = 4
    factor: float = 64.0

    def __post_init__(self) -> None:
        if self.channels < 0 or not 0 < self.factor < float("inf"):
            raise ValueError(f"channels={self.channels} must not be negative, and factor={self.factor} be positive")

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape unchanged."""
        if shape.experts == 0:
            raise ValueError("the model's FFNs are dense; 'outliers' wants experts")
        if self.channels > shape.hidden:
            raise ValueError(f"channels={self.channels} must be at most the layer's {shape.hidden} inputs")
        return shape
