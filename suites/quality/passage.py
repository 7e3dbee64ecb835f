"""A seeded piece of the evaluation text as token ids. Shape letters: T tokens to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models import substream
from ..models.smollm2_jobs import CHARACTERS_PER_TOKEN, token_ids
from ..text import Text


@dataclass(frozen=True)
class Passage:
    """``ids`` int64 [T + 1]: each of the first T predicts its successor, which is ``bytes_T`` (float64) bytes long."""

    ids: Tensor
    bytes_T: Tensor


def take_passage(tokenizer: Any, text: Text, tokens: int, seed: int) -> Passage:
    """Return ``tokens`` + 1 consecutive tokens of ``text``, from the start of a paragraph that ``seed`` decides.

    The tokenizer must be a byte-level BPE: each character of a token's name stands for one byte.
    """
    rng = torch.Generator().manual_seed(substream(seed, "evaluation"))
    latest = max(1, len(text.content) - CHARACTERS_PER_TOKEN * (tokens + 1))
    wanted = int(torch.randint(latest, (), generator=rng))
    start = text.content.rfind("\n\n", 0, wanted)
    rest = replace(text, content=text.content[start + 2 if start >= 0 else 0 :])
    ids = token_ids(tokenizer, rest, tokens + 1)
    names = tokenizer.convert_ids_to_tokens(ids[1:].tolist())
    return Passage(ids, torch.tensor([len(name) for name in names], dtype=torch.float64))
