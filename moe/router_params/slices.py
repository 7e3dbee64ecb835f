"""Parameters of Union of Experts and of MoHD, whose experts are equal slices of one MLP. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Descriptor, Selection
from ..shapes import ModelShape


@dataclass(frozen=True)
class UnionOfExperts:
    """Union of Experts (arXiv 2503.02495): each slice of an MLP takes the share ``keep`` of a sequence's tokens.

    ``select="data"``: a token's gate is softmax with all but the ``k`` best slices set to zero, and a slice takes the
    tokens whose gate is highest. ``select="expert"``: a gate reads a whole sequence of ``sequence`` tokens, no other
    length, and sends all of them to its ``k`` best slices. ``k`` None is half of the slices. The slices are those of
    structure ``split`` (``assignment="contiguous"``), or the experts of a model.

    The released code adds outputs up without the gate (``weighted=False``; then a slice also takes tokens of gate zero
    where it has room, and no gradient reaches the gate), and divides the gate by its sum over the sequences, position
    by position, plus ``batch_norm_epsilon``, times ``capacity`` times their number (rounded down). The last is off by
    default, since it makes the gates of a single sequence all equal. Its attention, whose heads are the experts, is
    ``moe.attention_mixture.selective_attention``.
    """

    causal: ClassVar[bool] = False

    select: Literal["data", "expert"] = "data"
    k: int | None = None
    keep: float = 0.5
    weighted: bool = True
    batch_norm_epsilon: float | None = None
    capacity: float = 1.0
    sequence: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.sequence < 1:
            raise ValueError(f"keep={self.keep} must lie in (0, 1], and sequence={self.sequence} be at least 1")
        if self.batch_norm_epsilon is not None and (self.batch_norm_epsilon < 0 or self.select == "expert"):
            raise ValueError('batch_norm_epsilon must not be negative, and belongs to select="data"')

    @property
    def pipeline(self) -> bool:
        """Whether a scorer for single tokens comes first."""
        return self.select == "data"

    def chosen(self, shape: ModelShape) -> int:
        """Return k."""
        k = max(1, shape.experts // 2) if self.k is None else self.k
        if not 0 < k <= shape.experts:
            raise ValueError(f"k={k} must lie between 1 and the layer's {shape.experts} slices")
        return k

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: tokens compete for a slice."""
        return None

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every slice."""
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return k, or all slices where a gate of zero does not keep a token out."""
        k = self.chosen(shape)
        return shape.experts if self.select == "data" and not self.weighted else k


@dataclass(frozen=True)
class MoHD:
    """MoHD (arXiv 2412.05644): ``shared`` groups of hidden units always on, the ``k`` best others by softmax.

    A group's weight is E s_e times the sum of s over the active groups, so that all groups with even scores have weight
    1. By default half of the groups are active, and three quarters of those shared, as the paper recommends.

    The weight enters before the activation. In a gated MLP it multiplies ``up`` alone, and with relu it passes through,
    since it is positive: so it is a weight on the output, which any backend applies. Other MLPs without a gate are
    refused; ``moe.slices.mohd_forward`` runs them, and the grouped fusion before the activation that is left out here.
    """

    pipeline: ClassVar[bool] = True

    k: int | None = None
    shared: int | None = None

    def active(self, shape: ModelShape) -> tuple[int, int]:
        """Return (shared, k)."""
        half = max(1, shape.experts // 2)
        shared = 3 * half // 4 if self.shared is None else self.shared
        k = half - 3 * half // 4 if self.k is None else self.k
        if shared < 0 or k < 0 or not 0 < shared + k <= shape.experts:
            raise ValueError(f"shared={shared} and k={k} must name between 1 and {shape.experts} groups together")
        return shared, k

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: shared groups are no choice of the scores."""
        return None

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every group."""
        if not shape.gated and shape.activation != "relu":
            raise ValueError(
                f"a weight before {shape.activation} is none on the output of an MLP without a gate; use a gated model"
            )
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return the number of active groups, the same for every token."""
        return sum(self.active(shape))


DESCRIPTORS = [
    Descriptor(
        "routing",
        "uoe",
        "Union of Experts: slices take tokens of each sequence",
        "moebench.moe.routers.slices:uoe",
        UnionOfExperts,
        aliases=("union_of_experts",),
    ),
    Descriptor("routing", "mohd", "MoHD: shared and chosen hidden units", "moebench.moe.routers.slices:mohd", MoHD),
]
