"""Writes the pages that are made from the code: ``plugins.md`` from descriptors, ``results.md`` from the schema.

``python docs/generate.py`` writes them; with ``--check`` it only says which are out of date, and exits 1 if any is.
With ``--claims STORE`` it writes ``papers.md`` with the latest verdict of every claim in that store, with
``--accuracy STORE`` ``accuracy.md`` from the latest run of experiment ``rounding``, with ``--static STORE``
``gpu-static.json`` and ``gpu-static.md`` from the latest run of suite ``static``, with ``--offload STORE``
``offload.json`` and ``offload.md`` from the latest run of experiment ``offloading`` with each seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moebench.bench.accuracy_doc import accuracy_page, results_in, results_of
from moebench.bench.offload_doc import offload_page
from moebench.bench.offload_results import offload_results
from moebench.bench.papers_doc import claims_in, claims_of, papers_page
from moebench.bench.quantization_doc import quantization_page
from moebench.bench.routing_doc import costs_in, costs_of, routing_page
from moebench.bench.sparsity_doc import sparsity_page
from moebench.bench.static_doc import static_page, static_results
from moebench.contracts import BUILTIN_PLUGINS, KINDS, Descriptor, plain
from moebench.results.schema import KEYS, SCHEMA_VERSION, TABLES
from moebench.results.views import VIEWS, base_table
from moebench.suites.paper_specs import load_papers

FOLDER = Path(__file__).resolve().parent
NOTICE = "<!-- Written by docs/generate.py: change the code, then run `nox -s docs`. -->\n"

KIND_SUMMARIES = {
    "model": "Where weights and shapes come from. `suite=throughput model=NAME` chooses one.",
    "structure": "What is done to a model's FFNs before anything else; `split` makes experts of a dense one.",
    "routing": "Which experts a token gets, with which weights.",
    "quantization": "How expert weights are stored. The oracle uses the same dequantized values.",
    "sparsity": "Which activations or weights are left out.",
    "backend": "How experts are executed. `moebench list backend` says which work on this machine.",
    "traffic": "The hidden states of a case, or the routing itself where the traffic forces it.",
    "suite": "What is measured. An experiment such as `quick` is several suites in one run.",
}

TABLE_SUMMARIES = {
    "runs": "One `moebench run`: when, by which command, of which sources, with which packages.",
    "hosts": "The machine of a run.",
    "cases": "One thing that was to be measured, how it ended, and why; every axis has a column.",
    "timings": "All samples of a case in one process on one clock, with their summary.",
    "metrics": "One number of a case: routing balance, bytes, flops, quality.",
    "series": "Numbers along an index, such as tokens per expert.",
    "items": "One judged item of an evaluation, kept so that two methods can be compared item by item.",
    "blobs": "Files beside the tables, such as what a worker printed; found by their sha256.",
    "claims": "One published claim and what `moebench papers` measured for it.",
    "comparisons": "What a gate found of one case (or of two backends): a time, a metric or an accuracy of both sides, "
    "with its verdict. A case without one has kind `case`, and its status in that place.",
    "turns": "All calls of one side of a gate's process pair; side is `base`, `again` (the base a second time) or "
    "`candidate`.",
}

COLUMN_NOTES = {
    "plan_hash": "of plan, sources, packages and host: an unfinished run with the same one is resumed",
    "method_key": "sha256 of what is computed: speed and quality of a method meet here",
    "case_key": "sha256 of method, group, backend and execution",
    "group_key": "cases that were measured together share it",
    "protocol": "`timed`, or `once` for evaluations, which have no latency",
    "base": "how the weights were stored before us, such as Q4_1",
    "evidence": "what kind of thing the numbers are",
    "reason": "one sentence wherever the status is not ok; on an ok row what one must know of it, if anything",
    "flags": "doubts about an ok row",
    "weights": "what the plan said: dense, packed or dequantized",
    "sparse": "what the plan said: none, skip or mask",
    "executed": "what the backend says that it ran; for a GPU also what device that was",
    "params": "every parameter of every axis, defaults included",
    "error": "largest error of an output row, relative to the reference",
    "error_bound": "what the oracle allows",
    "flips": "sparsity decisions near their threshold that may have gone the other way",
    "elapsed_s": "wall time of a case that runs once; never a latency",
    "process": "0, 1, ...: each group runs in several fresh processes",
    "clock": "wall, cpu, or device: of a GPU, between two of its events",
    "sitting": "cases of one sitting were sampled in turns together",
    "ns": "every call, in nanoseconds",
    "turn": "the turn of every call",
    "p99_ns": "NULL below 368 calls",
    "switches": "involuntary context switches during the samples",
    "step": "which input it was",
}


def builtin() -> list[Descriptor]:
    """Return the descriptors of all built-in plug-ins."""
    return [d for module in BUILTIN_PLUGINS for d in importlib.import_module(module).DESCRIPTORS]


def plugins_page() -> str:
    """Return the page of all built-in plug-ins with their parameters and defaults."""
    found = builtin()
    lines = [
        NOTICE,
        "# Plug-ins",
        "",
        "Every built-in member of every axis. Parameters are set as `params.<kind>.<name>.<parameter>=VALUE` (those of",
        "a model as `model.<parameter>=VALUE`, of a suite as `suite.<parameter>=VALUE`); a list given to a parameter",
        "that takes one value measures each of them. `moebench list` also shows what is installed beside these, and",
        "what works on this machine. How to add one: [CONTRIBUTING.md](../CONTRIBUTING.md).",
    ]
    for kind in KINDS:
        lines += ["", f"## {kind}", "", KIND_SUMMARIES[kind], "", *_kind(d for d in found if d.kind == kind)]
    return "\n".join(lines) + "\n"


def _kind(descriptors: Iterator[Descriptor]) -> Iterator[str]:
    members = list(descriptors)
    yield "| name | what it is | parameters with their defaults |"
    yield "|---|---|---|"
    texts: dict[str, list[str]] = {}
    for member in members:
        names = ", ".join(f"`{name}`" for name in (member.name, *member.aliases))
        parameters = ", ".join(f"`{f.name}={_default(f)}`" for f in _fields(member))
        needs = f" (needs {', '.join(member.requires)})" if member.requires else ""
        yield f"| {names} | {member.summary}{needs} | {parameters or '-'} |"
        texts.setdefault(_documentation(member), []).append(member.name)
    for text, owners in texts.items():
        if text:
            yield f"\n**{', '.join(owners)}.** {text}"


def _fields(descriptor: Descriptor) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(descriptor.params) if f.init] if descriptor.params else []


def _default(field: dataclasses.Field[Any]) -> str:
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    return "(required)" if value is dataclasses.MISSING else json.dumps(plain(value))


def _documentation(descriptor: Descriptor) -> str:
    """Return what the parameter class says of itself; presets, which are made, have the words of their base."""
    if descriptor.params is None:
        return ""
    made = descriptor.params.__name__.startswith("Synthetic_")
    documented = descriptor.params.__base__ if made else descriptor.params
    text = inspect.cleandoc((documented.__doc__ if documented else "") or "")
    return "" if text.startswith(f"{descriptor.params.__name__}(") else text.replace("``", "`")


def results_page() -> str:
    """Return the page of tables and views, with their SQL."""
    lines: list[str] = [NOTICE, "# Results", "", RESULTS_INTRO, f"Schema version {SCHEMA_VERSION}.", "", "## Tables"]
    for table, columns in TABLES.items():
        stored = base_table(table)
        named = f" Its rows are stored as `{stored}`; `{table}` is a view." if stored != table else ""
        lines += ["", f"### {table}", "", f"{TABLE_SUMMARIES[table]}{named}"]
        lines += ["", f"Key: {', '.join(f'`{key}`' for key in KEYS[table])}."]
        lines += ["", "| column | type | |", "|---|---|---|"]
        lines += [f"| `{name}` | {kind} | {COLUMN_NOTES.get(name, '')} |" for name, kind in columns.items()]
    lines += ["", "## Views", "", "What people query; the same over the database and over the Parquet files."]
    for name, view in VIEWS.items():
        sql = textwrap.dedent(view.sql).strip()
        lines += ["", f"### view {name}", "", view.summary, "", "```text", sql, "```"]
    return "\n".join([*lines, "", RESULTS_QUERIES])


RESULTS_INTRO = """\
`<store>/runs/<run_id>/<part>/*.parquet` is the truth: one folder per finished group, written aside, synced and renamed
once, and never changed. `<store>/moebench.duckdb` is what people query; it holds the same rows and can be deleted and
made again by `moebench ingest`. `moebench export FOLDER` writes every table as Parquet or CSV. A missing measurement is
NULL, never 0. Times are in nanoseconds, and every single call is kept.
"""

RESULTS_QUERIES = """\
## Queries to begin with

How the cases of every run ended:

```sql
SELECT run_id, suite, status, cases, flagged FROM statuses ORDER BY ALL
```

Median time of a call with its interval, latest run of each case first:

```sql
SELECT model, backend, routing, tokens, wall_median_ns / 1e3 AS us, wall_lo_ns / 1e3 AS lo, wall_hi_ns / 1e3 AS hi
FROM latest WHERE status = 'ok' AND protocol = 'timed' ORDER BY model, tokens, us
```

Single samples, as they were taken:

```sql
SELECT backend, process, unnest(ns) AS ns, unnest(turn) AS turn FROM timings WHERE clock = 'wall' LIMIT 20
```

Speed beside quality, where both were measured for one method:

```sql
SELECT s.backend, s.routing, s.quantization, s.sparsity, s.wall_median_ns / 1e3 AS us, q.name, q.value, q.unit
FROM latest s JOIN metrics q USING (method_key) WHERE q.suite = 'accuracy' AND s.status = 'ok' AND s.protocol = 'timed'
```

Time per token at equal active parameters, that of the router beside it (`experiment=routing_speed`), to be sorted:

```sql
SELECT l.backend, l.routing, a.value AS active_params_per_token, l.wall_median_ns / l.tokens AS layer_ns_per_token,
       r.wall_median_ns / r.tokens AS router_ns_per_token
FROM latest l JOIN metrics a USING (run_id, case_key)
LEFT JOIN latest r ON r.suite = 'routing' AND r.params->'workload'->>'phase' = 'route' AND r.run_id = l.run_id
  AND r.method_key = l.method_key AND r.tokens = l.tokens AND r.dtype = l.dtype
WHERE a.name = 'active_params_per_token' AND l.status = 'ok' ORDER BY layer_ns_per_token
```

What is not ok, and why:

```sql
SELECT suite, backend, routing, status, reason FROM cases WHERE status <> 'ok'
```
"""


def papers(store: Path | None = None) -> str:
    """Return the page of all claims: those judged in ``store`` as they are there, others as the page has them."""
    page = FOLDER / "papers.md"
    entries = claims_in(page.read_text() if page.exists() else "") | (claims_of(store) if store else {})
    notice = NOTICE.replace("change the code, then run `nox -s docs`", "run `moebench papers`, then it with --claims")
    return notice + "\n" + papers_page(entries, load_papers())


def routings_page(store: Path | None = None) -> str:
    """Return the page of all routings, with the costs measured in ``store``, or those that the page has already."""
    page = FOLDER / "routing.md"
    costs = costs_of(store) if store else costs_in(page.read_text() if page.exists() else "")
    return NOTICE + routing_page(builtin(), costs, FOLDER.parent / "tests")


def tasks_page(store: Path | None = None) -> str:
    """Return the page of accuracy on tasks, with the results in ``store``, or those that the page has already."""
    page = FOLDER / "accuracy.md"
    results = results_of(store) if store else results_in(page.read_text() if page.exists() else "")
    return NOTICE + accuracy_page(results)


def codecs_page() -> str:
    """Return the page of all quantizations, with the verdicts that papers.md shows."""
    papers = FOLDER / "papers.md"
    return NOTICE + quantization_page(builtin(), papers.read_text() if papers.exists() else "")


def channels_page() -> str:
    """Return the page of all sparsities, with the verdicts that papers.md shows."""
    papers = FOLDER / "papers.md"
    return NOTICE + sparsity_page(builtin(), papers.read_text() if papers.exists() else "")


def compiled_page() -> str:
    """Return the page of compiled kernels, from the figures that lie beside it."""
    return NOTICE + static_page(json.loads((FOLDER / "gpu-static.json").read_text()))


def tiers_page() -> str:
    """Return the page of offloading, from the figures that lie beside it once there are any."""
    figures = FOLDER / "offload.json"
    return NOTICE + offload_page(json.loads(figures.read_text()) if figures.exists() else None)


PAGES = {
    "accuracy.md": tasks_page,
    "gpu-static.md": compiled_page,
    "offload.md": tiers_page,
    "papers.md": papers,
    "plugins.md": plugins_page,
    "quantization.md": codecs_page,
    "results.md": results_page,
    "routing.md": routings_page,
    "sparsity.md": channels_page,
}


def stale(folder: Path = FOLDER) -> list[str]:
    """Return the names of the pages in ``folder`` that are not what the code says."""
    written = {name: folder / name for name in PAGES}
    return [name for name, path in written.items() if not path.exists() or path.read_text() != PAGES[name]()]


def unknown_notes(tables: Mapping[str, Mapping[str, str]] = TABLES) -> set[str]:
    """Return the notes of this file that are about no table, column or kind."""
    columns = {name for table in tables.values() for name in table}
    return (
        (COLUMN_NOTES.keys() - columns) | (TABLE_SUMMARIES.keys() ^ tables.keys()) | (KIND_SUMMARIES.keys() ^ {*KINDS})
    )


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is out of date")
    parser.add_argument("--claims", type=Path, metavar="STORE", help="write papers.md with the claims of this store")
    parser.add_argument("--routing", type=Path, metavar="STORE", help="write routing.md with the costs in this store")
    parser.add_argument(
        "--accuracy", type=Path, metavar="STORE", help="write accuracy.md with the results in this store"
    )
    parser.add_argument("--static", type=Path, metavar="STORE", help="write gpu-static with the figures in this store")
    parser.add_argument("--offload", type=Path, metavar="STORE", help="write offload with the figures in this store")
    options = parser.parse_args()
    if options.offload:
        (FOLDER / "offload.json").write_text(json.dumps(offload_results(options.offload), indent=1) + "\n")
        (FOLDER / "offload.md").write_text(tiers_page())
        print("docs/offload.json", "docs/offload.md", sep="\n")
        return 0
    if options.static:
        (FOLDER / "gpu-static.json").write_text(json.dumps(static_results(options.static), indent=1) + "\n")
        (FOLDER / "gpu-static.md").write_text(compiled_page())
        print("docs/gpu-static.json", "docs/gpu-static.md", sep="\n")
        return 0
    if options.accuracy:
        (FOLDER / "accuracy.md").write_text(tasks_page(options.accuracy))
        print("docs/accuracy.md")
        return 0
    if options.routing:
        (FOLDER / "routing.md").write_text(routings_page(options.routing))
        print("docs/routing.md")
        return 0
    if options.claims:
        (FOLDER / "papers.md").write_text(papers(options.claims))
        (FOLDER / "quantization.md").write_text(codecs_page())
        (FOLDER / "sparsity.md").write_text(channels_page())
        print("docs/papers.md", "docs/quantization.md", "docs/sparsity.md", sep="\n")
        return 0
    if options.check:
        old = stale()
        print(f"out of date: {', '.join(old)}; run nox -s docs" if old else "all pages are up to date")
        return int(bool(old))
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
