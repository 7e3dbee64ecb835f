"""The gate as real processes: a third-party repository that gates its own kernels with one command."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from moebench.dashboards.page import render
from moebench.results.database import connect_parts
from moebench.results.gate import Exit

BEFORE = '''
"""Kernels of somebody's own package; the work is counted in repetitions of a small product."""
import numpy as np

A = np.random.default_rng(0).standard_normal((96, 96)).astype("float32") / 10

def work(repetitions, factor=1.0):
    def run():
        out = A
        for _ in range(repetitions):
            out = np.tanh(out @ A)
        return out * factor
    return run

def same(): return work(20)
def slower(): return work(20)
def faster(): return work(60, 0.0)
def wrong(): return work(20)
def crashes(): return work(20)
def silent(): return work(20)
def gone(): return work(20)
'''

AFTER = (
    BEFORE.replace("def slower(): return work(20)", "def slower(): return slow(20)")
    .replace("def faster(): return work(60, 0.0)", "def faster(): return work(20, 0.0)")
    .replace("def wrong(): return work(20)", "def wrong(): return work(20, 1.01)")
    .replace("def crashes(): return work(20)", "def crashes(): import os; os.kill(os.getpid(), 11)")
    .replace("def silent(): return work(20)", "def silent(): run = work(20); return lambda: (run(), None)[1]")
    .replace("def gone(): return work(20)", "")
    + """
def slow(repetitions):
    run = work(repetitions)
    return lambda: (run(), run())[1]

def new(): return work(20)
"""
)

TARGETS = ("same", "slower", "faster", "wrong", "crashes", "silent", "new", "gone")


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with two commits of a package."""
    folder = tmp_path_factory.mktemp("theirs")
    git(folder, "init", "-q")
    for source in (BEFORE, AFTER):
        (folder / "src" / "their_kernels").mkdir(parents=True, exist_ok=True)
        (folder / "src" / "their_kernels" / "__init__.py").write_text(source)
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "a change")
    return folder


def run_gate(repository, folder, *arguments, targets=TARGETS):
    """Run the command in the repository and return (exit status, standard output, error output)."""
    named = [word for target in targets for word in ("--target", f"their_kernels:{target}")]
    command = [sys.executable, "-m", "moebench.bench", "gate", "--store", str(folder / "store"), *named, *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def gated(repository, tmp_path_factory):
    """One gate over all targets; returns (folder, exit status, standard output)."""
    folder = tmp_path_factory.mktemp("gated")
    files = [f"--{name}={folder / name}" for name in ("junit", "markdown", "json")]
    code, out, err = run_gate(
        repository, folder, "--base", "HEAD~1", "--seconds=1", "--max-seconds=1", "--detect=0.3", "--github", *files
    )
    assert "Traceback" not in err
    return folder, code, out


def test_each_kernel_gets_its_own_answer(gated):
    folder, code, out = gated
    found = json.loads((folder / "json").read_text())
    verdicts = {one["label"].split(":")[1]: one["verdict"] for one in found["judged"] if one["kind"] == "time"}
    skipped = {one["label"].split(":")[1]: (one["status"], one["reason"]) for one in found["skipped"]}
    assert code == Exit.REGRESSED, out
    assert verdicts["slower"] == "regressed"
    assert verdicts["faster"] == "improved"
    assert verdicts["same"] in ("equivalent", "inconclusive")
    assert set(verdicts) == {"same", "slower", "faster"}
    assert skipped["wrong"][0] == "broken"
    assert "outputs of the two sides" in skipped["wrong"][1]
    assert skipped["crashes"][0] == "broken"
    assert "SIGSEGV" in skipped["crashes"][1]
    assert skipped["silent"][0] == "cannot gate"
    assert skipped["gone"][0] == "missing"
    assert skipped["new"][0] == "skipped"
    assert skipped["new"][1].startswith("not in base")


def test_a_ratio_comes_with_its_interval_and_its_pairs(gated):
    found = json.loads((gated[0] / "json").read_text())
    slower = next(one for one in found["judged"] if one["label"].endswith(":slower") and one["kind"] == "time")
    assert 1.3 < slower["lo"] <= slower["ratio"] <= slower["hi"] < 3
    assert slower["pairs"] == 5
    assert slower["clock"] == "cpu"


def test_everything_is_kept(gated, query, store_problems):
    store = gated[0] / "store"
    assert store_problems(store) == []
    sides = query(store, "SELECT DISTINCT side FROM turns ORDER BY side", database=True)
    assert [row[0] for row in sides] == ["again", "base", "candidate"]
    ratio, kept = query(
        store,
        """
        WITH minima AS (
            SELECT case_key, pair, side, turn, min(ns) AS ns FROM (
                SELECT case_key, pair, side, unnest(ns) AS ns, unnest(turn) AS turn FROM turns WHERE clock = 'cpu'
            ) GROUP BY ALL
        )
        SELECT exp(median(ln(c.ns / b.ns))), any_value(k.ratio)
        FROM minima c JOIN minima b USING (case_key, pair, turn) JOIN comparisons k USING (case_key)
        WHERE c.side = 'candidate' AND b.side = 'base' AND k.label LIKE '%:slower' AND k.kind = 'time'
        """,
    )[0]
    assert ratio == pytest.approx(kept, rel=0.02), "the stored ratio follows from the stored turns"


def test_what_machines_and_people_read(gated):
    folder, _, out = gated
    suite = ElementTree.fromstring((folder / "junit").read_text())
    failures = {case.get("name").split(":")[1] for case in suite.iter("testcase") if case.find("failure") is not None}
    assert {"slower", "wrong", "crashes"} <= {name.split(" ")[0] for name in failures}
    assert "slower" in (folder / "markdown").read_text()
    assert "::error" in out
    assert "their_kernels:slower" in out


def test_what_has_no_verdict_is_kept_too(gated, query):
    found = query(
        gated[0] / "store", "SELECT label, verdict, reason FROM comparisons WHERE kind = 'case'", database=True
    )
    statuses = {label.split(":")[1]: status for label, status, _ in found}
    assert statuses == {
        "wrong": "broken", "crashes": "broken", "silent": "cannot gate", "new": "skipped", "gone": "missing"
    }  # fmt: skip
    assert all(reason for *_, reason in found)
    with connect_parts(gated[0] / "store") as connection:
        html = render(connection, None, "store")
    assert '<span class="verdict wrong">broken</span>' in html
    assert '<span class="verdict plain">missing</span>' in html


def test_a_side_that_cannot_start_is_told_in_one_sentence(tmp_path):
    repository = tmp_path / "ours"
    for text in ("", "x ="):
        (repository / "bench").mkdir(parents=True, exist_ok=True)
        for name in ("contracts.py", "__init__.py", "bench/__init__.py"):
            (repository / name).write_text("")
        (repository / "bench" / "worker.py").write_text(text)
        if not text:
            git(repository, "init", "-q")
        git(repository, "add", "-A")
        git(repository, "commit", "-qm", "a change")
    code, _, err = run_gate(repository, tmp_path, "--base", "HEAD~1", targets=("same",))
    last = err.strip().splitlines()[-1]
    assert (code, "Traceback" in err) == (2, False), err
    assert last.startswith("moebench: side HEAD~1")
    assert "could not start" in last
    assert not list((tmp_path / "store" / "runs").iterdir()), "a gate that never began is no run"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--base", "no-such-branch"), "no-such-branch"),
        ((), "name what to compare with"),
        (("--base", "HEAD~1", "--base-wheel", "x.whl"), "twice"),
        (("--base", "HEAD~1", "--fail-on", "rain"), "inconclusive or noisy"),
        (("--base", "HEAD~1", "--budget", "soon"), "8m"),
        (("--base", "HEAD~1", "--margin", "0.2"), "margin < detect"),
        (("--base", "HEAD~1", "suite=selftest"), "takes no settings"),
        (("--base-backend", "eager", "--candidate-backend", "grouped"), "no backend"),
        (("--base", "HEAD~1", "--metric-margin", "flop=0.1"), "'flop' is not gated"),
        (("--base", "HEAD~1", "--metric-margin", "bytes"), "bytes=0.02"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(repository, tmp_path, arguments, sentence):
    code, _, err = run_gate(repository, tmp_path, *arguments, targets=("same",))
    assert (code, sentence in err, err.count("\n")) == (2, True, 1), err


def test_a_budget_ends_with_its_coverage(repository, tmp_path):
    code, out, err = run_gate(
        repository, tmp_path, "--base", "HEAD~1", "--budget=1s", "--seconds=1", targets=("same", "slower")
    )
    assert code == Exit.INCONCLUSIVE, err
    assert "budget" in out
    assert "0 of 2 cases" in out
