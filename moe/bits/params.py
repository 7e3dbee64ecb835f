"""Parameters of bit allocation and of its calibration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

By = Literal[
    "uniform",
    "random",
    "random_layers",
    "first",
    "last",
    "frequency",
    "shared",
    "attention",
    "outlier",
    "cosine",
    "greedy",
    "pmq",
]


@dataclass(frozen=True)
class Allocation:
    """How many bits each expert gets.

    ``budget`` is stored bits per weight on average, scales and zeros included; ``bits`` are the choices. ``by`` is the
    rule: PMQ's integer program (MC-MoE, arXiv 2410.06270), layer by layer; the rules of QuantMoE-Bench (arXiv
    2406.08155), which raise units from the widest uniform choice to the widest of all, by first or last layers,
    frequency, shared experts or attention first, outlier scores or the cosine of blocks, most important first; or
    ``greedy``, least error per stored bit. ``uniform``, ``random`` (units) and ``random_layers`` are what these are
    held against.

    ``alpha``, ``beta`` and ``gamma`` are PMQ's exponents of frequency, routing weight and error (the released code
    never uses its gamma: that is 1). ``one_of_each`` wants PMQ to use the two widest choices at least once each.
    ``layers`` is how many layers ``first``, ``last`` and ``random_layers`` raise; ``share`` is the largest part of the
    units that ``random``, ``frequency``, ``outlier`` and ``cosine`` raise (QuantMoE-Bench: a quarter by outlier).
    ``protected`` are (layer, expert) pairs, such as super experts: they get the widest choice before the rule is asked.
    """

    budget: float = 2.5
    bits: tuple[int, ...] = (1, 2, 3)
    by: By = "pmq"
    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 2.0
    one_of_each: bool = True
    layers: int = 1
    share: float = 1.0
    protected: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.bits or list(self.bits) != sorted(set(self.bits)) or self.bits[0] < 1:
            raise ValueError(f"bits={list(self.bits)} must be rising numbers from 1 on")
        if not self.budget > 0:
            raise ValueError(f"budget={self.budget} must be positive")
        if self.layers < 1:
            raise ValueError(f"layers={self.layers} must be at least 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must lie in [0, 1]")
        if min(self.alpha, self.beta, self.gamma) < 0:
            raise ValueError("alpha, beta and gamma must not be negative")
        if any(len(pair) != 2 or min(pair) < 0 for pair in self.protected):
            raise ValueError(f"protected={list(self.protected)} must be pairs [layer, expert], from 0 on")


@dataclass(frozen=True)
class LayerBits:
    """What a plan gives one layer: the bits of each expert that owns weights, and of what else has a part in it."""

    experts: tuple[int, ...]
    shared: int | None = None
    attention: int | None = None


@dataclass(frozen=True)
class CosinePredictor:
    """The predictor of a block's importance (QuantMoE-Bench, arXiv 2406.08155): an MLP with one layer of ``width``.

    Trained with AdamW on squared error, at most ``epochs`` epochs, stopped after ``patience`` without a better error on
    the ``held_out`` part. Tokens per step (``batch``) are our choice; the paper names none.
    """

    width: int = 1024
    lr: float = 1e-4
    weight_decay: float = 1e-2
    epochs: int = 100
    patience: int = 5
    held_out: float = 0.1
    batch: int = 1024

    def __post_init__(self) -> None:
        if min(self.width, self.epochs, self.patience, self.batch) < 1:
            raise ValueError("width, epochs, patience and batch must be at least 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must lie in (0, 1)")
        if not self.lr > 0 or self.weight_decay < 0:
            raise ValueError(f"lr={self.lr} must be positive and weight_decay={self.weight_decay} not negative")
