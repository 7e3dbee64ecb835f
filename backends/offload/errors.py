"""The mistakes and mishaps of offload, each told in one sentence. Imports no torch."""

from __future__ import annotations

from ...contracts import MoebenchError


class OffloadError(MoebenchError):
    """A slab file that cannot be written, is not whole, or cannot be read; the sentence names the remedy."""


def named(key: tuple[int, int], form: str) -> str:
    """Return how an expert is called in a message."""
    layer, expert = key
    return f"expert {expert} of layer {layer}" + ("" if form == "full" else f" (form {form})")
