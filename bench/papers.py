"""The command ``moebench papers``: runs what each published claim asks for, judges it, and keeps the verdict."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contracts import MoebenchError, Registry, canonical_json
from ..results.claims import Judgement, Pair, Rule, judge
from ..suites.paper_specs import Paper, choose_papers, load_papers
from .run import Finished, execute, exit_status, planned, warn
from .store import store_path

if TYPE_CHECKING:
    import duckdb

CLAIM_VIEWS = ("cases", "metrics", "timings", "summary", "series", "items")
"""What a metric may look at: these names, cut down to the runs of the claim."""


@dataclass(frozen=True)
class Result:
    """A judged claim: its pairs, and whether one of its runs had a case that failed."""

    paper: Paper
    judgement: Judgement
    pairs: Sequence[Pair]
    runs: Sequence[str]
    failed: bool

    @property
    def bad(self) -> bool:
        """Whether the command must not end well: a run failed, or what must hold exactly was not seen to hold."""
        return self.failed or (self.paper.kind != "empirical" and self.judgement.verdict != "holds")


def papers(options: argparse.Namespace) -> int:
    """Check claims (all, or those of the given keys); exit status 1 where an exact one fails or a run failed."""
    chosen = choose_papers(load_papers(), options.keys)
    if options.list:
        print("\n".join(listed(chosen)))
        return 0
    registry = Registry.load()
    warn(registry)
    store = store_path(options.store)
    results = []
    for paper in chosen:
        results.append(check(paper, registry, store, options.quiet))
        print(told(results[-1]), flush=True)
    return int(any(result.bad for result in results))


def listed(chosen: Sequence[Paper]) -> list[str]:
    """Return one line per claim, and one with what all of them cost."""
    lines = [
        f"{paper.key:22s} {paper.kind:10s} {len(paper.seeds)} seeds  about {paper.cost_s:4.0f} s  "
        f"{paper.title}: {paper.claim}"
        for paper in chosen
    ]
    return [*lines, f"{len(chosen)} claims, about {sum(paper.cost_s for paper in chosen) / 60:.0f} minutes"]


def check(paper: Paper, registry: Registry, store: Path, quiet: bool) -> Result:
    """Run the paper's suite for each seed, judge the claim, and write it to the store."""
    runs: list[Finished] = []
    for seed in paper.seeds:
        if not quiet:
            print(f"{paper.key}: seed {seed}", file=sys.stderr, flush=True)
        settings = paper.settings(seed)
        plan, _ = planned(settings, registry)
        command = shlex.join(["moebench", "run", *settings])
        runs.append(execute(plan, [], store, command, quiet))
    run_ids = [run.run_id for run in runs]
    pairs, reason = measured(store, run_ids, paper.metric)
    rule = Rule(paper.rule.direction, paper.rule.margin, paper.rule.unit)
    judgement = judge(paper.kind, rule, paper.seeds, pairs)
    if reason and judgement.verdict not in ("holds", "supported"):
        judgement = replace(judgement, reason="; ".join(filter(None, [judgement.reason, reason])))
    result = Result(paper, judgement, pairs, run_ids, any(exit_status(run.outcome, False) for run in runs))
    keep(result, store)
    return result


def measured(store: Path, run_ids: Sequence[str], metric: str) -> tuple[list[Pair], str]:
    """Return the pairs (seed, a, b) that ``metric`` selects from these runs, and why cases are missing from it.

    Rows with a NULL count as missing.
    """
    from ..results.query import reading, select

    with reading(store) as connection:
        cut_to_runs(connection, run_ids)
        names, rows = select(connection, metric)
        if names != ["seed", "a", "b"]:
            raise MoebenchError(f"the metric returns {', '.join(names)}; it must return exactly seed, a, b.")
        _, doubts = select(
            connection,
            "SELECT DISTINCT coalesce(reason, 'flagged ' || array_to_string(flags, ', ')) FROM cases "
            "WHERE status <> 'ok' OR len(flags) > 0 ORDER BY 1",
        )
    whole = [(int(seed), float(a), float(b)) for seed, a, b in rows if None not in (seed, a, b)]
    return whole, "; ".join(str(doubt) for (doubt,) in doubts)


def cut_to_runs(connection: duckdb.DuckDBPyConnection, run_ids: Sequence[str]) -> None:
    """Shadow the views that a metric may look at by temporary ones that see these runs alone."""
    connection.execute("CREATE TEMP TABLE claim_runs (run_id VARCHAR)")
    if run_ids:
        connection.executemany("INSERT INTO claim_runs VALUES (?)", [[run_id] for run_id in run_ids])
    row = connection.execute("SELECT current_database()").fetchone()
    database = str(row[0]).replace('"', '""') if row else "memory"
    for view in CLAIM_VIEWS:
        connection.execute(
            f'CREATE TEMP VIEW "{view}" AS SELECT * FROM "{database}".main."{view}" '
            "WHERE run_id IN (SELECT run_id FROM claim_runs)"
        )


def keep(result: Result, store: Path) -> None:
    """Write the claim as a part of its last run, and ingest it."""
    from ..results.database import ingest
    from ..results.parts import write_part

    run_id = result.runs[-1]
    row = claim_row(result, run_id)
    write_part(store / "runs" / run_id, f"claim-{result.paper.key}", {"claims": [row]})
    ingest(store)


def claim_row(result: Result, run_id: str) -> dict[str, Any]:
    """Return the row of table ``claims``."""
    paper, judgement = result.paper, result.judgement
    text = {name: getattr(paper, name) for name in ("key", "title", "claim", "kind", "figure", "ours", "model")}
    return {
        **text,
        "run_id": run_id,
        "unit": paper.rule.unit,
        "direction": paper.rule.direction,
        "margin": paper.rule.margin,
        "seeds": [seed for seed, _, _ in result.pairs],
        "a": [a for _, a, _ in result.pairs],
        "b": [b for _, _, b in result.pairs],
        "estimate": judgement.estimate,
        "lo": judgement.lo,
        "hi": judgement.hi,
        "verdict": judgement.verdict,
        "reason": judgement.reason or None,
        "spec": canonical_json({"paper": paper, "runs": result.runs}),
    }


def told(result: Result) -> str:
    """Return one line: the claim, its verdict, the estimate with its interval, the rule, and why it is in doubt."""
    paper, judgement = result.paper, result.judgement
    numbers = "no estimate"
    if judgement.estimate is not None:
        numbers = f"{paper.rule.unit} {judgement.estimate:.4g}"
        if judgement.lo is not None and judgement.hi is not None:
            numbers += f" [{judgement.lo:.4g}, {judgement.hi:.4g}]"
    relation = {"equal": "within", "at_most": "at most", "at_least": "at least"}[paper.rule.direction]
    centre = 1 if paper.rule.unit == "ratio" else 0
    wanted = f"wanted {relation} {centre} {'±' if relation == 'within' else '+'} {paper.rule.margin:g}"
    reason = f" ({judgement.reason})" if judgement.reason else ""
    return f"{paper.key:22s} {judgement.verdict:13s} {numbers}, {wanted}{reason}"
