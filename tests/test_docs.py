"""The documentation is true: its code runs, its commands are understood, its links lead somewhere."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.bench import cli
from moebench.bench.config import EngineConfig
from moebench.bench.papers_doc import claims_in, claims_of, papers_page
from moebench.bench.run import planned, split_plugins
from moebench.contracts import Flag, Registry, Status
from moebench.moe.oracle import BOUNDS
from moebench.results.parts import write_part
from moebench.results.query import run_sql
from moebench.results.statistics import PERCENTILES, quantile_n_required
from moebench.suites.paper_specs import Paper, PaperRule, PaperRun

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README, CONTRIBUTING, MEASURING = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "measuring.md"
GATE, MODELS = ROOT / "docs" / "gate.md", ROOT / "docs" / "models.md"
FENCE = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
FAST = ("engine.processes=1", "engine.seconds=0.05", "engine.warmup_seconds=0.05")


def blocks(page, language):
    """Yield (file, text) of the fenced blocks of a language."""
    yield from ((file, text) for found, file, text in FENCE.findall(page.read_text()) if found == language)


def commands(page, name="moebench"):
    """Return the command lines of a page without their comments, as lists of words."""
    lines = [line for _, text in blocks(page, "sh") for line in text.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{name} ")]


def moebench(folder, *arguments):
    """Run the command line in ``folder`` as a real process."""
    env = {**os.environ, "MOEBENCH_STORE": str(folder / "store"), "MOEBENCH_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "moebench.bench", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    """A folder whose store holds a finished run."""
    folder = tmp_path_factory.mktemp("selftest")
    done = moebench(folder, "run", "suite=selftest", "axes.backend=[eager]", "--quiet", *FAST)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def generate():
    """The module ``docs/generate.py``, which makes each page once: what a page says does not change while tests run."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PAGES.update({name: functools.cache(page) for name, page in module.PAGES.items()})
    return module


# ---------------------------------------------------------------------------------------------------------------------
# README


def test_the_readme_example_runs(tmp_path):
    ((_, code),) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) == 5
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"b/a \d+\.\d+ \[.*\]: (improved|regressed|equivalent|inconclusive) \(outputs agree", done.stdout)


def test_the_page_about_models_runs(tmp_path):
    page = ROOT / "docs" / "routing-in-models.md"
    code = "".join(text for _, text in blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sha256 = done.stdout.split()[-1]
    assert hashlib.sha256((tmp_path / "trace.parquet").read_bytes()).hexdigest() == sha256


def test_the_readme_shows_every_command():
    subcommands = next(a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert set(subcommands) == {words[0] for words in commands(README)}


@pytest.mark.parametrize("page", [README, CONTRIBUTING, MEASURING, GATE, MODELS], ids=lambda page: page.name)
def test_commands_are_understood(page):
    found = commands(page)
    assert found
    for words in found:
        options, rest = cli.make_parser().parse_known_args(words)
        assert not rest or options.command in ("run", "gate"), words


RUNS = [
    words[1:] for page in (README, MEASURING) for words in commands(page) if words[:1] == ["run"] and "-m" not in words
]


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_runs_plan_what_they_say(words):
    options = cli.make_parser().parse_args(["run", *words])
    assert not split_plugins(options.settings)[0]
    plan, _ = planned(options.settings, Registry.load(), options.shard)
    assert plan.groups


LOOKS = [words for words in commands(README) if words[0] in ("sql", "report", "export", "ingest", "list", "doctor")]


@pytest.mark.parametrize("words", LOOKS, ids=" ".join)
def test_commands_that_look_at_results_work(selftest, words):
    done = moebench(selftest, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_readme_names_sessions_that_exist():
    defined = set(re.findall(r"^@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"nox -s (\w+)", page.read_text())}
    assert {"bench", "tests"} <= named <= defined


@pytest.mark.parametrize("page", [README, MEASURING], ids=lambda page: page.name)
def test_every_status_and_flag_is_explained(page):
    text = page.read_text()
    missing = {value for value in (*Status, *Flag) if f"`{value}`" not in text}
    assert missing <= ({Status.OK} if page == MEASURING else set())


# ---------------------------------------------------------------------------------------------------------------------
# CONTRIBUTING


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A folder with the plug-ins that CONTRIBUTING writes."""
    folder = tmp_path_factory.mktemp("plugins")
    for file, code in blocks(CONTRIBUTING, "python"):
        (folder / file).write_text(code)
    return folder


EXPECTED = {
    "my_backend.py": ("backend, routing", [("eager", "moepp"), ("eager", "topk")], ("my_backend", "moepp")),
    "min_p.py": ("routing, (params->'routing'->>'p')", [("topk", None)], ("min_p", "0.3")),
    "gating.py": ("suite, (params->'routing'->>'k')", [("gating", "1")], ("gating", "2")),
}
"""By file: two columns that tell its rows apart, rows that must be there, and one that only the plug-in can make."""


@pytest.mark.parametrize("file", EXPECTED)
def test_a_plugin_of_contributing_gives_ok_rows(plugins, tmp_path, file):
    ((_, line),) = [(name, text.strip()) for name, text in blocks(CONTRIBUTING, "sh") if name == file]
    words = shlex.split(line)[1:]
    (given,) = [word for word in words if word.startswith("plugin=")]
    words[words.index(given)] = f"plugin={plugins / given.removeprefix('plugin=')}"
    done = moebench(tmp_path, *words, *FAST)
    assert done.returncode == 0, done.stdout + done.stderr
    columns, others, own = EXPECTED[file]
    query = f"SELECT {columns}, status, flags IS NOT NULL, wall_n > 0 FROM latest"
    rows = [tuple(row.values()) for row in json.loads(run_sql(tmp_path / "store", query, format="json"))]
    assert {row[2:] for row in rows} == {("ok", True, True)}
    assert {own, *others} <= {row[:2] for row in rows}


def test_the_oracle_of_contributing_can_fail(plugins):
    registry = Registry.load([str(plugins / "gating.py")])
    plan, _ = planned(["suite=gating", "model=tiny", "axes.tokens=16"], registry)
    trial = registry.get("suite", "gating").create().prepare(plan.cases[0], registry)
    routing = trial.run(0)
    assert trial.verify(0, routing).ok
    assert not trial.verify(1, routing).ok
    assert not trial.verify(0, dataclasses.replace(routing, weight_N=routing.weight_N * 1.001)).ok


def test_every_file_of_contributing_is_used():
    files = {file for language in ("python", "sh") for file, _ in blocks(CONTRIBUTING, language)}
    assert files == {*EXPECTED, "min_p_router.py", "gating_trial.py"}


def test_the_plugins_import_no_torch_in_the_parent(plugins):
    code = (
        "import sys\nfrom moebench.contracts import Registry\n"
        f"Registry.load({[str(plugins / file) for file in EXPECTED]!r})\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_contributing_names_every_folder():
    named = set(re.findall(r"^\| `(\w+)/`", CONTRIBUTING.read_text(), re.MULTILINE))
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= named


# ---------------------------------------------------------------------------------------------------------------------
# docs/


def test_generated_pages_are_up_to_date(generate):
    assert generate.stale() == [], "run nox -s docs"


def test_a_page_out_of_date_is_seen(generate, tmp_path):
    for name, page in generate.PAGES.items():
        (tmp_path / name).write_text(page())
    (tmp_path / "results.md").write_text(generate.results_page().replace("VARCHAR", "TEXT", 1))
    assert generate.stale(tmp_path) == ["results.md"]


def test_notes_are_about_things_that_exist(generate):
    assert generate.unknown_notes() == set()


@pytest.mark.parametrize("query", [text for _, text in blocks(ROOT / "docs" / "results.md", "sql")])
def test_queries_of_the_docs_run(selftest, query):
    assert run_sql(selftest / "store", query, format="csv").count("\n") >= 1


def test_numbers_of_measuring_are_those_of_the_code():
    text = " ".join(MEASURING.read_text().split())
    for name, q in PERCENTILES.items():
        assert re.search(rf"{name.removesuffix('_ns')} from {quantile_n_required(q)}\b", text), name
    for dtype, bound in BOUNDS.items():
        assert f"{bound:.0e}".replace("e-0", "e-") + f" ({str(dtype).removeprefix('torch.')})" in text, dtype
    engine = EngineConfig()
    assert engine.precision == 0.02
    assert engine.processes == 3
    assert "lies within 2 %" in text
    assert "three fresh processes" in text


def headings(page):
    """Return the anchors of a page as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        path, _, anchor = target.partition("#")
        assert "://" not in target, f"{target}: the pages link to each other only"
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_no_machine(page):
    assert not re.search(r"/root/|/home/|/work/|/tmp/|https?://", page.read_text())


CLAIM = {
    "title": "Title",
    "claim": "It holds.",
    "kind": "empirical",
    "figure": "Table 1",
    "ours": "A small one.",
    "unit": "ratio",
    "direction": "at_most",
    "margin": 0.1,
    "seeds": [0, 1, 2],
    "a": [2.0, 2.0, 2.0],
    "b": [1.0, 1.0, 1.0],
    "estimate": 2.0,
    "lo": 1.9,
    "hi": 2.1,
    "verdict": "not supported",
}


def judged(folder, **changes):
    write_part(folder / "runs" / "r", "claims", {"claims": [{**CLAIM, "run_id": "r", **changes}]})
    return claims_of(folder)


def papers_of(*keys, **changes):
    told = {name: CLAIM[name] for name in ("title", "claim", "figure", "ours", "kind", "seeds")} | changes
    rest = {"run": PaperRun("accuracy", ()), "metric": "", "cost_s": 1.0, "model": "none"}
    return [Paper(key=key, rule=PaperRule("at_most", 0.1, "ratio"), **rest, **told) for key in keys]


def test_the_page_of_papers_has_every_claim_with_its_verdict(tmp_path):
    page = papers_page(judged(tmp_path, key="a-claim"), papers_of("a-claim"))
    assert "| [a-claim](#a-claim) | empirical | ratio 2 [1.9, 2.1] | not supported |" in page
    assert "(a, b) by seed: (2, 1), (2, 1), (2, 1)." in page


def test_a_store_brings_its_own_claims_and_the_page_keeps_the_others(tmp_path):
    old = judged(tmp_path / "old", key="kept") | judged(tmp_path / "older", key="again") | judged(tmp_path, key="gone")
    page = papers_page(old, papers_of(*old))
    assert claims_in(page) == old
    new = judged(tmp_path / "new", key="again", verdict="supported", estimate=1.0)
    both = papers_page(claims_in(page) | new, papers_of("kept", "again"))
    assert claims_in(both) == {"kept": old["kept"], "again": new["again"]}
    assert "gone" not in both


@pytest.mark.parametrize("changes", [{"ours": "A larger one."}, {"claim": "It may hold."}])
def test_a_verdict_on_a_row_that_was_written_anew_is_not_that_rows(tmp_path, changes):
    old = judged(tmp_path, key="a-claim")
    assert claims_in(papers_page(old, papers_of("a-claim"))) == old
    assert claims_in(papers_page(old, papers_of("a-claim", **changes))) == {}
