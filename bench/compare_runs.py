"""``moebench compare``: two stored runs side by side, or the methods of one.

Their times were taken apart, in other processes and at another hour, so they are described and get no verdict. What has
no chance in it is judged, and so is accuracy on the same items.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from ..contracts import MoebenchError
from ..dashboards.data import Case, Run, load_cases, load_runs
from ..results.accuracy_gate import ItemKey, judge_items
from ..results.deterministic import judge_metrics
from ..results.gate import Exit, Judged
from ..results.query import plain, reading
from ..results.verdict import Verdict
from .run_ids import find_run
from .store import existing_store

TAKEN_APART = "taken apart: no verdict on times; `moebench gate` takes turns and gives one"

ITEMS = "SELECT case_key, task, item, metric, value FROM items WHERE run_id = ?"
INPUTS = "SELECT case_key, input_sha256 FROM cases WHERE run_id = ? AND input_sha256 IS NOT NULL"
ABOUT = ("run_id", "started_at", "git_sha", "git_dirty", "host_key", "version")


@dataclass(frozen=True)
class Content:
    """What can be compared of a run; items (values) and inputs (hashes) are by case key."""

    run: Run
    cases: Mapping[str, Case]
    items: Mapping[str, Mapping[ItemKey, float | None]]
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Times:
    """A case that was timed in both runs: medians of all calls in ns."""

    label: str
    case_key: str
    clock: str
    a_ns: float
    b_ns: float
    flags: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Median of B over that of A; None where a clock saw nothing."""
        return self.b_ns / self.a_ns if self.a_ns > 0 else None


@dataclass(frozen=True)
class Apart:
    """A case of one run or of both that cannot be compared, with the reason; ``broken`` where only B fails at it."""

    label: str
    case_key: str
    reason: str
    broken: bool = False


@dataclass(frozen=True)
class ComparedRuns:
    """Everything that two runs have to say about each other."""

    a: Run
    b: Run
    times: tuple[Times, ...]
    judged: tuple[Judged, ...]
    apart: tuple[Apart, ...]
    only_a: tuple[Apart, ...]
    only_b: tuple[Apart, ...]

    @property
    def exit(self) -> Exit:
        """Whether anything that can be judged regressed."""
        regressed = any(one.verdict == Verdict.REGRESSED for one in self.judged)
        return Exit.REGRESSED if regressed or any(one.broken for one in self.apart) else Exit.NOT_REGRESSED


def compare(options: argparse.Namespace) -> int:
    """Print what two runs of the store have in common and in what they differ; exit 1 where B regressed.

    Of one run alone the methods are compared, of which none regressed.
    """
    from .compare_methods import compare_methods, methods_json, methods_table
    from .compare_text import compare_table

    with reading(existing_store(options.store)) as connection:
        runs = {run.run_id: run for run in load_runs(connection) if run.row["cases"]}
        if options.run_b is None:
            methods = compare_methods(connection, find_run(options.run_a, list(runs)))
            print(methods_json(methods) if options.json else methods_table(methods))
            return int(Exit.NOT_REGRESSED)
        a, b = (find_run(given, list(runs)) for given in (options.run_a, options.run_b))
        if a == b:
            raise MoebenchError(
                f"'{options.run_a}' and '{options.run_b}' are one run; name two, such as latest~1 latest."
            )
        found = compare_runs(*(_content(connection, runs[run_id]) for run_id in (a, b)))
    print(to_json(found) if options.json else compare_table(found))
    return int(found.exit)


def _content(connection: duckdb.DuckDBPyConnection, run: Run) -> Content:
    cases, _ = load_cases(connection, run.run_id)
    items: dict[str, dict[ItemKey, float | None]] = defaultdict(dict)
    for case_key, task, item, metric, value in connection.execute(ITEMS, [run.run_id]).fetchall():
        items[case_key][task, item, metric] = value
    inputs = dict(connection.execute(INPUTS, [run.run_id]).fetchall())
    return Content(run, {case.key: case for case in cases}, items, inputs)


def compare_runs(a: Content, b: Content) -> ComparedRuns:
    """Match the cases of two runs by key and compare those that are ok in both."""
    times: list[Times] = []
    judged: list[Judged] = []
    apart: list[Apart] = []
    for key in (key for key in b.cases if key in a.cases):
        reason = _reason(a, b, key)
        if reason is not None:
            apart.append(reason)
            continue
        times += _times(a.cases[key], b.cases[key])
        judged += _judged(a, b, key)
    only = [
        tuple(Apart(case.label, key, "") for key, case in one.cases.items() if key not in other.cases)
        for one, other in ((a, b), (b, a))
    ]
    return ComparedRuns(a.run, b.run, tuple(times), tuple(judged), tuple(apart), *only)


def _reason(a: Content, b: Content, key: str) -> Apart | None:
    """Return why a case cannot be compared, if so."""
    before, after = a.cases[key], b.cases[key]
    if not (before.ok and after.ok):
        broken = before.ok and after.status != "skipped"
        why = f": {after.row['reason']}" if after.row["reason"] else ""
        return Apart(after.label, key, f"{before.status} in A, {after.status} in B{why}", broken)
    if a.inputs.get(key) != b.inputs.get(key):
        return Apart(after.label, key, "inputs differ: the runs did not compute the same thing")
    return None


def _times(a: Case, b: Case) -> list[Times]:
    if a.median_ns is None or b.median_ns is None or a.row["clock"] != b.row["clock"]:
        return []
    flags = tuple(sorted({*a.flags, *b.flags}))
    return [Times(b.label, b.key, str(b.row["clock"]), a.median_ns, b.median_ns, flags)]


def _judged(a: Content, b: Content, key: str) -> list[Judged]:
    names: dict[str, Any] = {"label": b.cases[key].label, "case_key": key, "base_case": key}
    metrics = judge_metrics(_metrics(a.cases[key]), _metrics(b.cases[key]), **names)
    return [*metrics, *judge_items(a.items.get(key, {}), b.items.get(key, {}), **names)]


def _metrics(case: Case) -> dict[str, float | None]:
    return {**{metric["name"]: metric["value"] for metric in case.metrics}, "error": case.row["error"]}


def to_json(found: ComparedRuns) -> str:
    """Return the comparison as JSON; ``exit`` is the status of the command."""
    values = {
        "times_taken_apart": TAKEN_APART,
        **{name: {key: run.row[key] for key in ABOUT} for name, run in (("a", found.a), ("b", found.b))},
        "times": [{**dataclasses.asdict(one), "ratio": one.ratio} for one in found.times],
        **{name: [dataclasses.asdict(one) for one in getattr(found, name)] for name in ("judged", "apart")},
        **{name: [dataclasses.asdict(one) for one in getattr(found, name)] for name in ("only_a", "only_b")},
        "exit": int(found.exit),
    }
    return json.dumps(plain(values), indent=1, ensure_ascii=False)
