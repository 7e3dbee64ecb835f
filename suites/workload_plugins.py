"""Descriptors and parameters of the workloads: suites that train something small of their own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..contracts import Descriptor, unknown
from .plugins import LayerSuite


def check_positive(params: Any, *names: str) -> None:
    """Raise ValueError where a parameter that counts something is not at least 1."""
    for name in names:
        if getattr(params, name) < 1:
            raise ValueError(f"{name}={getattr(params, name)} must be at least 1")


MODEL = ("depth", "hidden", "heads", "width", "experts", "k", "steps")
"""What every model with experts has some of."""


def check_elimination(params: Any) -> None:
    """Raise ValueError where a step that leaves blocks of tokens out cannot be made."""
    check_positive(params, "tokens", "block", "segments", "rank", "predictor_steps", "finetune_steps", "pairs")
    if not 0 < params.kept <= 1:
        raise ValueError(f"kept={params.kept} must lie in (0, 1]")
    if params.tokens % params.block or params.tokens % params.segments:
        raise ValueError(f"block={params.block} and segments={params.segments} must divide tokens={params.tokens}")


def _check_model(params: Any) -> None:
    """Raise ValueError where the sizes of a model with experts do not fit each other."""
    check_positive(params, *MODEL)
    if params.hidden % params.heads or params.k > params.experts:
        raise ValueError(
            f"heads={params.heads} must divide hidden={params.hidden}, and k={params.k} be at most experts"
        )


@dataclass(frozen=True)
class Lemo:
    """A training step that computes a share ``kept`` of its tokens in every layer but the last (LeMo / Jenga, 2025).

    The model has ``depth`` layers of ``experts`` experts over single bytes, and sees one sequence of ``tokens`` bytes a
    step, chosen in blocks of ``block`` (64 in the paper) by a predictor of rank ``rank``; its loss is taken in
    ``segments`` segments. Metrics: ``saved_*``, ``peak_*`` and ``logits_*`` in bytes, exactly counted;
    ``predictor_recall``; ``loss_*`` on held-out text after ``finetune_steps`` steps with all, the kept or random
    tokens; ``step_time_ratio``, kept over dense, taken in turns in one process over ``pairs`` pairs. A pretrained model
    has `suite=lemo_finetuning`.
    """

    kept: float = 0.5
    tokens: int = 512
    block: int = 32
    segments: int = 8
    rank: int = 32
    depth: int = 4
    hidden: int = 64
    heads: int = 4
    width: int = 96
    experts: int = 4
    k: int = 2
    steps: int = 300
    predictor_steps: int = 150
    finetune_steps: int = 30
    pairs: int = 20

    AXES: ClassVar[Mapping[str, Any]] = LayerSuite.AXES
    WORKLOAD: ClassVar[str] = "moebench.suites.workloads.lemo:LemoWorkload"
    SECONDS: ClassVar[float] = 60.0

    def __post_init__(self) -> None:
        _check_model(self)
        check_elimination(self)


@dataclass(frozen=True)
class SparseD:
    """Block-sparse attention with one mask for all later steps (SparseD), in a masked-diffusion model of single bytes.

    ``tokens`` bytes of which the first ``prompt`` are given are filled in over ``diffusion_steps`` steps. The first
    ``skip`` of them attend to everything; then each head keeps floor(``select`` of its key blocks) + 1 of prompt and
    rest, blocks of ``block`` tokens. The paper takes 0.2, 0.3 and 128; 0.5, 0.3 and 32 for short texts. Metrics:
    ``overlap_*`` (Jaccard, of a head between steps and between heads), ``agreement_*`` (generated tokens as with full
    attention), ``attention_work``; ``generated_symbols``, how many different bytes a sequence has with full attention:
    near 1 every mask agrees, whatever it leaves out, and ``agreement_*`` says nothing.
    """

    skip: float = 0.2
    select: float = 0.3
    block: int = 8
    tokens: int = 128
    prompt: int = 32
    prompts: int = 8
    diffusion_steps: int = 32
    depth: int = 2
    hidden: int = 64
    heads: int = 4
    width: int = 64
    experts: int = 4
    k: int = 2
    steps: int = 1500

    AXES: ClassVar[Mapping[str, Any]] = LayerSuite.AXES
    WORKLOAD: ClassVar[str] = "moebench.suites.workloads.sparsed:SparseDWorkload"
    SECONDS: ClassVar[float] = 180.0

    def __post_init__(self) -> None:
        _check_model(self)
        check_positive(self, "block", "tokens", "prompts")
        if self.tokens % self.block or self.prompt % self.block or not 0 <= self.prompt < self.tokens:
            raise ValueError(
                f"block={self.block} must divide tokens={self.tokens} and the shorter prompt={self.prompt}"
            )
        if not 0 <= self.skip < 1 or not 0 <= self.select <= 1:
            raise ValueError(f"skip={self.skip} must lie in [0, 1) and select={self.select} in [0, 1]")
        if not 2 <= self.diffusion_steps <= self.tokens - self.prompt:
            raise ValueError("diffusion_steps must be at least 2, and at most the tokens to be generated")


@dataclass(frozen=True)
class Delta:
    """Activations passed on as changes between frames (Delta Activation Layer), on digits that move over a canvas.

    Clips of ``frames`` frames of ``canvas`` x ``canvas`` pixels; a digit moves ``speed`` pixels a frame, in whole
    pixels. ``rate`` is what a unit of change costs in training; the same network with nothing charged stands beside it.
    Metrics: ``temporal_density`` (activations that changed), ``spatial_density`` (activations that are not zero),
    ``accuracy``; with ``_uncharged`` those of the other network.
    """

    frames: int = 8
    canvas: int = 12
    speed: float = 0.5
    widths: tuple[int, ...] = (128, 64)
    rate: float = 0.003
    steps: int = 300

    AXES: ClassVar[Mapping[str, Any]] = LayerSuite.AXES
    WORKLOAD: ClassVar[str] = "moebench.suites.workloads.delta:DeltaWorkload"
    SECONDS: ClassVar[float] = 20.0

    def __post_init__(self) -> None:
        check_positive(self, "steps")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths={list(self.widths)} must name at least one layer, each of at least 1")
        if self.frames < 2 or self.canvas <= 8:
            raise ValueError(f"frames={self.frames} must be at least 2, and canvas={self.canvas} wider than 8 pixels")
        if self.rate < 0 or self.speed < 0:
            raise ValueError("rate and speed are not negative")


COLOURS = ("white", "red", "green", "blue", "purple")


@dataclass(frozen=True)
class ColorMAE:
    """Masks from noise of a colour (ColorMAE, ECCV 2024) for a masked autoencoder with experts, on digits of 16x16.

    A share ``masked`` of 64 patches is hidden; masks are crops of ``patterns`` patterns of noise. Metrics for each of
    ``colours``: ``mse_*`` of hidden patches behind its own masks and ``mse_white_masks_*``, ``probe_*`` (linear, held
    out), ``load_cv_*`` of experts over visible patches, ``lonely_*`` (hidden patches without a visible neighbour).
    """

    colours: tuple[str, ...] = COLOURS
    masked: float = 0.75
    patterns: int = 128
    depth: int = 2
    hidden: int = 48
    heads: int = 4
    width: int = 64
    experts: int = 4
    k: int = 1
    steps: int = 200

    AXES: ClassVar[Mapping[str, Any]] = LayerSuite.AXES
    WORKLOAD: ClassVar[str] = "moebench.suites.workloads.colormae:ColorMAEWorkload"
    SECONDS: ClassVar[float] = 90.0

    def __post_init__(self) -> None:
        _check_model(self)
        check_positive(self, "patterns")
        for colour in self.colours:
            if colour not in COLOURS:
                raise ValueError(unknown("colour", colour, COLOURS))
        if not self.colours or not 0 < self.masked < 1:
            raise ValueError(f"masked={self.masked} must lie in (0, 1), and colours name at least one")


@dataclass(frozen=True)
class DiTMoE:
    """A diffusion transformer with experts (DiT-MoE) on digits of 8x8, its samplers, and the Time-Shift Sampler.

    ``samples`` images are drawn with ``sampler`` in ``sampler_steps`` steps, once plainly and once with time steps
    shifted within ``window`` above ``cutoff``; ``data_variance`` corrects the shift for data whose variance is not 1,
    which the paper's code does not. Metrics: ``fd_pixel`` (a Fréchet distance of raw pixels, no network involved),
    ``fd_pixel_shifted``, ``fd_pixel_floor`` (half of the real images against the other half), and ``nmi_*``: what an
    expert says of patch, step and class over the first ``traced`` samples, beside shuffled labels: mutual information
    over the geometric mean of both entropies (probe ``specialisation`` takes the arithmetic mean).
    """

    sampler: Literal["ddim", "pndm"] = "ddim"
    sampler_steps: int = 20
    window: int = 80
    cutoff: int = 200
    data_variance: bool = False
    samples: int = 500
    traced: int = 100
    depth: int = 4
    hidden: int = 96
    heads: int = 4
    width: int = 96
    experts: int = 4
    k: int = 1
    batch: int = 64
    steps: int = 600

    AXES: ClassVar[Mapping[str, Any]] = LayerSuite.AXES
    WORKLOAD: ClassVar[str] = "moebench.suites.workloads.dit_moe:DiTMoEWorkload"
    SECONDS: ClassVar[float] = 120.0

    def __post_init__(self) -> None:
        _check_model(self)
        check_positive(self, "batch")
        if not 0 <= self.window < 1000 or self.cutoff < 0:
            raise ValueError(f"window={self.window} must lie in [0, 1000), and cutoff={self.cutoff} not be negative")
        if not 2 <= self.sampler_steps <= 1000 or self.samples < 100 or not 10 <= self.traced <= self.samples:
            raise ValueError("sampler_steps must lie in [2, 1000], samples be at least 100, traced 10 to samples")


FACTORY = "moebench.suites.workload:create"

DIGITS = ("scikit-learn",)
"""Where the digits come from."""

DESCRIPTORS = [
    Descriptor("suite", "lemo", "a training step with fewer tokens in each layer", FACTORY, Lemo),
    Descriptor("suite", "sparsed", "one sparse attention mask for all later steps of a diffusion", FACTORY, SparseD),
    Descriptor("suite", "delta", "activations passed on as changes between frames", FACTORY, Delta, requires=DIGITS),
    Descriptor(
        "suite", "colormae", "masks from coloured noise for a masked autoencoder", FACTORY, ColorMAE, requires=DIGITS
    ),
    Descriptor("suite", "dit_moe", "samplers and experts of a diffusion transformer", FACTORY, DiTMoE, requires=DIGITS),
]
