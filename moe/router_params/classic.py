"""Parameters of four classic gates: GShard, X-MoE, sigmoid and expert choice. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...contracts import Descriptor, Selection
from ..shapes import ModelShape
from .dynamic import AnyNumber
from .ffn_only import SoftmaxTopK


@dataclass(frozen=True)
class GShard:
    """GShard (arXiv 2006.16668): the best expert and a second one, in training by chance; weights are p over their sum.

    ``second`` says what chance decides; outside training the second is the second best, always.

    - ``random``, the paper's Algorithm 1: the second best is taken with probability min(1, 2 w_2); where it is not,
      the first keeps its weight w_1.
    - ``gumbel``, the code of DeepSpeed and fairseq: the best of z + Gumbel noise among the other experts, always taken
      (there at inference as well).

    The order of a token's entries is that of its choices, which GShard's capacity needs (``CapacityRule`` with
    ``first_choices``, and with ``renormalize`` as DeepSpeed has it).
    """

    second: Literal["random", "gumbel"] = "random"

    def selection(self, shape: ModelShape) -> Selection:
        """Return top-2 of softmax, renormalised: what the gate does outside training."""
        return Selection("softmax", 2, renormalize=True)

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        if shape.experts < 2:
            raise ValueError(f"GShard chooses two experts and the layer has {shape.experts}; use routing 'switch'")
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return 2."""
        return 2


@dataclass(frozen=True)
class XMoE(SoftmaxTopK):
    """X-MoE (arXiv 2204.09179): top-k of softmax(s cos(P x, m_e)), not renormalised, in ``dim`` dimensions.

    P maps H to ``dim``. s is learned, starts at 1 / ``temperature`` and is at most 100. Without ``bias`` routing does
    not depend on the length of x; P of the released code (Tutel's cosine gate) has one.
    """

    dim: int = 256
    temperature: float = 0.5
    bias: bool = False

    def __post_init__(self) -> None:
        if self.dim < 1 or self.temperature < 0.01:
            raise ValueError(f"dim={self.dim} must be at least 1 and temperature={self.temperature} at least 0.01")


@dataclass(frozen=True)
class SigmoidTopK(SoftmaxTopK):
    """Sigmoid gate (BASE layers, arXiv 2103.16716): top-k of z, each weighted by sigmoid(z) on its own.

    FSMoE lists it among its four gates; that it is BASE's and not renormalised is our reading. BASE's balanced
    assignment of tokens is not part of it.
    """

    def selection(self, shape: ModelShape) -> Selection:
        """Return the selection by sigmoid, not renormalised."""
        return replace(super().selection(shape), score="sigmoid")


@dataclass(frozen=True)
class ExpertChoice(AnyNumber):
    """Expert choice (arXiv 2202.09368): every expert takes its ceil(k T / E) best tokens, with weight p.

    ``k`` is the mean number of experts per token; p is softmax over experts. ``per`` says among which tokens an expert
    chooses: the whole batch, or each segment. Either way later tokens decide about earlier ones: not for decoding.
    """

    pipeline: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    k: int = 2
    per: Literal["batch", "segment"] = "batch"

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        if not 0 < self.k <= shape.experts:
            raise ValueError(f"k={self.k} must lie between 1 and the layer's {shape.experts} experts")
        return super().kinds(shape)


DESCRIPTORS = [
    Descriptor("routing", "gshard", "GShard top-2, random second", "moebench.moe.routers.classic:build_gshard", GShard),
    Descriptor(
        "routing",
        "xmoe",
        "X-MoE: cosine scores in few dimensions",
        "moebench.moe.routers.classic:build_xmoe",
        XMoE,
        aliases=("x-moe",),
    ),
    Descriptor("routing", "sigmoid", "top-k with sigmoid weights", "moebench.moe.routers.topk:build", SigmoidTopK),
    Descriptor(
        "routing",
        "expert_choice",
        "experts choose their tokens",
        "moebench.moe.routers.classic:build_expert_choice",
        ExpertChoice,
    ),
]
