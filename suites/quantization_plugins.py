"""Descriptor and parameters of suite ``quantization``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contracts import Descriptor
from .plugins import Accuracy


@dataclass(frozen=True)
class Quantization(Accuracy):
    """What each quantization makes of the chosen layers: bytes, errors, and the model's quality on text.

    Every layer is really quantized, whatever the cache keeps. ``expert_bytes`` are its bytes in memory, ``file_bytes``
    those of a safetensors file of its experts, ``file_header_bytes`` of these, and ``bits_per_weight`` is 8 x
    ``expert_bytes`` / weights. ``quantize_elapsed`` is the wall time of one call for each layer, reading its
    calibration included: what it took once, never a latency. ``weight_error`` is |W - W'| / |W|; ``held_out_error`` the
    error of each token's output on at most 1024 tokens that no calibration saw, against the same layer, routed in the
    same way, without quantization and sparsity. All are sums or means over the layers, with series by layer and expert.
    Then come the figures of suite ``accuracy`` on ``tokens`` tokens in windows of ``window``; they are NULL, with the
    reason, where the model has no text.
    """

    AXES: ClassVar[Mapping[str, Any]] = {**Accuracy.AXES, "quantization": ["none", "int8", "int4"]}


DESCRIPTORS = [
    Descriptor(
        "suite",
        "quantization",
        "bytes, errors and quality of quantized layers",
        "moebench.suites.quantization:create",
        Quantization,
    ),
]
