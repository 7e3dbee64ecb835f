"""A seeded piece of the evaluation text as token ids. Shape letters: T tokens to predict."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models import substream
from ..models.smollm2_jobs import CHARACTERS_PER_TOKEN, token_ids
from ..text import Text

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"


@dataclass(frozen=True)
class Passage:
    """``ids`` int64 [T + 1]: each of the first T predicts its successor, which is ``bytes_T`` (float64) bytes long."""

    ids: Tensor
    bytes_T: Tensor


def take_passage(tokenizer: Any, text: Text, tokens: int, seed: int) -> Passage:
    """Return ``tokens`` + 1 consecutive tokens of ``text``, from the start of a paragraph that ``seed`` decides."""
    rng = torch.Generator().manual_seed(substream(seed, "evaluation"))
    latest = max(1, len(text.content) - CHARACTERS_PER_TOKEN * (tokens + 1))
    wanted = int(torch.randint(latest, (), generator=rng))
    start = text.content.rfind("\n\n", 0, wanted)
    rest = replace(text, content=text.content[start + 2 if start >= 0 else 0 :])
    ids = token_ids(tokenizer, rest, tokens + 1)
    return Passage(ids, token_bytes(tokenizer, ids[1:]))


def token_bytes(tokenizer: Any, ids_T: Tensor) -> Tensor:
    """Return how many bytes of text each token stands for, [T] float64; special tokens stand for none.

    In a byte-level BPE each character of a token's name is one byte; in SentencePiece's names ``\u2581`` is a space and
    ``<0x0A>`` one byte.
    """
    names = tokenizer.convert_ids_to_tokens(ids_T.tolist())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))
    special = set(tokenizer.all_special_tokens)
    sizes = [0 if name in special else len(name) if byte_level else _piece_bytes(name) for name in names]
    return torch.tensor(sizes, dtype=torch.float64)


def _piece_bytes(name: str) -> int:
    return 1 if BYTE_PIECE.fullmatch(name) else len(name.replace(SPACE, " ").encode())
