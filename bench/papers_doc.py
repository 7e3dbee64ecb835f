"""The page ``docs/papers.md``: the latest verdict of every claim, from the stores in which they were judged.

A claim costs minutes, so they are judged a few at a time: a store brings its own claims, and the page keeps what it
says of the others, as long as their files in ``suites/papers`` still say what was judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..results.database import connect_parts
from ..suites.paper_specs import Paper

CLAIMS = """
SELECT c.*, r.finished_at, r.git_sha, r.packages->>'torch' AS torch, h.cpu, h.cores
FROM claims c LEFT JOIN runs r USING (run_id) LEFT JOIN hosts h USING (run_id)
QUALIFY row_number() OVER (PARTITION BY c.key ORDER BY r.finished_at DESC NULLS LAST, run_id DESC) = 1 ORDER BY c.key
"""

INTRO = """\
Claims of published systems, each written down with its rule in `suites/papers/<key>.yaml` before the run that is shown,
and judged by `moebench papers` whichever way it falls. An identity or a theorem holds or fails for every seed; an
empirical claim is supported or not, or the data do not tell. Small machines, small models: a verdict is about what is
written under *ours*.
"""

VERDICT = re.compile(r"^\| \[([\w-]+)\]\(#[\w-]+\) \| \w+ \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)
ROW = re.compile(r"^\| \[([\w-]+)\]\(#\1\) .*$", re.MULTILINE)
SECTION = re.compile(r"^## ([\w-]+)\n\n(.*?)\s*(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class Entry(NamedTuple):
    """What the page says of a claim: its line of the table, and its section below the heading."""

    row: str
    section: str


def claims_of(store: Path) -> dict[str, Entry]:
    """Return the latest verdict of every claim in ``store``, by key."""
    connection = connect_parts(store)
    try:
        answer = connection.execute(CLAIMS)
        names = [column[0] for column in answer.description]
        claims = [dict(zip(names, row, strict=True)) for row in answer.fetchall()]
    finally:
        connection.close()
    return {claim["key"]: Entry(_row(claim), _section(claim)) for claim in claims}


def claims_in(page: str) -> dict[str, Entry]:
    """Return what ``page`` says of each claim, by key."""
    rows = {match.group(1): match.group(0) for match in ROW.finditer(page)}
    return {key: Entry(rows[key], section) for key, section in SECTION.findall(page) if key in rows}


def papers_page(entries: Mapping[str, Entry], papers: Iterable[Paper]) -> str:
    """Return the page of those ``entries`` that are verdicts on ``papers`` as these are now."""
    ordered = sorted(papers, key=lambda paper: paper.key)
    shown = {p.key: entries[p.key] for p in ordered if p.key in entries and _is_of(entries[p.key], p)}
    lines = ["# Papers", "", INTRO, "| claim | kind | estimate | verdict |", "|---|---|---|---|"]
    lines += [entry.row for entry in shown.values()]
    for key, entry in shown.items():
        lines += ["", f"## {key}", "", entry.section]
    return "\n".join(lines) + "\n"


def _is_of(entry: Entry, paper: Paper) -> bool:
    """Whether a verdict is on what ``paper`` says: one on a row that was written anew since is another's."""
    return all(line in entry.section for line in (_claimed(vars(paper)), _ours(vars(paper))))


def claims_table(papers: Iterable[Paper], page: str) -> Iterator[str]:
    """Yield the lines of a table of ``papers`` with the verdicts that ``page``, the text of papers.md, shows."""
    verdicts = {key: (estimate, verdict) for key, estimate, verdict in VERDICT.findall(page)}
    yield "| claim | of | estimate | verdict |"
    yield "|" + "---|" * 4
    for paper in papers:
        estimate, verdict = verdicts.get(paper.key, ("-", "not judged yet"))
        name = f"[{paper.key}](papers.md#{paper.key})" if paper.key in verdicts else f"`{paper.key}`"
        yield f"| {name} | {paper.title} | {estimate} | {verdict} |"


def _row(claim: Mapping[str, Any]) -> str:
    key = claim["key"]
    return f"| [{key}](#{key}) | {claim['kind']} | {_estimate(claim)} | {claim['verdict']} |"


def _estimate(claim: Mapping[str, Any]) -> str:
    if claim["estimate"] is None:
        return "none"
    interval = "" if claim["lo"] is None else f" [{claim['lo']:.4g}, {claim['hi']:.4g}]"
    return f"{claim['unit']} {claim['estimate']:.4g}{interval}"


def _section(claim: Mapping[str, Any]) -> str:
    pairs = ", ".join(f"({a:.6g}, {b:.6g})" for a, b in zip(claim["a"] or [], claim["b"] or [], strict=True))
    where = f"{claim['cpu']}, {claim['cores']} cores, torch {claim['torch']}"
    paragraphs = (
        _claimed(claim),
        _ours(claim),
        f"Rule: {claim['unit']} {claim['direction']}, margin {claim['margin']:g}; seeds {claim['seeds']}.",
        f"**{claim['verdict']}**: {_estimate(claim)}. {claim['reason'] or ''}".rstrip(),
        f"(a, b) by seed: {pairs or 'none'}.",
        f"Run {claim['run_id']} at commit {(claim['git_sha'] or 'unknown')[:12]} on {where}.",
    )
    return "\n\n".join(paragraphs)


def _claimed(claim: Mapping[str, Any]) -> str:
    return f"**{claim['title']}.** {claim['claim']} ({claim['figure']})"


def _ours(claim: Mapping[str, Any]) -> str:
    return f"*Ours:* {claim['ours']}"
