"""What a language model is trained on, and what is held out of it. Imports no torch.

The shipped text is trained on by its calibration half alone: its evaluation half, on which quality is measured
everywhere, shares no line of 40 characters with it. From a text of the user's own every HELD_OUT-th passage is held
out, and what repeats a long line of the evaluation text is left out altogether.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...contracts import MoebenchError
from ..text import Text, calibration_text, evaluation_text, long_pieces, passages

HELD_OUT = 20
"""One in so many passages of a user's text is held out."""

LEAST = 100_000
"""Characters that a user's text must have: less teaches nothing."""


@dataclass(frozen=True)
class Corpus:
    """Two texts that share no line or paragraph of 40 characters or more."""

    training: Text
    held_out: Text


def load(path: str) -> Corpus:
    """Return the shipped text, or that of the file ``path`` where one is named."""
    if not path:
        return Corpus(calibration_text(), evaluation_text())
    file = Path(path).expanduser()
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoebenchError(f"data={path} cannot be read as UTF-8 text ({error}); name a text file.") from error
    seen = {piece for paragraph in re.split(r"\n\s*\n", evaluation_text().content) for piece in long_pieces(paragraph)}
    found = list(passages(re.split(r"\n\s*\n", content), seen))
    if len(found) < HELD_OUT or sum(map(len, found)) < LEAST:
        raise MoebenchError(
            f"data={path} has less than {LEAST} characters in paragraphs that repeat no long line; give more text."
        )
    kept = [passage for i, passage in enumerate(found) if i % HELD_OUT]
    return Corpus(Text("\n\n".join(kept), (file.name,)), Text("\n\n".join(found[::HELD_OUT]), (file.name,)))
