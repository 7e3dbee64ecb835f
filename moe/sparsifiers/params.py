"""Descriptors and parameters of the methods that leave out channels by what they hold. Imports no torch.

TEAL, CATS, CHESS, WINA and R-Sparse are one family: ``scores`` names the weight of |a_j| at each site, ``rule`` what is
done with the scores, and the rest is a matter of configuration. ``level`` is the fraction left out.
``dense_prefix`` is the share of a sequence's first tokens, rounded up, at which nothing is left out: masking the token
that attention sinks into ruins a model (1 % in the code of TEAL and WINA; 0 leaves none). Suites that see sequences of
text do so; where a layer's tokens are no sequence (throughput), there is no prefix.

With ``attention`` the projections of attention in the changed layers leave out input channels, too, in suites that run
the whole model: at ``level``, whatever ``sites`` and ``allocation`` say of the FFN, each projection with a threshold of
its own where scores differ. Without it attention stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...contracts import Descriptor, SparsitySpec

Rule = Literal["threshold", "topk"]
Allocation = Literal["uniform", "greedy"]

PREFIX = 0.01

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Of attention, as models of the LLaMA kind name them; the first three read the same input."""


def check_level(level: float) -> None:
    """Raise ValueError where ``level`` is no fraction that may be left out."""
    if not 0 <= level < 1:
        raise ValueError(f"level={level} must lie in [0, 1)")


def check_sites(sites: tuple[str, ...]) -> None:
    """Raise ValueError unless ``sites`` are of those that every expert has."""
    if not sites or set(sites) - {"input", "hidden"}:
        raise ValueError("sites must name 'input', 'hidden' or both")


class ChannelParams:
    """What the methods of the family say of themselves, with what holds where one has no parameter for it."""

    level: float
    dense_prefix: float
    rule: str = "threshold"
    rotated: bool = False
    alpha: float = 1.0
    search: bool = False
    alphas: tuple[float, ...] = (1.0,)
    allocation: str = "uniform"
    step: float = 0.05
    attention: bool = False

    def __post_init__(self) -> None:
        check_level(self.level)
        if self.attention and self.rotated:
            raise ValueError("attention=true has no rotated basis at the projections; choose rotated=false or a preset")
        if not 0 <= self.dense_prefix <= 1:
            raise ValueError(f"dense_prefix={self.dense_prefix} must lie in [0, 1]")
        if not self.alphas or not all(0 < alpha <= 1 for alpha in (self.alpha, *self.alphas)):
            raise ValueError("alpha and alphas must be numbers in (0, 1], at least one of them")
        if not 0 < self.step <= 1:
            raise ValueError(f"step={self.step} must lie in (0, 1]")

    @property
    def scores(self) -> Mapping[str, str]:
        """The weight of |a_j| at each site: ``one``, ``column_norm`` or ``up_mean``."""
        raise NotImplementedError

    @property
    def attention_scores(self) -> Mapping[str, str]:
        """The weight of |x_j| at each projection of attention that leaves out inputs: with ``attention``, ``one``."""
        return dict.fromkeys(PROJECTIONS, "one") if self.attention else {}

    def refusal(self, whole_model: bool) -> str | None:
        """Return why a suite cannot run this, or None; ``whole_model``: it runs the attention around the layers."""
        if not self.attention or whole_model:
            return None
        return "attention=true leaves out what attention reads, which this suite does not run; use suite=accuracy"

    def spec(self) -> SparsitySpec | None:
        """Return what a backend must know; None at level 0, which leaves out nothing."""
        if self.level == 0:
            return None
        scores = self.scores
        weights = sorted(set(scores.values()) - {"one"})
        return SparsitySpec(
            tuple(scores),
            weights[0] if weights else "one",
            self.rule,  # type: ignore[arg-type]  # of the Literals above
            self.level,
            per_expert=bool(weights),
            basis=self.rotated and "input" in scores,
            residual=(min(self.alphas) if self.search else self.alpha) < 1,
            dense_prefix=self.dense_prefix,
        )


@dataclass(frozen=True)
class Teal(ChannelParams):
    """TEAL: leave out activations whose magnitude lies below a calibrated threshold (arXiv 2408.14690).

    ``sites``: the input of gate and up, the input of down, or both. With ``allocation=greedy`` each layer divides the
    level among its sites as the paper does: from 0 on, the site whose next ``step`` (of the smallest matrix; others in
    proportion) changes the layer's output least gets it, judged on the last quarter of the calibration tokens. The
    threshold of ``hidden`` is calibrated with ``input`` already sparse; TEAL takes both from the dense model. With
    ``rotated`` the input is decided about in the basis of WINA's transform; ``rule=topk`` keeps a number per token.
    At ``sites=[hidden]`` that is the top-k of lazy neurons (arXiv 2210.06313).
    ``attention``: q, k and v share a threshold on what they read, and o has its own.
    """

    level: float = 0.5
    sites: tuple[str, ...] = ("input", "hidden")
    rule: Rule = "threshold"
    allocation: Allocation = "uniform"
    step: float = 0.05
    rotated: bool = False
    dense_prefix: float = PREFIX
    attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sites(self.sites)

    @property
    def scores(self) -> Mapping[str, str]:
        """Magnitudes as they are."""
        return dict.fromkeys(self.sites, "one")


@dataclass(frozen=True)
class Cats(ChannelParams):
    """CATS: leave out the channels whose |act(gate x)| lies below a threshold (arXiv 2404.08763).

    Gate is computed whole; up and down only where it is kept. For gated experts.
    """

    level: float = 0.5
    dense_prefix: float = PREFIX

    @property
    def scores(self) -> Mapping[str, str]:
        """The gate's magnitude as it is."""
        return {"gate": "one"}


@dataclass(frozen=True)
class Chess(ChannelParams):
    """CHESS: CATS with a threshold for each channel, t_j = tau / E|up_j| (arXiv 2409.01366).

    E is over the calibration tokens of each expert, tau the quantile of |act(gate x)_j| E|up_j| over all of them.
    ``attention`` makes it CHESS+: a scalar threshold on what the query projection reads and one on what the output
    projection reads; k and v, which fill the cache, stay dense.
    """

    level: float = 0.5
    dense_prefix: float = PREFIX
    attention: bool = False

    @property
    def scores(self) -> Mapping[str, str]:
        """The gate's magnitude times the mean magnitude of up."""
        return {"gate": "up_mean"}

    @property
    def attention_scores(self) -> Mapping[str, str]:
        """Magnitudes at the query and the output projection alone."""
        return {"q_proj": "one", "o_proj": "one"} if self.attention else {}


@dataclass(frozen=True)
class Wina(ChannelParams):
    """WINA: score |x_j| by the norm of the weight column that it meets (arXiv 2505.19427), each expert by its own.

    ``preset``: ``paper`` does so at every matrix. ``official``, as the released code, only at gate and up (at gate
    alone where that is a matrix of its own; here both are one, as in the code's Phi), and takes plain magnitudes at
    down. ``transform`` is official after its rotation: gate and up of all experts of the layer, stacked, are brought
    into the basis of their right singular vectors, where their columns are orthogonal, which is the condition of the
    paper's optimality. The norm's own weights are not folded in first, since a layer does not see them. ``rule``,
    ``allocation`` and ``step`` are as in TEAL; the default is a number of channels per token, floor(I (1 - level)).
    ``attention``: every projection by the norms of its own columns, in the official form k alone (q, v and o by plain
    magnitudes, as the released code); the transform's basis at attention is not here.
    """

    level: float = 0.5
    preset: Literal["paper", "official", "transform"] = "paper"
    rule: Rule = "topk"
    allocation: Allocation = "uniform"
    step: float = 0.05
    dense_prefix: float = PREFIX
    attention: bool = False

    @property
    def rotated(self) -> bool:  # type: ignore[override]
        """Whether the input is decided about in the basis of the singular vectors."""
        return self.preset == "transform"

    @property
    def scores(self) -> Mapping[str, str]:
        """Column norms, at down only in the paper's form."""
        return {"input": "column_norm", "hidden": "column_norm" if self.preset == "paper" else "one"}

    @property
    def attention_scores(self) -> Mapping[str, str]:
        """Column norms, in the official form at k alone."""
        normed = PROJECTIONS if self.preset == "paper" else ("k_proj",)
        return {name: "column_norm" if name in normed else one for name, one in super().attention_scores.items()}


@dataclass(frozen=True)
class RSparse(ChannelParams):
    """R-Sparse: WINA's mask for a part of the budget, a low-rank matrix on what is left out (arXiv 2504.19449).

    Of the weights that ``level`` leaves, ``alpha`` go to channels, floor(I (1 - level) alpha) on average, and the rest
    to the first singular triples of the matrix, r = floor((I O (1 - level) - n O) / (I + O)), which read the channels
    left out. With ``search`` each layer tries every pair of ``alphas`` for (gate and up, down) and keeps the one whose
    output on the last quarter of the calibration tokens is nearest to the dense one: a small exhaustive search in the
    place of the paper's evolutionary one over all layers. The released code takes alpha = 1 for plain
    magnitudes (TEAL); here the scale stays, and alpha = 1 is WINA with thresholds. ``attention``: each
    projection with a rank by its own I and O (the code takes k and v for square ones), and ``alpha``, which is not
    searched there.
    """

    level: float = 0.5
    alpha: float = 0.95
    search: bool = False
    alphas: tuple[float, ...] = (0.9, 0.95, 1.0)
    dense_prefix: float = PREFIX
    attention: bool = False

    @property
    def scores(self) -> Mapping[str, str]:
        """Column norms everywhere."""
        return {"input": "column_norm", "hidden": "column_norm"}

    @property
    def attention_scores(self) -> Mapping[str, str]:
        """Column norms everywhere."""
        return dict.fromkeys(super().attention_scores, "column_norm")


STEPS = "moebench.moe.sparsifiers.steps"

DESCRIPTORS = [
    Descriptor("sparsity", "teal", "TEAL magnitude thresholds", f"{STEPS}:channels", Teal, version="2"),
    Descriptor("sparsity", "cats", "CATS thresholds on the gate", f"{STEPS}:channels", Cats),
    Descriptor("sparsity", "chess", "CHESS thresholds on the gate by channel", f"{STEPS}:channels", Chess),
    Descriptor("sparsity", "wina", "WINA magnitudes by column norms", f"{STEPS}:channels", Wina),
    Descriptor("sparsity", "rsparse", "R-Sparse channels and a low rank", f"{STEPS}:channels", RSparse),
]
