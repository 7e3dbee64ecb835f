"""Fronts as people read them: a title each, a name for every mark, and the rows of their CSV and JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results.pareto import Place, Placed
from ..results.pareto_axes import X_AXES, Axis
from ..results.pareto_fronts import Front, LeftOut, fronts, why_none
from ..results.pareto_sql import Points, load_points, present, quality_axes
from ..results.utilisation import Bounds, Peaks, cost_of_tokens, load_peaks, s_mbu, s_mfu
from .data import Case, labels, shown_axes
from .query import Row
from .text import IN_GROUP

if TYPE_CHECKING:
    import duckdb

PLACES = {Place.FRONT: "on the front", Place.TIE: "tied", Place.DOMINATED: "dominated", Place.UNJUDGED: "not judged"}

Names = Mapping[str, Mapping[str, str]]
"""The shown axes of cases by case key."""

FEW = 3
"""Others that a mark or a row names at most."""

OF_THE_TEXT = ("ppl", "bpb")
"""Qualities whose intervals hold how hard the text is, on top of how good the method is."""

IN_REPORT = ("tpot", "bytes")
"""What quality is drawn against in the report of a run; the page of the fronts has all."""


@dataclass(frozen=True)
class Shown:
    """A front with its title; ``cases`` are its rows in their order, named by what differs between them."""

    front: Front
    title: str
    cases: tuple[Case, ...]

    def placed(self, case: Case) -> Placed:
        """Return the place of a case."""
        return self.front.places[case.key]

    def names(self, keys: Iterable[str]) -> list[str]:
        """Return the names of cases."""
        known = {case.key: case.label for case in self.cases}
        return [known[key] for key in keys]

    def first_names(self, keys: Sequence[str]) -> str:
        """Return the names of the first ``FEW`` cases, and that there are more."""
        return ", ".join(self.names(keys[:FEW])) + (", …" if len(keys) > FEW else "")


@dataclass(frozen=True)
class Answer:
    """Everything that there is to say about one pair of axes; ``none`` says why there is no front."""

    points: Points
    fronts: tuple[Shown, ...]
    left: tuple[LeftOut, ...]
    peaks: Peaks
    price_per_hour: float | None = None
    none: str = ""

    @property
    def x(self) -> Axis:
        """What stands along x."""
        return self.points.x

    @property
    def y(self) -> Axis:
        """What stands along y."""
        return self.points.y

    def rows(self, shown: Shown) -> tuple[Row, ...]:
        """Return the rows of a front as CSV and JSON have them."""
        return tuple(self._row(shown, case) for case in shown.cases)

    def _row(self, shown: Shown, case: Case) -> Row:
        row, placed = case.row, shown.placed(case)
        kept = ("case_key", "method_key", "run_id", "quality_run", "evidence", "mode")
        return {
            "front": shown.title,
            "case": case.label,
            "backend": case.axes["backend"],
            "place": str(placed.place),
            "by": shown.names(placed.by),
            "why": placed.why,
            **_along("x", self.x, row),
            **_along("y", self.y, row),
            **_bounds("s_mbu", s_mbu(row, self.peaks)),
            **_bounds("s_mfu", s_mfu(row, self.peaks)),
            **_bounds("cost_per_million_tokens", cost_of_tokens(row, self.price_per_hour)),
            "flags": " ".join(case.flags),
            **{name: row[name] for name in kept},
        }


def _along(place: str, axis: Axis, row: Mapping[str, Any]) -> Row:
    bounds = {name: row[name] for name in (place, f"{place}_lo", f"{place}_hi")}
    return {f"{place}_axis": axis.name, **bounds, f"{place}_unit": axis.unit}


def _bounds(name: str, bounds: Bounds | None) -> Row:
    return dict(zip((name, f"{name}_lo", f"{name}_hi"), bounds or (None, None, None), strict=True))


def answer(
    connection: duckdb.DuckDBPyConnection,
    x: Axis,
    y: Axis,
    where: str | None = None,
    run_id: str | None = None,
    price_per_hour: float | None = None,
    named: Names | None = None,
) -> Answer:
    """Return the fronts of one pair of axes, over the rows that ``where`` leaves, of one run or of all.

    ``named`` are the axes of cases as the rest of a page shows them, by case key.
    """
    points = load_points(connection, x, y, where, run_id)
    found, left = fronts(points)
    none = "" if found else why_none(points, left)
    return Answer(points, _shown(found, named), tuple(left), load_peaks(connection), price_per_hour, none)


def answers(
    connection: duckdb.DuckDBPyConnection,
    xs: Iterable[str],
    first: Axis | None = None,
    where: str | None = None,
    run_id: str | None = None,
    price_per_hour: float | None = None,
    named: Names | None = None,
) -> list[Answer]:
    """Return the answers for each of ``xs`` against ``first`` and every other quality that the store has.

    Without ``first`` it is the first quality that there is, or the first of all where there is none.
    """
    known = quality_axes(connection)
    there = [axis for axis in known.values() if present(connection, axis)]
    leading = first or next(iter(there), next(iter(known.values())))
    ys = [leading, *(axis for axis in there if axis != leading)]
    return [answer(connection, X_AXES[x], y, where, run_id, price_per_hour, named) for x in xs for y in ys]


def _shown(found: Sequence[Front], named: Names | None) -> tuple[Shown, ...]:
    """Name the fronts and their marks."""
    rows = [row for front in found for row in front.rows]
    axes = iter(shown_axes(rows) if named is None else [named[row["case_key"]] for row in rows])
    of_fronts = [[next(axes) for _ in front.rows] for front in found]
    titles = _apart([_title(front, own[0]) for front, own in zip(found, of_fronts, strict=True)])
    return tuple(
        Shown(front, title, _cases(front, own)) for front, title, own in zip(found, titles, of_fronts, strict=True)
    )


def _cases(front: Front, axes: Sequence[Mapping[str, str]]) -> tuple[Case, ...]:
    given = labels([{name: row[name] for name in IN_GROUP} for row in axes], IN_GROUP)
    flags = [tuple(dict.fromkeys([*(r["flags"] or ()), *(r["quality_flags"] or ())])) for r in front.rows]
    return tuple(
        Case(row["case_key"], row, own, label, doubts)
        for row, own, label, doubts in zip(front.rows, axes, _apart(given), flags, strict=True)
    )


def _title(front: Front, axes: Mapping[str, str]) -> str:
    """Return what the cases of a front share; the run where all must be of one."""
    row = front.rows[0]
    layers = f"layer {axes['layers']}" if axes["layers"] else ""
    tokens = f"T={axes['tokens']}" if axes["tokens"] else ""
    parts = (axes["suite"], axes["model"], layers, axes["traffic"], tokens, axes["dtype"], axes["residency"])
    shared = " · ".join(part for part in parts if part not in ("", "none"))
    run = f", run {row['run_id']}" if front.x.together else ""
    return f"{shared} ({row['evidence']}){run}"


def _apart(names: Sequence[str]) -> list[str]:
    """Number names that occur more than once."""
    counts, seen = Counter(names), defaultdict[str, int](int)
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return result


def counted(shown: Shown) -> str:
    """Return how many methods a front has, and how many of its cases have each place."""
    counts = [f"{shown.front.count(place)} {words}" for place, words in PLACES.items() if shown.front.count(place)]
    return f"{shown.front.methods} methods in {len(shown.cases)} cases: {', '.join(counts)}"


def caveats(shown: Shown) -> list[str]:
    """Return what one must know of a front besides its marks."""
    rows = shown.front.rows
    other = sorted({str(row["quality_dtype"]) for row in rows} - {str(rows[0]["dtype"])})
    modes = sorted({mode for row in rows for mode in str(row["mode"] or "").split()} - {"interleaved"})
    told = [f"Speed is that of {rows[0]['dtype']}, quality that of {', '.join(other)}."] if other else []
    if shown.front.y.name in OF_THE_TEXT:
        shared = "are mostly those of the text, which all share: KL tells more apart."
        told.append(f"Intervals of {shown.front.y.title} {shared}")
    return told + ([f"Not all of it took turns call by call: {', '.join(modes)}."] if modes else [])
