"""What our tasks are made of: items with two options, one of them right, in an order that chance decides.

Imports neither torch nor lm-eval.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from ...contracts import MoebenchError, make_key

Item = dict[str, Any]
"""One item, as a line of JSON holds it: its ``context``, and ``options`` or ``answers``."""

PATIENCE = 100
"""Draws for each item that is wanted; a maker that does not find enough different ones by then has too few."""


def two_options(context: str, right: str, wrong: str, rng: random.Random) -> Item:
    """Return an item: what stands before, two continuations, and which of them is right (0 or 1)."""
    place = rng.randrange(2)
    return {"context": context, "options": [wrong, right] if place else [right, wrong], "right": place}


def chance_of(seed: int, task: str) -> random.Random:
    """Return the random numbers of a task, its own for every ``seed``."""
    return random.Random(int(make_key([seed, task])[:16], 16))


def different(count: int, draw: Callable[[], Item | None]) -> list[Item]:
    """Return ``count`` items of which no two are alike; ``draw`` may give None where a draw led nowhere."""
    found: dict[str, Item] = {}
    for item in _draws(count * PATIENCE, draw):
        found.setdefault(make_key([item["context"], sorted(item.get("options", ()))]), item)
        if len(found) == count:
            return list(found.values())
    raise MoebenchError(f"only {len(found)} different items were found where {count} are wanted; ask for fewer.")


def _draws(most: int, draw: Callable[[], Item | None]) -> Iterator[Item]:
    for _ in range(most):
        item = draw()
        if item is not None:
            yield item
