"""The shipped text as symbols of one byte: training from its calibration half, judging from its evaluation half.

Shape letters: N symbols of a text, B windows, T symbols of one window.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..text import calibration_text, evaluation_text

SYMBOLS = 128
"""ASCII; other characters become '?'."""


@cache
def symbols(held_out: bool) -> Tensor:
    """Return the text as int64 [N], values below SYMBOLS."""
    text = evaluation_text() if held_out else calibration_text()
    return torch.frombuffer(bytearray(text.content.encode("ascii", "replace")), dtype=torch.uint8).long()


def windows(symbols_N: Tensor, count: int, length: int, rng: torch.Generator) -> Tensor:
    """Return ids_BT of ``count`` random places."""
    start_B = torch.randint(len(symbols_N) - length, (count,), generator=rng)
    return symbols_N[start_B[:, None] + torch.arange(length)]


def text_sha256() -> str:
    """Return the identity of what is trained on."""
    return calibration_text().sha256
