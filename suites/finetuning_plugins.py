"""Descriptor and parameters of the suite that fine-tunes a pretrained model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contracts import Descriptor
from .plugins import LayerSuite
from .workload_plugins import FACTORY, check_elimination, check_positive


@dataclass(frozen=True)
class LemoFinetuning:
    """A step of fine-tuning all weights of a pretrained model, where every layer but the last computes a share ``kept``
    of its tokens (LeMo / Jenga, 2025): `suite=lemo` of a real model.

    The step reads one sequence of ``tokens`` tokens; eliminated tokens pass by in the residual stream, kept ones keep
    their positions and attend to kept ones. Blocks of ``block`` are chosen by a predictor of rank ``rank`` that learns
    from ``fitted`` sequences of other text, beginning with the mean score of each pair of places, or by the layer's own
    attention. Metrics are those of `suite=lemo`, over
    ``judged`` held-out sequences, and ``loss_forward_random`` and ``loss_forward_oracle`` (the untouched model with
    random blocks, and with those of its own attention), ``saved_loss`` (bytes of segments without any layer), and
    ``step_time_ratio_oracle``. Fine-tuning is Adam of rate ``lr``. The model's attention must be that of Llama.
    """

    kept: float = 0.5
    tokens: int = 512
    block: int = 32
    segments: int = 8
    rank: int = 32
    fitted: int = 8
    predictor_steps: int = 20
    judged: int = 3
    finetune_steps: int = 3
    lr: float = 1e-5
    pairs: int = 6

    AXES: ClassVar[Mapping[str, Any]] = {**LayerSuite.AXES, "model": ["smollm2"]}
    WORKLOAD: ClassVar[str] = "moebench.suites.workloads.lemo_finetuning:LemoFinetuningWorkload"
    SECONDS: ClassVar[float] = 240.0

    def __post_init__(self) -> None:
        check_elimination(self)
        check_positive(self, "fitted", "judged")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be above 0")


DESCRIPTORS = [
    Descriptor(
        "suite",
        "lemo_finetuning",
        "a fine-tuning step of a pretrained model with fewer tokens in each layer",
        FACTORY,
        LemoFinetuning,
        requires=("transformers",),
    ),
]
