"""Descriptor and parameters of suite ``sparsity``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contracts import Descriptor
from .plugins import Accuracy


@dataclass(frozen=True)
class Sparsity(Accuracy):
    """What each sparsity leaves out of the chosen layers, and the model's quality with it on text.

    ``target_density`` is what the method was asked to keep, ``density_SITE`` what it kept of the activations at a site;
    ``kept_flops`` and ``kept_bytes`` are the shares of an expert's work for one token that are left in theory, on
    whatever backend. Where attention leaves out inputs, ``density_attention`` is what these projections kept, and
    ``kept_bytes_with_attention`` the share of the bytes of routed experts and attention's maps that a token needs.
    ``tls_SITE`` is the share of channels that a token leaves out, ``cls_C_SITE`` that which C
    neighbours leave out alike (BlockFFN, arXiv 2507.08771), ``union_density_SITE`` what all tokens of the first window
    need: one of them is enough to read a column. In a layer of several experts, channels of an expert that a token is
    not sent to count as left out by it. ``calibration_elapsed`` is the wall time of one calibration of each layer's
    experts, whatever the cache keeps: what it took once, never a latency. All are means over the layers, with series by
    layer and by length of chunk. Then come the figures of suite ``accuracy``.
    """

    AXES: ClassVar[Mapping[str, Any]] = {**Accuracy.AXES, "sparsity": ["none", "teal"]}


DESCRIPTORS = [
    Descriptor(
        "suite",
        "sparsity",
        "densities, savings in theory and quality of sparse layers",
        "moebench.suites.sparsity:create",
        Sparsity,
    ),
]
