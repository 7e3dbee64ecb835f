"""Parameters of static pruning by a list of experts. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from ..plugins import TopK
from ..shapes import ModelShape
from .dynamic import AnyNumber

ID = re.compile(r"\d+:\d+")


@dataclass(frozen=True)
class Dropped(AnyNumber):
    """The model's own top-k with the outputs of listed ``experts`` zero and the router unchanged (arXiv 2507.23279).

    An expert is named ``layer:expert``, as suite ``probe`` names the super experts that it finds. What is left keeps
    its weight, so that a token may have fewer than k experts. Nothing is saved: structure ``prune`` takes experts and
    gate rows out for good. ``k`` None is the model's own.
    """

    pipeline: ClassVar[bool] = True

    experts: tuple[str, ...] = ()
    k: int | None = None

    def __post_init__(self) -> None:
        for one in self.experts:
            if not ID.fullmatch(one):
                raise ValueError(f"experts: '{one}' must be written as layer:expert, such as 11:9")

    def whole(self) -> TopK:
        """Return the parameters of the top-k that experts are taken from."""
        return TopK(self.k)

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert; ValueError for an id that no layer has."""
        for one in self.experts:
            layer, expert = map(int, one.split(":"))
            if expert >= shape.experts or layer >= shape.layers:
                raise ValueError(f"the model has no expert {one}: {shape.layers} layers of {shape.experts} experts")
        return super().kinds(shape)

    def max_k(self, shape: ModelShape) -> int:
        """Return k."""
        return self.whole().max_k(shape)


DESCRIPTORS = [
    Descriptor(
        "routing",
        "dropped",
        "the model's own top-k, listed experts' outputs zero",
        "moebench.moe.routers.dropping:build",
        Dropped,
    ),
]
