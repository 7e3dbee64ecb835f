"""Descriptor and parameters of suite ``probe``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..contracts import Descriptor, unknown
from .plugins import LayerSuite

TEXT = ("tokens", "window")

FIELDS: Mapping[str, tuple[str, ...]] = {
    "super_experts": (*TEXT, "calibration_tokens", "quantile", "fraction", "depth", "forming", "draws"),
    "voids": (*TEXT, "mode", "alpha", "kv", "draws", "prompts", "generated"),
    "lazy_neurons": (*TEXT, "epsilon"),
    "specialisation": (*TEXT, "permutations"),
    "activation_flow": (*TEXT, "share"),
    "sae": (*TEXT, "calibration_tokens", "layer", "dictionary", "sparsity", "steps", "batch", "lr"),
    "lazy_training": ("shape", "widths", "depths", "active", "epochs"),
}
"""The parameters that each probe reads; no other is part of its cases."""

WITHOUT_MODEL = ("lazy_training",)
"""Probes that train models of their own."""

OF_EXPERTS = ("super_experts", "lazy_neurons", "specialisation")
"""Probes that look into the changed layers, and so want some."""

MODES = ("trace", "emulate", "skip")


@dataclass(frozen=True)
class Probe:
    """What can be read off a model: one case per ``probe``, on ``tokens`` tokens of text in windows of ``window``.

    ``super_experts`` (arXiv 2507.23279): an expert is super whose largest output on ``calibration_tokens`` other tokens
    lies above the ``quantile`` and above ``fraction`` of the largest of all, in the layers below ``depth``, as in the
    official code; ``forming`` adds the paper's third clause. The model as it is, without them, and without ``draws``
    random sets.

    ``voids`` (arXiv 2505.14467): layers that add less than ``alpha`` of a token's range of growth; a case per ``mode``.
    ``trace`` changes nothing, ``emulate`` ends each token at its last active layer as the reference code does, ``skip``
    leaves void layers out, their keys and values projected from the state or missing (``kv``), beside ``draws`` random
    skippings. Then ``generated`` tokens after each of ``prompts``.

    ``lazy_neurons`` (arXiv 2210.06313): the share of hidden activations that are no exact zeros, and of those above
    ``epsilon`` times the token's largest. ``specialisation`` (arXiv 2407.11633): what kinds and positions of tokens
    tell of their experts: mutual information over the arithmetic mean of both entropies, against ``permutations`` that
    keep neighbours together (whole parts moved, kinds rotated, within each window). ``activation_flow`` (arXiv
    2412.05644): residual dimensions that hold ``share`` of |h|.

    ``sae`` (arXiv 2406.17759): a dictionary ``dictionary`` times as wide as the attention output before W_O of
    ``layer`` (None: at a third of the depth), trained for ``steps`` of ``batch`` tokens at rate ``lr`` with penalty
    ``sparsity``, beside PCA and a random dictionary.

    ``lazy_training`` (arXiv 2210.06313): ReLU models of digits of each of ``widths`` and ``depths``, plain and with the
    ``active`` largest activations alone, trained for ``epochs``; ``*_ece`` has bins of equal mass.
    """

    probe: tuple[str, ...] = ("super_experts", "voids", "lazy_neurons", "specialisation", "activation_flow")
    tokens: int = 2048
    window: int = 256
    calibration_tokens: int = 1024
    quantile: float = 0.995
    fraction: float = 0.1
    depth: float = 0.75
    forming: bool = False
    draws: int = 5
    mode: tuple[str, ...] = MODES
    alpha: float = 0.8
    kv: Literal["project", "missing"] = "project"
    prompts: int = 2
    generated: int = 16
    epsilon: float = 0.01
    permutations: int = 100
    share: float = 0.9
    layer: int | None = None
    dictionary: int = 4
    sparsity: float = 0.5
    steps: int = 400
    batch: int = 512
    lr: float = 1.2e-3
    shape: Literal["mlp", "transformer"] = "mlp"
    widths: tuple[int, ...] = (32, 512)
    depths: tuple[int, ...] = (1,)
    active: int = 8
    epochs: int = 30

    AXES: ClassVar[Mapping[str, Any]] = {**LayerSuite.AXES, "model": ["smollm2"], "backend": ["eager"]}

    def __post_init__(self) -> None:
        for what, given, known in (("probe", self.probe, FIELDS), ("mode", self.mode, MODES)):
            for name in given:
                if name not in known:
                    raise ValueError(unknown(what, name, known))
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{what} must be names, each once")
        if self.window < 2 or self.tokens < 1 or self.tokens % self.window:
            raise ValueError(f"tokens={self.tokens} must be a positive multiple of window={self.window}, itself >= 2")
        if not 0 < self.share < 1 or not 0 <= self.quantile <= 1 or not 0 < self.depth <= 1:
            raise ValueError("share must lie in (0, 1), quantile in [0, 1] and depth in (0, 1]")
        positive = ("calibration_tokens", "draws", "prompts", "generated", "permutations", "dictionary", "steps")
        for name in (*positive, "batch", "active", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if min(self.widths, default=0) < self.active or min(self.depths, default=0) < 1:
            raise ValueError(f"widths must be at least active={self.active} and depths at least 1")

    def read_by(self, probe: str) -> dict[str, Any]:
        """Return the parameters that a probe reads."""
        return {name: getattr(self, name) for name in FIELDS[probe]}


DESCRIPTORS = [
    Descriptor(
        "suite",
        "probe",
        "super experts, voids, lazy neurons, dictionaries, specialisation, activation flow",
        "moebench.suites.probes:create",
        Probe,
    ),
]
