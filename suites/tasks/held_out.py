"""Tasks on the evaluation text, which no method is calibrated on: cloze, and pieces whose bits are counted."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter

from ..text import Text
from .items import Item, chance_of, different, two_options

WORD = re.compile(r"[a-z]{4,}")
PROSE = re.compile(r"[A-Z][A-Za-z ,;:'()-]+[.!?]")

CONTEXT = 14
"""Words before the one that is left out."""

RANKS = 30
"""How far the wrong word's rank by frequency may be from the right one's."""

PIECE = 120
"""Characters of a piece, at least; it ends with the word that reaches them."""


def sentences(text: Text) -> list[str]:
    """Return the sentences of prose of a text, with single spaces: what is code or a table is left out."""
    return PROSE.findall(" ".join(text.content.split()))


def cloze(text: Text, seen: Text, count: int, seed: int) -> list[Item]:
    """A sentence broken off: its next word, against another about as frequent that the context has not.

    A context that ``seen`` has, too, is not asked about: the texts repeat themselves. Only words of four or more small
    letters are asked for, so that what is asked is rarely a matter of grammar alone.
    """
    rng = chance_of(seed, "cloze")
    known = " ".join(seen.content.split())
    pool = [words for words in map(str.split, sentences(text)) if len(words) > CONTEXT]
    counts = Counter(word for words in pool for word in words if WORD.fullmatch(word))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    place = {word: rank for rank, word in enumerate(ranked)}

    def draw() -> Item | None:
        words = rng.choice(pool)
        at = rng.randrange(CONTEXT, len(words))
        rank = place.get(words[at].rstrip(".,;:!?"))
        if rank is None:
            return None
        wrong = ranked[min(max(rank + rng.randint(-RANKS, RANKS), 0), len(ranked) - 1)]
        before = words[at - CONTEXT : at]
        context = " ".join(before)
        if wrong == ranked[rank] or wrong in before or context in known:
            return None
        return two_options(context, f" {ranked[rank]}", f" {wrong}", rng)

    return different(count, draw)


def pieces(text: Text, seen: Text, count: int, seed: int) -> list[Item]:
    """Pieces of ``PIECE`` characters and a little more, from all over the text, each at the start of a sentence.

    None of them is in ``seen``.
    """
    known = " ".join(seen.content.split())
    rng = chance_of(seed, "pieces")
    whole = " ".join(sentences(text))
    starts = [0, *(found.end() for found in re.finditer(r"[.!?] ", whole))]
    found: dict[str, None] = {}
    while len(found) < count:
        start = starts[bisect_left(starts, rng.randrange(len(whole) - 2 * PIECE))]
        end = whole.find(" ", start + PIECE)
        if end > 0 and whole[start:end] not in known:
            found.setdefault(whole[start:end])
    return [{"text": piece} for piece in found]
