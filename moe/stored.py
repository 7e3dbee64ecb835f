"""The packed matrices of a model's file, and what is left of them after a structure."""

from __future__ import annotations

from typing import Any

from .blocks.gguf import GgufTensor, stacked
from .experts import Stored
from .plugins import Keep


def stored_after(structure: Any, stored: Stored | None) -> Stored | None:
    """Return the matrices as a structure with these parameters leaves them; None where it cannot without decoding."""
    if stored is None or isinstance(structure, Keep):
        return stored
    if not getattr(structure, "keeps_blocks", False):
        return None
    return split(stored, structure.experts)


def split(stored: Stored, experts: int) -> Stored | None:
    """Return one gated FFN as ``experts`` slices of neighbouring channels; None of anything but a GGUF's matrices.

    Rows of gate and up lie apart, and so may be cut anywhere. ValueError where a slice would cut a block of ``down``.
    """
    gate_up, down = stored.gate_up[0], stored.down[0]
    if not isinstance(gate_up, GgufTensor) or not isinstance(down, GgufTensor):
        return None
    width = down.shape[1]
    edges = [(width * slot // experts, width * (slot + 1) // experts) for slot in range(experts)]
    halves = [(gate_up.rows(start, stop), gate_up.rows(width + start, width + stop)) for start, stop in edges]
    return Stored(tuple(filter(None, map(stacked, halves))), tuple(down.columns(*edge) for edge in edges))
