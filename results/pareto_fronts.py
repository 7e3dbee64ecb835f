"""From rows to fronts: what may be compared stands together, and what may not is counted with the reason.

Times (and energy) are on one front only where they were taken in one sitting: same run, same group, same host. Kinds of
evidence never meet. Values of quality are on one front only where they were judged in the same way.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .pareto import Mark, Place, Placed, place, span
from .pareto_axes import Axis
from .pareto_sql import Points, Row

OTHER_RUN = (
    "they were taken in another run than the others of their group, and times of two sittings are never compared; "
    "choose theirs by --where \"run_id = '...'\""
)


@dataclass(frozen=True)
class Front:
    """Cases that may be compared on both axes, the best along x first, and the place of each by its case key."""

    x: Axis
    y: Axis
    rows: tuple[Row, ...]
    places: Mapping[str, Placed]

    @property
    def methods(self) -> int:
        """How many methods stand on it; a method on two backends makes two rows."""
        return len({row["method_key"] for row in self.rows})

    def count(self, where: Place) -> int:
        """Return how many rows have this place."""
        return sum(placed.place == where for placed in self.places.values())


@dataclass(frozen=True)
class LeftOut:
    """So many rows that stand on no front, and why."""

    rows: int
    reason: str


def fronts(points: Points) -> tuple[list[Front], list[LeftOut]]:
    """Return the fronts, that with the most methods first, and what was left out of all of them."""
    x, y = points.x, points.y
    left: Counter[str] = Counter()
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in points.rows:
        reason = _unfit(row, x, y)
        if reason:
            left[reason] += 1
        else:
            groups[_group(row, x)].append(row)
    kept = _of_one_run([*groups.values()], left) if x.together else [*groups.values()]
    found = []
    for rows in kept:
        if len(rows) > 1:
            found.append(Front(x, y, _ordered(rows, x), place(_mark(row, x, y) for row in rows)))
        else:
            left[_alone(x)] += 1
    for status, number in points.failed:
        left[f"they ended {status}; `moebench report` says why"] += number
    found.sort(key=lambda front: -front.methods)
    return found, [LeftOut(number, reason) for reason, number in left.items()]


def _unfit(row: Row, x: Axis, y: Axis) -> str:
    """Return why a row has no place on any front, or nothing."""
    if row["x"] is None:
        return f"no {x.title} can be said of them: their tokens are not recorded"
    if row["y"] is None:
        what = f"no {y.title} of their method is in the store, or something later went wrong"
        return f"{what}; {y.absent or 'evaluate it'}"
    if row["quality_evidence"] != row["evidence"]:
        return (
            f"their evidence is {row['evidence']} and that of their {y.title} {row['quality_evidence']}: kinds of "
            "evidence are never put together"
        )
    return ""


def _group(row: Row, x: Axis) -> tuple[Any, ...]:
    judged = row["group_key"], row["quality_group"]
    return (*judged, row["host_key"], row["run_id"], tuple(row["sittings"])) if x.together else judged


def _of_one_run(groups: Sequence[Sequence[Row]], left: Counter[str]) -> list[Sequence[Row]]:
    """Return, for each group and host, the fronts of the run with the most methods; of equals, of the latest.

    Rows come with the latest run first. Several fronts of one run are kept: they are pieces of a group.
    """
    methods: dict[tuple[Any, ...], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for rows in groups:
        methods[_place_of(rows[0])][rows[0]["run_id"]] |= {row["method_key"] for row in rows}
    best = {where: max(runs, key=lambda run: len(runs[run])) for where, runs in methods.items()}
    for rows in groups:
        if best[_place_of(rows[0])] != rows[0]["run_id"]:
            left[OTHER_RUN] += len(rows)
    return [rows for rows in groups if best[_place_of(rows[0])] == rows[0]["run_id"]]


def _place_of(row: Row) -> tuple[Any, ...]:
    return row["group_key"], row["quality_group"], row["host_key"]


def _alone(x: Axis) -> str:
    beside = "taken in turns with" if x.together else "of the same group as"
    return f"nothing that was judged in the same way was {beside} them, so there is nothing to compare"


def _ordered(rows: Iterable[Row], x: Axis) -> tuple[Row, ...]:
    sign = 1 if x.better == "lower" else -1
    return tuple(sorted(rows, key=lambda row: (sign * row["x"], row["case_key"])))


def _mark(row: Row, x: Axis, y: Axis) -> Mark:
    doubts = ", ".join(dict.fromkeys([*(row["flags"] or ()), *(row["quality_flags"] or ())]))
    return Mark(
        row["case_key"],
        span(row["x"], row["x_lo"], row["x_hi"], x.better),
        span(row["y"], row["y_lo"], row["y_hi"], y.better),
        doubts,
    )


def why_none(points: Points, left: Sequence[LeftOut]) -> str:
    """Return in a sentence why there is no front at all, and what to do."""
    if not points.rows:
        which = "that fits the condition" if points.where else "here"
        widen = "widen the condition, or " if points.where else ""
        return f"no ok row {which} has a value of {points.x.title}: {widen}{points.x.absent}."
    told = "; ".join(f"{one.rows} rows: {one.reason}" for one in left)
    return f"no two cases can be put on one front ({told})."
