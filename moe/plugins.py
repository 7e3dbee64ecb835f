"""Descriptors and parameters of routing, structure, quantization and sparsity. Imports no torch.

Besides being checked, a parameter class tells the planner what it does to a layer's shape:

- structure: ``reshape(shape) -> ModelShape``; and where it is not False: ``keeps_blocks`` (packed matrices of a file
  can be cut as it cuts)
- routing: ``kinds(shape)``, ``max_k(shape)``, ``selection(shape)`` (None where a fused kernel cannot take it over); and
  where they are not the values in parentheses: ``causal`` (True: the router does not look ahead), ``pipeline`` (whether
  there is a selection: gate and select can be timed apart), ``structure`` (``none``: what makes its experts) and
  ``beyond_text`` (None: a field of the Context that it needs and text does not give), ``calibrated`` (False: the
  router learns something from calibration tokens) and ``causal_after_prompt`` (False: it looks ahead within a prompt at
  most, where the Context tells one)
- quantization: ``scheme() -> Scheme``; and where they are not False: ``calibrated`` (what the experts read is looked
  at), ``as_stored`` (the model says the scheme, and its file has the bytes), and ``fold``, the place of a step that
  changes the layer before it is quantized (``smoothing.fold``)
- sparsity: ``spec() -> SparsitySpec | None``

Structures and quantizations that multiply what experts read by factors say ``rescales``.

Each raises ValueError with one sentence where the combination is impossible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..contracts import Descriptor, Scheme, Selection, SparsitySpec
from .shapes import ModelShape
from .structure_params import Attentions, Neurons

# --- structure -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keep:
    """The model as it is."""

    keeps_blocks: ClassVar[bool] = True

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape unchanged."""
        if shape.experts == 0:
            raise ValueError("the model's FFNs are dense; choose a structure that makes experts, such as 'split'")
        return shape


@dataclass(frozen=True)
class Split:
    """Cut a dense SwiGLU FFN into ``experts`` slices of its channels whose sum is the FFN, exactly.

    ``shared`` slices with the highest activation rates are always on and become the shared expert. The router is
    fitted on activations. ``assignment`` says how channels are grouped: as they lie, or by co-activation.
    """

    experts: int = 8
    shared: int = 0
    k: int = 2
    assignment: Literal["contiguous", "coactivation"] = "contiguous"

    @property
    def keeps_blocks(self) -> bool:
        """Whether the slices are of neighbouring channels, in their order, so that packed blocks may be cut, too."""
        return self.assignment == "contiguous" and not self.shared

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape of the split layer: ``experts - shared`` routed experts of width F / ``experts``."""
        if shape.experts:
            raise ValueError(f"the model has {shape.experts} experts already; 'split' wants a dense FFN")
        if not shape.gated:
            raise ValueError("'split' is written for gated FFNs (SwiGLU)")
        if shape.width % self.experts:
            raise ValueError(f"a width of {shape.width} cannot be cut into {self.experts} equal experts")
        routed = self.experts - self.shared
        if not 0 < self.k <= routed:
            raise ValueError(f"k={self.k} must lie between 1 and the {routed} routed experts")
        width = shape.width // self.experts
        return shape.with_(
            experts=routed,
            width=width,
            shared_width=shape.shared_width + self.shared * width,
            selection=Selection("one", self.k, renormalize=False),
        )


# --- routing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopK:
    """Top-k of a linear router. What is None is taken from the model's own routing.

    Its selection bias and groups belong to its score function: they are kept where ``score`` is None, and only there.
    """

    k: int | None = None
    score: Literal["softmax", "sigmoid", "one"] | None = None
    renormalize: bool | None = None
    scale: float | None = None

    def selection(self, shape: ModelShape) -> Selection:
        """Return the selection, with the model's own values where none are given."""
        own = shape.selection
        groups = own.groups if self.score is None else None
        k = own.k if self.k is None else self.k
        if not 0 < k <= shape.experts:
            raise ValueError(f"k={k} must lie between 1 and the layer's {shape.experts} experts")
        if groups is not None and k > (available := groups[1] * (shape.experts // groups[0])):
            raise ValueError(f"k={k} must lie between 1 and the {available} experts of the kept groups")
        return Selection(
            own.score if self.score is None else self.score,
            k,
            own.renormalize if self.renormalize is None else self.renormalize,
            own.scale if self.scale is None else self.scale,
            own.bias and self.score is None,
            groups,
        )

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return the most experts a token can have."""
        return self.selection(shape).k


@dataclass(frozen=True)
class Switch(TopK):
    """Switch (arXiv 2101.03961): top-1 of softmax, weight not renormalised.

    In training what the router reads is multiplied by U(1 - ``jitter``, 1 + ``jitter``): 0.01 in the paper, for a
    training to set. The paper's capacity counts within the batch, that of transformers within each sequence.
    """

    k: int | None = 1
    score: Literal["softmax", "sigmoid", "one"] | None = "softmax"
    renormalize: bool | None = False
    scale: float | None = 1.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter={self.jitter} must lie in [0, 1)")


@dataclass(frozen=True)
class Mixtral(TopK):
    """Mixtral (arXiv 2401.04088): top-2 of softmax, renormalised (= softmax of the selected logits)."""

    k: int | None = 2
    score: Literal["softmax", "sigmoid", "one"] | None = "softmax"
    renormalize: bool | None = True
    scale: float | None = 1.0


@dataclass(frozen=True)
class Olmoe(TopK):
    """OLMoE (arXiv 2409.02060): top-8 of softmax, not renormalised."""

    k: int | None = 8
    score: Literal["softmax", "sigmoid", "one"] | None = "softmax"
    renormalize: bool | None = False
    scale: float | None = 1.0


@dataclass(frozen=True)
class Qwen3(TopK):
    """Qwen3-MoE (arXiv 2505.09388): top-8 of softmax, renormalised.

    Released checkpoints renormalise, the default of transformers' configuration does not.
    """

    k: int | None = 8
    score: Literal["softmax", "sigmoid", "one"] | None = "softmax"
    renormalize: bool | None = True
    scale: float | None = 1.0


@dataclass(frozen=True)
class DeepSeekV3:
    """DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, top-k of score + bias in the best groups, renormalised, scaled.

    A group's score is the sum of its two best. ``update_rate`` is the step of the bias after each batch (aux-free
    balancing); the bias never enters the weights.
    """

    k: int = 8
    groups: int = 8
    groups_kept: int = 4
    scale: float = 2.5
    update_rate: float = 0.001

    def selection(self, shape: ModelShape) -> Selection:
        """Return the sigmoid, biased and group-limited selection."""
        if shape.experts % self.groups:
            raise ValueError(f"{shape.experts} experts cannot be cut into {self.groups} equal groups")
        if not 0 < self.groups_kept <= self.groups:
            raise ValueError(f"groups_kept={self.groups_kept} must lie between 1 and groups={self.groups}")
        available = self.groups_kept * (shape.experts // self.groups)
        if not 0 < self.k <= available:
            raise ValueError(f"k={self.k} must lie between 1 and the {available} experts of the kept groups")
        return Selection("sigmoid", self.k, True, self.scale, True, (self.groups, self.groups_kept))

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert."""
        return ("ffn",) * shape.experts

    def max_k(self, shape: ModelShape) -> int:
        """Return k."""
        return self.k


@dataclass(frozen=True)
class MoEPlusPlus:
    """MoE++ (arXiv 2410.07348): zero, copy and constant experts beside the FFNs, and a gating residual.

    ``residual`` adds W_g times the scores of the MoE layer before. ``scorer`` is one linear map (the paper's text) or
    the released code's Linear(H, 8E) - tanh - Linear(8E, E). ``tau`` is the balance between FFN and other experts.
    The router applies neither ``tau`` nor a capacity: loss ``switch`` and ``CapacityRule`` do, the latter by Eq. 8 with
    k T where it says T (with T, 45 % of all assignments find no place).

    Two options do what the released code does besides: ``released_inputs`` multiplies what every expert reads by ``k``
    (there unless ``moe_feature_no_mul_topk``), and ``unit_logits`` divides the logits of a token by their standard
    deviation before the softmax; the residual carries them as they were.
    """

    pipeline: ClassVar[bool] = True

    k: int = 2
    zero: int = 1
    copy: int = 1
    constant: int = 2
    residual: bool = True
    scorer: Literal["linear", "mlp"] = "linear"
    tau: float = 0.75
    scale: float = 1.0
    released_inputs: bool = False
    unit_logits: bool = False

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: the gating residual keeps the router outside a fused kernel."""
        return None

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return the FFN experts, then constant, copy and zero ones, in the order of the released code."""
        extra = ("constant",) * self.constant + ("copy",) * self.copy + ("zero",) * self.zero
        if not 0 < self.k <= shape.experts + len(extra):
            raise ValueError(f"k={self.k} must lie between 1 and the layer's {shape.experts + len(extra)} experts")
        return ("ffn",) * shape.experts + extra

    def max_k(self, shape: ModelShape) -> int:
        """Return k; a token that drew the zero expert has fewer."""
        return self.k


# --- quantization ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoQuantization:
    """Weights in the case's dtype."""

    def scheme(self) -> Scheme:
        """Return the scheme of plain weights."""
        return Scheme()


@dataclass(frozen=True)
class Int8:
    """Round to nearest, 8 bits; ``group`` input channels share a scale, None = one scale per output row."""

    group: int | None = None
    symmetric: bool = True

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme("rtn", 8.0, self.group, self.symmetric)


@dataclass(frozen=True)
class Int4:
    """Round to nearest, 4 bits, two codes per byte; ``group`` input channels share a scale (and a zero point)."""

    group: int | None = 128
    symmetric: bool = False

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme("rtn", 4.0, self.group, self.symmetric)


@dataclass(frozen=True)
class Int2:
    """Round to nearest, 2 bits, four codes per byte; ``group`` input channels share a scale (and a zero point)."""

    group: int | None = 64
    symmetric: bool = False

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme("rtn", 2.0, self.group, self.symmetric)


# --- sparsity --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoSparsity:
    """Every activation is used."""

    def spec(self) -> SparsitySpec | None:
        """Return None."""
        return None


DESCRIPTORS = [
    Descriptor("structure", "none", "the model's own experts", "moebench.moe.structure:keep", Keep),
    Descriptor("structure", "split", "dense FFN cut into experts by channel", "moebench.moe.structure:split", Split),
    Descriptor(
        "structure", "neurons", "every channel an expert of width 1", "moebench.moe.expert_structures:neurons", Neurons
    ),
    Descriptor(
        "structure",
        "attention",
        "attentions in the place of the FFNs",
        "moebench.moe.expert_structures:attentions",
        Attentions,
    ),
    Descriptor("routing", "topk", "the model's own top-k, or as given", "moebench.moe.routers.topk:build", TopK),
    Descriptor("routing", "switch", "Switch top-1", "moebench.moe.routers.topk:build_switch", Switch),
    Descriptor("routing", "mixtral", "Mixtral top-2, renormalised", "moebench.moe.routers.topk:build", Mixtral),
    Descriptor("routing", "olmoe", "OLMoE top-8, not renormalised", "moebench.moe.routers.topk:build", Olmoe),
    Descriptor("routing", "qwen3", "Qwen3-MoE top-8", "moebench.moe.routers.topk:build", Qwen3),
    Descriptor(
        "routing",
        "deepseek_v3",
        "DeepSeek-V3 sigmoid, groups, bias",
        "moebench.moe.routers.deepseek:build",
        DeepSeekV3,
    ),
    Descriptor(
        "routing",
        "moepp",
        "MoE++ zero, copy and constant experts",
        "moebench.moe.routers.moepp:build",
        MoEPlusPlus,
        version="2",  # rows beside a model's own have their size
        aliases=("moe++",),
    ),
    Descriptor("quantization", "none", "weights in the case's dtype", "moebench.moe.quantization:keep", NoQuantization),
    Descriptor("quantization", "int8", "RTN 8 bit", "moebench.moe.quantization:coded", Int8),
    Descriptor("quantization", "int4", "RTN 4 bit per group", "moebench.moe.quantization:coded", Int4),
    Descriptor("quantization", "int2", "RTN 2 bit per group", "moebench.moe.quantization:coded", Int2),
    Descriptor("sparsity", "none", "every activation is used", "moebench.moe.sparsity:keep", NoSparsity),
]
