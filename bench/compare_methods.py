"""``moebench compare RUN``: the methods of one run on the same items, each against the model that changes least."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from ..contracts import MoebenchError
from ..dashboards import units
from ..dashboards.data import Case, load_cases
from ..dashboards.text import clean
from ..results.accuracy_gate import ItemKey, judge_items
from ..results.gate import Judged
from ..results.query import plain
from .compare_text import aligned

ITEMS = "SELECT case_key, task, item, metric, value FROM items WHERE run_id = ?"
INPUTS = "SELECT case_key, input_sha256 FROM cases WHERE run_id = ?"

CHANGES = ("structure", "routing", "quantization", "sparsity")
UNCHANGED = ("none", "topk")

HEAD = ("method", "task", "items", "base", "method's", "difference", "p")


@dataclass(frozen=True)
class Methods:
    """A case, and the verdicts on all cases that were asked the same; differences are theirs minus its own."""

    base: Case
    judged: tuple[Judged, ...]
    tied: int = 0
    """How many others change as little as the base."""

    @property
    def ties(self) -> str:
        """What a reader must know of the choice of the base, or nothing."""
        return f"; {self.tied} others change as little, this one is nearest to the dense model or first by name" * (
            self.tied > 0
        )


def compare_methods(connection: duckdb.DuckDBPyConnection, run_id: str) -> list[Methods]:
    """Return the methods of a run, by what they were asked; MoebenchError where no two were asked the same items."""
    cases = {case.key: case for case in load_cases(connection, run_id)[0] if case.ok}
    items: dict[str, dict[ItemKey, float | None]] = defaultdict(dict)
    for key, task, item, metric, value in connection.execute(ITEMS, [run_id]).fetchall():
        items[key][task, item, metric] = value
    asked: dict[tuple[str, str, str], list[Case]] = defaultdict(list)
    for key, inputs in connection.execute(INPUTS, [run_id]).fetchall():
        if key in cases and key in items and inputs is not None:
            row = cases[key].row
            asked[str(row["suite"]), str(row["model"]), inputs].append(cases[key])
    found = [_against_base(members, items) for members in asked.values() if len(members) > 1]
    if not found:
        raise MoebenchError(f"no two methods of run '{run_id}' were asked the same items; name two runs to compare.")
    return found


def _against_base(cases: Sequence[Case], items: Mapping[str, Mapping[ItemKey, float | None]]) -> Methods:
    base, *others = sorted(cases, key=lambda case: (_changes(case), _distance(case), case.label))
    judged: list[Judged] = []
    for case in others:
        names: dict[str, Any] = {"label": case.label, "case_key": case.key, "base_case": base.key}
        judged += judge_items(items[base.key], items[case.key], **names)
    return Methods(base, tuple(judged), sum(_changes(case) == _changes(base) for case in others))


def _changes(case: Case) -> tuple[bool, int]:
    """Return whether a case changes any layer, and on how many axes: the least is what others are compared with."""
    return bool(case.row["layers"]), sum(case.row[axis] not in UNCHANGED for axis in CHANGES)


def _distance(case: Case) -> float:
    return next((float(metric["value"]) for metric in case.metrics if metric["name"] == "kl_to_dense"), 0.0)


def methods_json(found: Sequence[Methods]) -> str:
    """Return the comparisons as JSON."""
    values = [
        {"base": one.base.key, "label": name_of(one.base), "judged": [dataclasses.asdict(j) for j in one.judged]}
        for one in found
    ]
    return json.dumps(plain(values), indent=1, ensure_ascii=False)


def name_of(case: Case) -> str:
    """Return the label of a case, or that it is the model as it is."""
    return clean(case.label if case.row["layers"] else f"{case.row['model']} as it is")


def methods_table(found: Sequence[Methods]) -> str:
    """Return the comparisons as a terminal shows them."""
    lines: list[str] = []
    for one in found:
        lines += ["", f"against {name_of(one.base)}, item by item ({clean(str(one.base.row['suite']))}){one.ties}"]
        lines += aligned([HEAD, *map(_row, one.judged)])
    note = "differences with their 95 % interval over the items; p is McNemar's, exact, for right and wrong answers"
    return "\n".join([*lines[1:], "", note])


def _row(one: Judged) -> tuple[str, ...]:
    names = clean(one.label), clean(one.metric)
    return *names, str(one.pairs), _value(one.base_value), _value(one.candidate_value), *effect(one)


def effect(one: Judged) -> tuple[str, str]:
    """Return the difference with its interval, and p, as texts."""
    difference = units.DASH
    if one.ratio is not None and one.lo is not None and one.hi is not None:
        difference = f"{one.ratio:+.3f} [{one.lo:+.3f}, {one.hi:+.3f}]"
    return difference, units.DASH if one.p is None else f"{one.p:.2g}"


def _value(value: float | None) -> str:
    return units.DASH if value is None else f"{value:.3f}"
