"""The page ``docs/routing.md``: every routing with paper, rule, defaults, needs, tested claims and measured cost.

All but the cost comes from the descriptors: the docstring of a parameter class begins with ``Name (paper): rule.``, and
what follows is what there is to know. Costs come from a store with a run of suite ``routing``; a page keeps them when
the rest is written anew.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..contracts import Descriptor, MoebenchError, Registry, Selection, plain
from ..dashboards import units
from ..dashboards.data import HOSTS, MINIMA, Case, Run, load_cases, load_runs
from ..dashboards.query import ask, parse_json
from ..dashboards.ratios import paired_ratio, turn_minima
from ..moe.shapes import ModelShape
from ..results.query import reading
from ..suites.paper_specs import Paper, load_papers
from .claims_in_tests import claims_in_tests

INTRO = """\
Every built-in routing. `needs` are the fields of the Context that a router reads; defaults are set as
`params.routing.<scheme>.<parameter>=VALUE`. Tested claims are those that the tests name for this scheme, by the number
that they give them, and those of [papers.md](papers.md). What deviates from a paper, or from the code that came with
it, is below the table.
"""

PAPER = re.compile(r"\s*\(([^()]*(?:arXiv \d{4}\.\d{5}|[A-Z][^()]* (?:19|20)\d\d)[^()]*)\)")
SENTENCE = re.compile(r"\.(?:\s+(?=[A-Z`])|$)")
ROW = re.compile(r"^\| `([^`]+)`.* \| ([^|]*) \|$", re.MULTILINE)
ABOUT = re.compile(r"^Cost: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Costs:
    """Time of a router over that of plain top-k, as text by routing, and one line about where it was measured."""

    about: str = "not measured yet."
    ratios: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Words:
    """What a parameter class says of its scheme."""

    paper: str
    rule: str
    rest: str


def routing_page(descriptors: Iterable[Descriptor], costs: Costs, tests: Path) -> str:
    """Return the page of the routings among ``descriptors``; ``tests`` is the folder with the tests."""
    members = [descriptor for descriptor in descriptors if descriptor.kind == "routing"]
    tested, papers = claims_in_tests(tests, members), load_papers()
    lines = ["# Routing", "", INTRO, f"Cost: {costs.about}", ""]
    lines += ["| scheme | paper | rule | defaults | needs | tested claims | cost |", "|---|---|---|---|---|---|---|"]
    for member in members:
        claims = [*tested[member.name], *_linked(member.name, papers)]
        lines.append(_row(member, ", ".join(claims), costs.ratios.get(member.name, "")))
    return "\n".join([*lines, *_deviations(members)]) + "\n"


def _row(member: Descriptor, claims: str, cost: str) -> str:
    names = ", ".join(f"`{name}`" for name in (member.name, *member.aliases))
    said = words(member)
    cells = (names, said.paper, said.rule or member.summary, defaults(member), needs(member), claims, cost)
    return "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in cells) + " |"


def _deviations(members: Sequence[Descriptor]) -> Iterator[str]:
    """Yield what parameter classes say beyond the rule, once for all routings that share it."""
    owners: dict[str, list[str]] = {}
    for member in members:
        owners.setdefault(words(member).rest, []).append(member.name)
    yield from ("", "## What to know")
    for rest, names in owners.items():
        if rest:
            yield f"\n**{', '.join(names)}.** {rest}"


def words(descriptor: Descriptor) -> Words:
    """Return paper, rule and the rest of the documentation of a routing's parameter class."""
    made = f"{descriptor.params.__name__}(" if descriptor.params else ""
    text = inspect.cleandoc((descriptor.params.__doc__ or "") if descriptor.params else "").replace("``", "`")
    if not text or text.startswith(made):
        return Words("", "", "")
    text = re.sub(r"(?<!\n)\n(?!\n|- )\s*", " ", text)
    first, _, further = text.partition("\n\n")
    end = SENTENCE.search(first)
    rule, more = (first, "") if end is None else (first[: end.start()], first[end.end() :])
    paper = PAPER.search(first)
    rule = PAPER.sub("", rule)
    title, colon, after = rule.partition(": ")
    rest = "\n\n".join(part for part in (more.strip(), further.strip()) if part)
    return Words("" if paper is None else paper.group(1), after if colon else title, rest)


def notes(members: Sequence[Descriptor]) -> Iterator[str]:
    """Yield what parameter classes say beyond the rule, under a heading."""
    yield from ("", "## What to know")
    for member in members:
        rest = words(member).rest
        if rest:
            yield f"\n**{member.name}.** {rest}"


def defaults(descriptor: Descriptor) -> str:
    """Return the parameters with their defaults, as they would be set."""
    fields = dataclasses.fields(descriptor.params) if descriptor.params else ()
    return ", ".join(f"`{f.name}={json.dumps(plain(f.default))}`" for f in fields if f.init)


def needs(descriptor: Descriptor) -> str:
    """Return what the router of a small layer reads besides its input, and what it promises."""
    import torch

    from ..moe.layer import LayerWeights

    shape = _shape_for(descriptor)
    rows = (3 if shape.heads else 2) * shape.width
    gate_up, down = torch.zeros(shape.experts, rows, 64), torch.zeros(shape.experts, 64, shape.width)
    router = descriptor.create()(LayerWeights(gate_up, down, heads=shape.heads), shape, 0).router
    said = [f"`{name}`" for name in sorted(router.needs)]
    said += [] if router.causal else ["looks ahead"]
    said += ["one decision for all layers"] if router.scope == "model" else []
    structure = _structure(descriptor)
    said += [] if structure == "none" else [f"structure `{structure}`"]
    return ", ".join(said)


def _shape_for(descriptor: Descriptor) -> ModelShape:
    """Return the shape of a small layer, after the structure that makes the experts of a routing where it names one."""
    shape = ModelShape(64, 32, 16, 2, (0, 1), Selection("softmax", 2, True))
    reshaped: ModelShape = Registry.load().get("structure", _structure(descriptor)).params_from({}).reshape(shape)
    return reshaped


def _structure(descriptor: Descriptor) -> str:
    """Return the structure that makes the experts of a routing; ``none`` for the layer's own."""
    return getattr(descriptor.params, "structure", "none")


def _linked(name: str, papers: Iterable[Paper]) -> Iterator[str]:
    """Yield a link for each claim whose run sets this routing or its parameters."""
    mentions = re.compile(rf"params\.routing\.{re.escape(name)}\.|axes\.routing=.*\b{re.escape(name)}\b")
    for paper in papers:
        if any(mentions.search(setting) for setting in paper.run.overrides):
            yield f"[{paper.key}](papers.md#{paper.key})"


def costs_in(page: str) -> Costs:
    """Return the costs that a written page shows."""
    about = ABOUT.search(page)
    ratios = {name: cost for name, cost in ROW.findall(page) if cost != "-"}
    return Costs(about.group(1), ratios) if about else Costs()


def costs_of(store: Path) -> Costs:
    """Return the costs in the latest run of suite ``routing`` that timed ``topk`` beside other routings."""
    wanted = {member.name: _structure(member) for member in Registry.load().all("routing")}
    with reading(store) as connection:
        for run in load_runs(connection):
            cases = [case for case in load_cases(connection, run.run_id)[0] if _is_route(case)]
            cases = [case for case in cases if case.row["structure"] == wanted.get(str(case.row["routing"]), "none")]
            base = next((case for case in cases if case.row["routing"] == "topk"), None)
            if base is not None:
                together = [case for case in cases if case.row["group_key"] == base.row["group_key"]]
                minima = turn_minima(ask(connection, MINIMA, run_id=run.run_id))
                host = next(iter(ask(connection, HOSTS, run_id=run.run_id).rows), {})
                return Costs(_about(run, base, str(host.get("cpu"))), _ratios(base, together, minima))
    raise MoebenchError("the store has no routing suite; run `moebench run suite=routing axes.routing=all` first.")


def _is_route(case: Case) -> bool:
    params = parse_json(case.row["params"])
    workload = params.get("workload") if isinstance(params, dict) else None
    whole = isinstance(workload, dict) and workload.get("phase") == "route"
    return case.row["suite"] == "routing" and whole and case.ok and case.median_ns is not None


def _ratios(base: Case, cases: Iterable[Case], minima: Mapping[str, Mapping[str, Mapping[int, int]]]) -> dict[str, str]:
    ratios = {str(base.row["routing"]): f"1 ({units.time(base.median_ns)})"}
    for case in cases:
        ratio = paired_ratio(minima[base.key], minima[case.key])
        if ratio is None or case.row["routing"] in ratios:
            continue
        bounds = "" if ratio.lo is None or ratio.hi is None else f" [{_short(ratio.lo)}, {_short(ratio.hi)}]"
        flags = "".join(f", {flag}" for flag in case.flags)
        ratios[str(case.row["routing"])] = f"{_short(ratio.ratio)}{bounds}{flags}"
    return ratios


def _short(value: float) -> str:
    return units.digits(value, 3)


def _about(run: Run, base: Case, cpu: str) -> str:
    row = base.row
    what = f"model {row['model']}, {row['tokens']} tokens, {row['dtype']}, threads={row['threads']}"
    where = f"{cpu}, torch {run.packages.get('torch')}, commit {str(run.row['git_sha'] or 'unknown')[:12]}"
    return (
        f"time of the router over that of `topk` on the layer's own experts, beside which it ran; {what}; {where}, "
        f"run {run.run_id}."
    )
