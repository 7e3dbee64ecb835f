"""Named systems whose router is top-k of softmax, with what they keep always on beside it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Descriptor
from .ffn_only import SoftmaxTopK


@dataclass(frozen=True)
class SharedRule:
    """What is always on: ``width`` in multiples of a routed expert's width, and what its output is multiplied by.

    ``sigmoid`` is sigmoid(w x) per token; ``softmax2`` multiplies the routed sum and the shared output by the two
    halves of a softmax over two logits.
    """

    width: float
    gate: Literal["none", "sigmoid", "softmax2"]


@dataclass(frozen=True)
class Preset(SoftmaxTopK):
    """A top-k router with the shared expert that its system has."""

    @property
    def shared(self) -> SharedRule | None:
        """What is always on beside the routed experts, None where nothing is."""
        return None


@dataclass(frozen=True)
class DiTMoE(Preset):
    """DiT-MoE (arXiv 2407.11633): top-2 of softmax, not renormalised, beside two shared experts.

    The paper's shared experts are as wide as the routed ones; the released code fuses both into one of half a routed
    expert's width (2H where a routed one has 4H).
    """

    @property
    def shared(self) -> SharedRule | None:
        """Two shared experts of full width, ungated."""
        return SharedRule(2.0, "none")


@dataclass(frozen=True)
class TimeMoE(Preset):
    """Time-MoE (arXiv 2409.16040): top-2 of softmax, not renormalised; experts of width F / k, one shared of width F.

    So k routed experts and the shared one have 2F active channels whatever k is.
    """

    @property
    def shared(self) -> SharedRule | None:
        """One shared expert, k times as wide as a routed one, gated by a sigmoid."""
        return SharedRule(float(self.k), "sigmoid")


@dataclass(frozen=True)
class MoELLaVA(Preset):
    """MoE-LLaVA (arXiv 2401.15947): top-2 of softmax, renormalised, nothing shared, on every other layer.

    It trains with DeepSpeed's GShard gate at capacity 1.5, which draws the second expert with Gumbel noise; at
    inference that gate is this one.
    """

    renormalize: ClassVar[bool] = True


@dataclass(frozen=True)
class RobustQA(Preset):
    """Switch layers in DistilBERT for robust question answering (arXiv 2204.09598): top-1, not renormalised.

    Padding has no entries, so it takes no capacity. How many experts and layers it had is not published.
    """

    k: int = 1


@dataclass(frozen=True)
class PRMoE(Preset):
    """PR-MoE (arXiv 2201.05596): top-1 of softmax, not renormalised, beside a dense FFN: y = c0 MoE(x) + c1 FFN(x).

    The pyramid is a matter of the model: ``PYRAMIDS`` says how many experts each MoE layer has.
    """

    PYRAMIDS: ClassVar[dict[str, tuple[int, ...]]] = {
        "1.3B": (64,) * 10 + (128,) * 2,
        "350M": (32,) * 10 + (64,) * 2,
    }

    k: int = 1

    @property
    def shared(self) -> SharedRule | None:
        """The residual FFN, mixed with the routed experts by softmax of Linear(H, 2)."""
        return SharedRule(1.0, "softmax2")


TOPK = "moebench.moe.routers.topk:build"

DESCRIPTORS = [
    Descriptor("routing", "dit_moe", "DiT-MoE top-2, not renormalised", TOPK, DiTMoE),
    Descriptor("routing", "time_moe", "Time-MoE top-2, not renormalised", TOPK, TimeMoE),
    Descriptor("routing", "moe_llava", "MoE-LLaVA top-2, renormalised", TOPK, MoELLaVA),
    Descriptor("routing", "robust_qa", "Robust QA's switch, top-1", TOPK, RobustQA),
    Descriptor("routing", "pr_moe", "PR-MoE top-1 beside a residual FFN", TOPK, PRMoE),
]
