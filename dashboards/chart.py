"""What a chart is to the page: figures with the rows behind them, the SQL that made them, and a sentence when empty."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .query import Row

if TYPE_CHECKING:
    import plotly.graph_objects as go

PALETTE = (
    "#2f7ed8",
    "#dd7200",
    "#159a74",
    "#c2479d",
    "#8a63d2",
    "#d64545",
    "#1b98b0",
    "#8f8800",
    "#b0713a",
    "#6b7f99",
)
"""Colours that can be told apart on white and on black alike."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon", "pentagon", "triangle-down")
"""One shape per colour, for those who see no colours."""

GREY = "#848b94"


@dataclass(frozen=True)
class Variant:
    """One choice of a chart's selector. ``narrow`` are layout changes for a small screen, by path."""

    label: str
    figure: go.Figure
    rows: tuple[Row, ...]
    note: str = ""
    narrow: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """One section of the page; without variants it shows ``empty`` instead."""

    key: str
    title: str
    caption: str
    sql: tuple[str, ...]
    variants: tuple[Variant, ...]
    empty: str
    selector: str = "Group"


@dataclass(frozen=True)
class Style:
    """The colour and shape of each backend, the same in every chart of a page."""

    backends: tuple[str, ...]

    @classmethod
    def of(cls, backends: Iterable[str]) -> Style:
        """Give every backend its place, in alphabetical order."""
        return cls(tuple(sorted(set(backends))))

    def color(self, backend: str) -> str:
        """Return the colour of a backend."""
        return PALETTE[self.backends.index(backend) % len(PALETTE)]

    def symbol(self, backend: str, flagged: bool = False) -> str:
        """Return the shape of a backend; hollow where the row is flagged."""
        return SYMBOLS[self.backends.index(backend) % len(SYMBOLS)] + ("-open" if flagged else "")


def safe(text: object) -> str:
    """Return ``text`` so that plotly, which reads a little HTML in every label, shows it as it is."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def figure_json(figure: go.Figure, narrow: Mapping[str, Any]) -> str:
    """Return a figure as JSON that may stand inside a script element; its colours come from the page's theme."""
    content = json.loads(figure.to_json())
    content["layout"].pop("template", None)
    return script_json({"data": content["data"], "layout": content["layout"], "narrow": dict(narrow)})


def script_json(value: Any) -> str:
    """Return JSON that no HTML parser can end early: no ``<``, ``>`` or ``&`` stands in it as such."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
