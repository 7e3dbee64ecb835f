"""Named systems whose router is top-k of softmax, with what they keep always on beside it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Descriptor
from .ffn_only import SoftmaxTopK
from .shared import SharedRule


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

    The paper's shared experts are as wide as the routed ones; ``released_width`` is the released code, which fuses
    both into one of half a routed expert's width (2H where a routed one has 4H).
    """

    released_width: bool = False

    @property
    def shared(self) -> SharedRule | None:
        """Two shared experts of full width, ungated."""
        return SharedRule(0.5 if self.released_width else 2.0)


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
    """Robust QA's switch layers in DistilBERT (arXiv 2204.09598): top-1 of softmax per token, not renormalised.

    ``gate`` ``sequence`` lets the first token of each sequence, which is [CLS] in DistilBERT, choose for all of it:
    the paper also has a gate that chooses experts "for each input". Its released code has none but per token, with a
    bias and 16 experts, in layers of their own on top of DistilBERT.

    Padding has no entries, so it takes no capacity. Where the released code drops tokens (by default it does not), it
    draws which, as capacity policy ``random`` does, and gives a dropped token its own input times its weight; here it
    gets nothing.
    """

    k: int = 1
    gate: Literal["token", "sequence"] = "token"


@dataclass(frozen=True)
class PRMoE(Preset):
    """PR-MoE (arXiv 2201.05596): top-1 of softmax, not renormalised, beside a dense FFN: y = c0 MoE(x) + c1 FFN(x).

    [c0, c1] is the softmax of a linear map of x, which has a bias in DeepSpeed's code and none here. The pyramid is a
    matter of the model: ``PYRAMIDS`` says how many experts each MoE layer has.
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


BUILD = "moebench.moe.routers.presets:build"

DESCRIPTORS = [
    Descriptor("routing", "dit_moe", "DiT-MoE top-2, not renormalised", BUILD, DiTMoE),
    Descriptor("routing", "time_moe", "Time-MoE top-2, not renormalised", BUILD, TimeMoE),
    Descriptor("routing", "moe_llava", "MoE-LLaVA top-2, renormalised", BUILD, MoELLaVA),
    Descriptor(
        "routing",
        "robust_qa",
        "Robust QA's switch, top-1",
        "moebench.moe.routers.presets:build_robust_qa",
        RobustQA,
    ),
    Descriptor("routing", "pr_moe", "PR-MoE top-1 beside a residual FFN", BUILD, PRMoE),
]
