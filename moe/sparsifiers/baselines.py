"""Descriptors and parameters of what the family is held against: chance, and masks of weights. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...contracts import Descriptor, SparsitySpec
from .params import PREFIX, STEPS, check_level, check_sites


@dataclass(frozen=True)
class RandomChannels:
    """Leave out channels by chance: floor(I (1 - level)) of each site are kept, the same for all tokens.

    The baseline that looks at no activation; each layer draws its own channels, by the case's seed.
    """

    level: float = 0.5
    sites: tuple[str, ...] = ("input", "hidden")
    dense_prefix: float = PREFIX

    def __post_init__(self) -> None:
        check_level(self.level)
        check_sites(self.sites)

    def spec(self) -> SparsitySpec | None:
        """Return what a backend must know; None at level 0."""
        if self.level == 0:
            return None
        return SparsitySpec(self.sites, "one", "fixed", self.level, dense_prefix=self.dense_prefix)


@dataclass(frozen=True)
class Magnitude:
    """Set the smallest weights of every row to zero: of a row of I weights I - floor(I level) stay."""

    level: float = 0.5

    def __post_init__(self) -> None:
        check_level(self.level)

    def spec(self) -> SparsitySpec | None:
        """Return what a backend must know; None at level 0."""
        return None if self.level == 0 else SparsitySpec((), "one", level=self.level, masked_weights=True)


@dataclass(frozen=True)
class Wanda(Magnitude):
    """Wanda: set the weights with the smallest |w_ij| * ||x_j|| of every row to zero (arXiv 2306.11695).

    ||x_j|| is over the calibration tokens of each expert, what down reads being that of the dense expert; an expert
    without tokens is pruned by magnitude.
    """


DESCRIPTORS = [
    Descriptor(
        "sparsity", "random_channels", "channels left out by chance", f"{STEPS}:random_channels", RandomChannels
    ),
    Descriptor("sparsity", "magnitude", "smallest weights set to zero", f"{STEPS}:masked_weights", Magnitude),
    Descriptor("sparsity", "wanda", "Wanda: smallest |w| ||x|| set to zero", f"{STEPS}:masked_weights", Wanda),
]
