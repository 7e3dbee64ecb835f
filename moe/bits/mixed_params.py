"""Parameters of quantization ``mixed``. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from ...contracts import MIXED, Scheme
from ..codecs.integer_params import Gptq, Hqq, Rtn
from .params import Allocation, By

CODECS = {"rtn": Rtn, "gptq": Gptq, "hqq": Hqq}

MODEL_RULES = ("first", "last", "random_layers", "cosine", "shared", "attention")
"""Rules that compare layers, or units beside the routed experts: they want scope ``model``."""

UNCOUNTED_RULES = ("uniform", "random", "random_layers", "first", "last", "outlier", "cosine", "shared", "attention")
"""Rules that need neither counts nor errors, which attention has none of that could be held against an expert's."""


@dataclass(frozen=True)
class Mixed:
    """Experts in different numbers of ``bits``, ``budget`` stored bits per weight on average, scales and offsets
    included.

    ``by`` is the rule: PMQ's integer program (MC-MoE, arXiv 2410.06270); the error per bit (``greedy``); those of
    QuantMoE-Bench (arXiv 2406.08155): the busiest experts or those with outliers first, the ``first`` or ``last``
    ``layers``, layers by the predicted ``cosine`` of what they read and what they say (without the residual stream; the
    predictor's error is the least over epochs, of the tokens that also stop its training), the ``shared`` expert or
    ``attention`` first; ``random``, ``random_layers`` or ``uniform``, which these are held against. ``share`` is the
    largest part of the units that ``random``, ``frequency``, ``outlier`` and ``cosine`` raise. ``alpha``, ``beta`` and
    ``gamma`` are PMQ's exponents of frequency, routing weight and error (the released code never uses its gamma: that
    is 1); ``one_of_each`` wants it to use the two widest choices at least once. Errors are those of rounding to
    nearest; the weights are then in ``codec``, ``group`` input channels to a scale. One bit is a sign (in ``hqq``,
    which only seeks offsets, that of rounding to nearest).

    The budget is spent in each layer (``scope: layer``), or once over the layers ``over`` of the model (``scope:
    model``; none named: all that hold experts), whichever of them are then run. There the layers' shared experts
    (``shared``) and the attention around them (``attention``) can have a part in it; both run on what their bytes
    dequantize to. What attention reads is not recorded, so that it wants codec ``rtn`` or ``hqq``. PMQ spends the
    budget in each layer in either scope. ``protected`` are [layer, expert] pairs that get the widest choice before the
    rule is asked, as super experts should (arXiv 2507.23279).
    """

    calibrated: ClassVar[bool] = True

    budget: float = 2.5
    by: By = "pmq"
    bits: tuple[int, ...] = (1, 2, 3)
    codec: Literal["rtn", "gptq", "hqq"] = "gptq"
    group: int | None = 128
    symmetric: bool = False
    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 2.0
    one_of_each: bool = True
    layers: int = 1
    share: float = 1.0
    protected: tuple[tuple[int, int], ...] = ()
    scope: Literal["layer", "model"] = "layer"
    over: tuple[int, ...] = ()
    shared: bool = False
    attention: bool = False

    def __post_init__(self) -> None:
        self.allocation()
        for bits in self.bits:
            self.at(bits)
        if self.scope == "layer" and (self.over or self.shared or self.attention or self.by in MODEL_RULES):
            raise ValueError(
                f"over, shared, attention and by={self.by} of {list(MODEL_RULES)} look beyond one layer's routed "
                f"experts; give scope=model"
            )
        if len(set(self.over)) < len(self.over):
            raise ValueError(f"over={list(self.over)} names a layer twice; give each once")
        if self.by in ("shared", "attention") and not getattr(self, self.by):
            raise ValueError(f"by={self.by} raises what has no part in the budget; give {self.by}=true")
        if self.by == "pmq" and self.shared:
            raise ValueError("PMQ's program is one of routed experts; choose another rule with shared=true")
        if self.attention and (self.by not in UNCOUNTED_RULES or self.codec == "gptq"):
            raise ValueError(
                f"what attention reads is not recorded; with attention=true give codec rtn or hqq, and one of the "
                f"rules {list(UNCOUNTED_RULES)}"
            )

    def scheme(self) -> Scheme:
        """Return the scheme of the layer as a whole, whose experts have schemes of their own."""
        return Scheme(MIXED, self.budget, self.group, self.symmetric)

    def at(self, bits: int) -> Rtn:
        """Return the codec's parameters at ``bits`` bits; one bit is a sign, whose two levels are symmetric.

        The two levels of one asymmetric bit would be the least and the largest weight of a group, which few are near.
        """
        if bits == 1:
            return (Rtn if self.codec == "hqq" else CODECS[self.codec])(bits, self.group, True)
        return CODECS[self.codec](bits, self.group, self.symmetric)

    def allocation(self) -> Allocation:
        """Return the parameters of the rule."""
        shared = {field.name for field in fields(self)} & {field.name for field in fields(Allocation)}
        return Allocation(**{name: getattr(self, name) for name in shared})

    def span(self, available: Sequence[int]) -> tuple[int, ...]:
        """Return the layers over which the budget is spent, rising, out of those that hold experts."""
        return tuple(sorted(self.over or available))

    def refusal(self, layers: Sequence[int], available: Sequence[int], whole_model: bool) -> str | None:
        """Return why ``layers`` cannot be quantized so, or None; ``whole_model``: their attention is run, too."""
        empty = sorted(set(self.over) - set(available))
        if empty:
            return f"layer {empty[0]} of over holds no experts; name layers of {sorted(available)}"
        span = available if self.scope == "layer" else self.span(available)
        unprotected = sorted({layer for layer, _ in self.protected} - set(span))
        if unprotected:
            return f"protected layer {unprotected[0]} has no experts in the budget; name layers of {sorted(span)}"
        if self.scope == "layer":
            return None
        absent = sorted(set(layers) - set(span))
        if absent:
            return f"layer {absent[0]} has no part in a budget over layers {list(span)}; change over"
        if self.attention and not whole_model:
            return (
                "attention=true quantizes what is around the layers, which this suite does not run; use suite=accuracy"
            )
        return None
