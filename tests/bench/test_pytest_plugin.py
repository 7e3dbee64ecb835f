"""pytest-benchmark and the store: sessions that are kept, files that are taken in, and benchmarks as trials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.bench.cli import main
from moebench.bench.pytest_plugin import refusal, trial_arguments
from moebench.bench.pytest_results import LONGEST, NO_RAW_DATA, short
from moebench.bench.pytest_trial import Use
from moebench.results.database import ingest

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--benchmark-max-time=0.01", "-q", "-p", "no:cacheprovider")

BENCHMARKS = """
import pytest

class Big:
    def __init__(self):
        self.content = list(range(1000))

    def __repr__(self):
        return "Big " + "x" * 100_000

@pytest.fixture(scope="module")
def log(tmp_path_factory):
    made = tmp_path_factory.mktemp("log") / "log.txt"
    yield made
    made.write_text("torn down")

@pytest.fixture
def text(tmp_path, log):
    file = tmp_path / "x.txt"
    file.write_text("hello")
    log.write_text("set up")
    yield file
    file.unlink()

@pytest.mark.parametrize("times", [1, 3])
def test_read(benchmark, text, times):
    assert benchmark(lambda n: text.read_text() * n, times) == "hello" * times

@pytest.mark.parametrize("big", [Big()], ids=["big"])
def test_big(benchmark, big):
    benchmark.extra_info["big"] = big
    assert benchmark(len, big.content) == 1000

def test_wrong(benchmark):
    assert benchmark(sum, range(3)) == 4

def test_raises(benchmark):
    benchmark(lambda: 1 / 0)

def test_caught(benchmark):
    with pytest.raises(ZeroDivisionError):
        benchmark(lambda: 1 / 0)

def test_pedantic(benchmark):
    assert benchmark.pedantic(sum, args=([1, 2],), rounds=5, iterations=3) == 3

def test_setup(benchmark):
    benchmark.pedantic(sum, setup=lambda: (([1, 2],), {}), rounds=3)

def test_nothing(benchmark):
    benchmark(lambda: None)

def test_generator(benchmark):
    benchmark(lambda: (i for i in range(3)))

def test_unused(benchmark):
    pass

@pytest.mark.skip(reason="not today")
def test_skipped(benchmark):
    pass

def test_other():
    pass
"""

FAKE_GATE = """
import json
import pathlib
import moebench.bench.gate.from_pytest

def ask(*arguments):  # a name that begins with pytest_ would be a hook
    pathlib.Path("asked.json").write_text(json.dumps(arguments, default=str))
    return 3

moebench.bench.gate.from_pytest.pytest_gate = ask
"""


def python(folder, *arguments, **env):
    """Run Python; a pytest of it is no worker of the one that runs these tests, and has no xdist but a feigned one."""
    command = [sys.executable, *arguments]
    told = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    told["PYTEST_ADDOPTS"] = "-p no:xdist"
    return subprocess.run(command, cwd=folder, env={**told, **env}, capture_output=True, text=True, timeout=120)


def session(folder, *arguments, **env):
    return python(folder, "-m", "pytest", *FAST, *arguments, **env)


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A repository with benchmarks of every sort."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "test_them.py").write_text(BENCHMARKS)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


@pytest.fixture(scope="module")
def kept(project):
    """(store, completed session, file of --benchmark-json) of a session that was kept and written."""
    done = session(project, "--moebench-store=kept", "--benchmark-json=out.json")
    return project / "kept", done, project / "out.json"


@pytest.fixture
def taken(kept, tmp_path):
    """The store into which a changed copy of the file goes, with the status and output of the command."""
    original = json.loads(kept[2].read_text())

    def take(change, capsys):
        document = json.loads(json.dumps(original))
        change(document)
        return take_text(json.dumps(document), tmp_path, capsys)

    return take


def take_text(text, folder, capsys):
    (folder / "file.json").write_text(text)
    status = main(["ingest", "pytest-benchmark", str(folder / "file.json"), "--store", str(folder / "taken")])
    return folder / "taken", status, capsys.readouterr()


def endings(query, store):
    return {name.partition("::")[2]: (status, why) for name, status, why in query(store, ENDINGS)}


ENDINGS = "SELECT model, status, reason FROM cases ORDER BY model"

# ---------------------------------------------------------------------------------------------------------------------
# Sessions


def test_a_session_is_kept_with_what_failed(kept, query, store_problems):
    store, done, _ = kept
    assert done.returncode == 1, done.stdout
    assert "moebench: kept as run " in done.stdout
    found = endings(query, store)
    ok = {name for name, (status, _) in found.items() if status == "ok"}
    assert {"test_read[1]", "test_read[3]", "test_big[big]", "test_pedantic", "test_setup"} <= ok
    assert found["test_wrong"] == ("failed", "the test failed in its call: assert 3 == 4")
    assert found["test_raises"] == ("failed", "the test failed in its call: ZeroDivisionError: division by zero")
    assert found["test_caught"] == ("failed", "the callable raised an exception.")
    assert not {"test_skipped", "test_unused", "test_other"} & set(found)
    assert store_problems(store) == []


def test_every_round_is_kept_with_its_provenance(kept, query):
    store, _, file = kept
    rounds = {one["fullname"]: one["stats"] for one in json.loads(file.read_text())["benchmarks"]}
    sql = "SELECT model, ns, mode, clock, evidence, p90_ns, sitting = case_key FROM timings WHERE status = 'ok'"
    rows = query(store, sql)
    assert len(rows) >= 5
    for name, ns, mode, clock, evidence, p90_ns, alone in rows:
        assert ns == [round(1e9 * seconds) for seconds in rounds[name]["data"]]
        assert (mode, clock, evidence, alone) == ("sequential", "wall", "measured-cpu", True)
        assert p90_ns is None or rounds[name]["iterations"] == 1
    whole = "FROM cases JOIN hosts USING (run_id) JOIN runs USING (run_id)"
    ((suite, sha, cores, command),) = query(store, f"SELECT DISTINCT suite, git_sha, cores, command {whole}")
    assert suite == "pytest-benchmark"
    assert len(sha) == 40
    assert cores >= 1
    assert command.startswith("pytest ")
    assert "--moebench-store=kept" in command


def test_big_objects_never_enter_the_store(kept, query):
    ((params,),) = query(kept[0], "SELECT params FROM cases WHERE model LIKE '%test_big%'")
    told = json.loads(params)["pytest"]
    assert told["params"]["big"] == told["extra_info"]["big"] == ("Big " + "x" * LONGEST)[:LONGEST]


def test_a_kept_session_and_its_file_name_the_same_cases(kept, taken, query, capsys):
    store, status, told = taken(lambda document: None, capsys)
    assert status == 0, told.err
    keys = [set(query(one, "SELECT case_key FROM cases WHERE status = 'ok'")) for one in (kept[0], store)]
    assert keys[0] <= keys[1]


def test_without_an_option_nothing_happens(project, tmp_path):
    code = "import sys, pytest, moebench.bench.pytest_plugin; print({'torch', 'numpy', 'duckdb'} & set(sys.modules))"
    assert python(tmp_path, "-c", code).stdout.strip() == "set()"
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test_it(request):\n    assert not request.config.pluginmanager.hasplugin('moebench-session')\n"
        "    assert not {'moebench.bench.pytest_trial', 'duckdb', 'torch'} & set(sys.modules)\n"
    )
    for more in ((), ("-p", "no:benchmark")):
        arguments = [word for word in FAST if more == () or not word.startswith("--benchmark")]
        done = python(tmp_path, "-m", "pytest", "-W", "error", *arguments, *more)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--moebench-store=x", "--numprocesses=2"), "--moebench-store cannot be used with pytest-xdist"),
        (("--moebench-gate=HEAD", "--numprocesses=2"), "--moebench-gate cannot be used with pytest-xdist"),
        (("--moebench-store=/dev/null",), "is a file; choose a folder"),
        (("--moebench-gate=nowhere",), "there is no revision 'nowhere'"),
    ],
)
def test_what_cannot_be_kept_or_gated_is_refused_before_it_begins(project, arguments, words):
    stub = "def pytest_addoption(parser):\n    parser.addoption('--numprocesses')\n"  # as pytest-xdist names it
    (project / "xdist_stub.py").write_text(stub)
    done = session(project, "-p", "xdist_stub", *arguments, PYTHONPATH=str(project))
    assert done.returncode == 4
    assert words in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert "passed" not in done.stdout


def test_pytest_benchmark_is_needed(project):
    done = python(project, "-m", "pytest", "-q", "-p", "no:benchmark", "--moebench-store=x")
    assert (done.returncode, "pip install pytest-benchmark" in done.stderr) == (4, True)


def test_a_session_without_benchmarks_is_told(project, tmp_path):
    done = session(project, f"--moebench-store={tmp_path / 'none'}", "-k", "test_other")
    assert done.returncode == 2
    assert "no test used the `benchmark` fixture" in done.stdout
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_file_taken_in_twice_is_one_run_and_reported(taken, tmp_path, query, store_problems, capsys):
    first = taken(lambda document: None, capsys)
    store, status, told = taken(lambda document: None, capsys)
    assert (first[1], status) == (0, 0)
    assert told.out.splitlines()[0] == first[2].out.splitlines()[0]
    assert told.out.splitlines()[1] == "0 parts with 0 rows added"
    assert query(store, "SELECT count(DISTINCT run_id), count(*) = count(DISTINCT case_key) FROM cases") == [(1, True)]
    assert store_problems(store) == []
    assert main(["report", "--store", str(store)]) == 0
    assert "test_read[3]" in (store / "report.html").read_text()


def test_other_content_is_another_run(taken, query, capsys):
    taken(lambda document: None, capsys)
    store, _, _ = taken(lambda document: document["benchmarks"].pop(), capsys)
    assert query(store, "SELECT count(DISTINCT run_id) FROM cases") == [(2,)]


def test_a_file_without_raw_data_is_skipped_with_the_remedy(project, tmp_path, query, store_problems, capsys):
    saved = tmp_path / "saved"
    session(project, f"--benchmark-storage={saved}", "--benchmark-save=it", "-k", "test_read")
    (file,) = saved.rglob("*.json")
    store, status, _ = take_text(file.read_text(), tmp_path, capsys)
    assert status == 0
    assert set(endings(query, store).values()) == {("skipped", NO_RAW_DATA)}
    assert "--benchmark-save-data" in NO_RAW_DATA
    assert store_problems(store) == []


@pytest.mark.parametrize("value", [None, 0.0, -1.0, 1e-12, 1e300, float("nan"), float("inf"), "1", True, [1.0]])
def test_a_round_that_is_no_time_costs_the_case_its_times(taken, query, store_problems, capsys, value):
    def spoil(document):
        document["benchmarks"] = document["benchmarks"][:2]
        document["benchmarks"][0]["stats"]["data"][1] = value

    store, status, _ = taken(spoil, capsys)
    assert status == 0
    (status, reason), other = endings(query, store).values()
    assert (status, "which is no time" in reason, other[0]) == ("failed", True, "ok")
    assert store_problems(store) == []


HOSTILE = [
    "x" * 100_000,
    "</script><script>alert(1)</script>",
    "'; DROP TABLE cases; --",
    "../../../etc/passwd::test",
    "\x1b[31mred\x07\0\r\n",
    "\ud800 half a character",
    "",
]


def test_hostile_names_are_names(taken, query, store_problems, capsys):
    def rename(document):
        (one,) = (one for one in document["benchmarks"] if one["fullname"].endswith("test_pedantic"))
        document["benchmarks"] = [
            {**one, "fullname": name, "params": {name: name}, "extra_info": {name: [name] * 1000}} for name in HOSTILE
        ]
        document["machine_info"] = {"node": HOSTILE[4], "cpu": HOSTILE[1]}
        document["commit_info"] = {"id": HOSTILE[5], "dirty": HOSTILE[0]}

    store, status, told = taken(rename, capsys)
    assert status == 0, told.err
    assert query(store, "SELECT count(*), max(len(params)) < 3000 FROM cases WHERE status = 'ok'") == [(7, True)]
    assert store_problems(store) == []
    assert main(["report", "--store", str(store)]) == 0
    assert HOSTILE[1] not in (store / "report.html").read_text()


def test_odd_fields_are_taken_as_absent(taken, query, store_problems, capsys):
    def spoil(document):
        odd = {
            "options": 1,
            "extra_info": None,
            "params": [],
            "group": {"a": 1},
            "stats": {"data": [1e-3], "iterations": 0},
        }
        document["benchmarks"] = [{"fullname": "a", **odd}, {"fullname": "a"}, {"fullname": "b", "stats": None}]
        document |= {"machine_info": 3, "commit_info": None, "datetime": "yesterday", "version": {}}

    store, status, told = taken(spoil, capsys)
    assert status == 0, told.err
    assert [row[1] for row in query(store, ENDINGS + ", status")] == ["ok", "skipped", "skipped"]
    assert store_problems(store) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no file of pytest-benchmark"),
        ('{"benchmarks": {}}', "is no file of pytest-benchmark"),
        ('{"benchmarks": [{"fullname": 3}]}', "is no file of pytest-benchmark"),
        ('{"benchmarks": []}', "holds no benchmarks"),
    ],
)
def test_a_bad_file_is_one_sentence_and_status_2(tmp_path, capsys, text, words):
    store, status, told = take_text(text, tmp_path, capsys)
    assert (status, told.out) == (2, "")
    assert words in told.err
    assert "--benchmark-json" in told.err
    assert told.err.count("\n") == 1
    assert not store.exists()


def test_a_file_must_be_named_and_be_there(tmp_path, capsys):
    assert main(["ingest", "pytest-benchmark"]) == 2
    assert main(["ingest", "pytest-benchmark", str(tmp_path / "absent.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_ingest_alone_is_what_it_was(kept, capsys):
    assert main(["ingest", "--store", str(kept[0])]) == 0
    assert capsys.readouterr().out == "0 parts with 0 rows added\n"
    assert ingest(kept[0]).parts_added == 0


def test_values_are_kept_short():
    assert short((1, "a")) == "[1, 'a']"
    assert short(object()) == "<object object>"
    assert short("UNSERIALIZABLE[<x at 0x7f00>]") == "<x>"
    assert (short(1.5), short(True), short(None), short(float("nan"))) == (1.5, True, None, "nan")
    assert len(short(10**1000)) <= LONGEST


# ---------------------------------------------------------------------------------------------------------------------
# The gate


def test_a_gate_is_asked_for_what_can_be_gated(project):
    (project / "fake_gate.py").write_text(FAKE_GATE)
    chosen = ("-k", "not wrong and not raises", "-p", "fake_gate")
    done = session(project, "--moebench-gate", "HEAD", *chosen, "test_them.py", PYTHONPATH=str(project))
    assert done.returncode == 3, done.stdout + done.stderr
    nodeids, refused, root, base, arguments = json.loads((project / "asked.json").read_text())
    assert nodeids == [
        f"test_them.py::{name}" for name in ("test_read[1]", "test_read[3]", "test_big[big]", "test_pedantic")
    ]
    assert (root, base) == (str(project), "HEAD")
    assert arguments == [*FAST, "-p", "fake_gate"]
    reasons = {name.partition("::")[2]: reason for name, reason in refused.items()}
    assert set(reasons) == {f"test_{name}" for name in ("caught", "setup", "nothing", "generator", "unused", "skipped")}
    assert all(reason.startswith("cannot gate: ") for reason in reasons.values())
    assert "it has a setup for each round" in reasons["test_setup"]
    assert "returns nothing that both sides could be compared by" in reasons["test_nothing"]


def test_a_failed_test_is_refused_and_stays_a_failure(project):
    (project / "fake_gate.py").write_text(FAKE_GATE)
    done = session(project, "--moebench-gate=HEAD", "-k", "wrong", "-p", "fake_gate", PYTHONPATH=str(project))
    nodeids, refused, *_ = json.loads((project / "asked.json").read_text())
    assert (done.returncode, nodeids) == (1, [])
    assert refused["test_them.py::test_wrong"] == "cannot gate: the test failed in its call: assert 3 == 4"


async def coroutine():
    return 1


async def stream():
    yield 1


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (None, "never calls its benchmark fixture"),
        (Use(sum, (), {}, "teardown", 1), "a teardown for each round"),
        (Use(coroutine, (), {}, "", None), "is a coroutine"),
        (Use(print, (), {}, "", stream()), "is a generator"),
        (Use(print, (), {}, "", None), "returns nothing"),
        (Use(sum, (), {}, "", 0), ""),
    ],
)
def test_what_cannot_be_called_again_is_refused(use, words):
    assert words in refusal(use)
    assert bool(words) == bool(refusal(use))


def test_a_trial_gets_the_options_that_are_not_about_this_session():
    words = "tests/a.py -p x -k tests/a.py --cov src -x --maxfail=1 --cov --device=cpu --junitxml x.xml -m fast -o a=b"
    words += " --benchmark-json=/b.json --benchmark-autosave --log-file log.txt"
    parameters = SimpleNamespace(args=[*words.split(), "--moebench-gate", "HEAD~1", "-vv"])
    config = SimpleNamespace(invocation_params=parameters, getoption=lambda name: ["tests/a.py"])
    assert trial_arguments(config) == ["-p", "x", "--device=cpu", "-o", "a=b", "-vv"]


# ---------------------------------------------------------------------------------------------------------------------
# Trials


def trial(folder, code, **env):
    """Run ``code`` in a process of its own, as a worker would, and return what it printed after the rest."""
    preface = "from moebench.bench.pytest_trial import make_trial\nfrom pathlib import Path\nprint('begin')\n"
    done = python(folder, "-W", "error", "-c", preface + code + "\nprint('end')", **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_benchmark_with_fixtures_becomes_a_callable(project):
    code = """
trials = [make_trial(f"test_them.py::test_read[{times}]") for times in (1, 3)]
for _ in range(100):
    assert [one.run() for one in trials] == ["hello", "hello" * 3]
files = [one.run.func.__closure__[0].cell_contents for one in trials]
trials[0].close()
assert [file.exists() for file in files] == [False, False] or [file.exists() for file in files] == [False, True]
assert trials[1].run() == "hello" * 3
assert not files[0].parents[1].exists()
trials[1].close()
assert make_trial("test_them.py::test_pedantic").run() == 3
"""
    assert "end" in trial(project, code)


def test_fixtures_are_torn_down_when_a_trial_closes(project):
    code = """
import shutil
shutil.rmtree = lambda *arguments, **options: None
held = make_trial("test_them.py::test_read[1]")
(log,) = held._folder.rglob("log.txt")
assert log.read_text() == "set up"
held.close()
assert log.read_text() == "torn down"
"""
    trial(project, code)


def test_a_trial_is_one_of_suite_target(project):
    code = """
from moebench.suites.target import TargetTrial
made = TargetTrial(make_trial("test_them.py::test_read[3]", ["-q"]), "x")
assert [made.run(0) for _ in range(3)] == ["hello" * 3] * 3
made.close()
"""
    trial(project, code)


NO_TRIALS = {
    "absent.py::test_it": "unknown benchmark 'absent.py::test_it': there is no absent.py",
    "test_them.py::test_absent": "unknown benchmark 'test_them.py::test_absent': its file has no such test",
    "test_them.py::test_read": "names 2 tests; name one",
    "test_them.py::test_wrong": "does not pass on this side: AssertionError: assert 3 == 4",
    "test_them.py::test_setup": "has a setup for each round",
    "test_them.py::test_unused": "did not call its benchmark fixture",
    "test_them.py::test_skipped": "did not call its benchmark fixture",
    "broken.py::test_it": "does not pass on this side: ",
}
"""What names no benchmark that could be a trial, and words of the sentence that says so."""


@pytest.fixture(scope="module")
def no_trials(project):
    """Node id -> the line that one process tells of it, having looked for folders left over after each."""
    (project / "broken.py").write_text("import nothing_of_this_name\ndef test_it(benchmark): pass\n")
    code = f"""
import glob, tempfile
for nodeid in {list(NO_TRIALS)!r}:
    try:
        make_trial(nodeid)
    except Exception as error:
        print("told:", nodeid, type(error).__name__, error)
    assert not glob.glob(tempfile.gettempdir() + "/moebench-trial-*"), nodeid
"""
    temporary = project / "temporary"
    temporary.mkdir()
    told = [line.split(" ", 2) for line in trial(project, code, TMPDIR=str(temporary)).splitlines()]
    lines = [words[1:] for words in told if words[0] == "told:"]
    assert len(lines) == len(NO_TRIALS)
    return dict(lines)


@pytest.mark.parametrize(("nodeid", "words"), NO_TRIALS.items())
def test_what_is_no_trial_is_told_in_one_sentence(no_trials, nodeid, words):
    assert no_trials[nodeid].startswith("MoebenchError ")
    assert words in no_trials[nodeid]


def test_the_settings_of_a_project_start_no_gate_and_no_timing_in_a_trial(tmp_path):
    folder = tmp_path / "moebench"  # as the tree of moebench itself lies
    folder.mkdir()
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = --moebench-gate=nowhere --moebench-store=x --benchmark-only\n"
    )
    (folder / "test_it.py").write_text(
        "calls = []\ndef count():\n    calls.append(1)\n    return len(calls)\n"
        "def test_it(benchmark):\n    assert benchmark(count) == 1\n"
    )
    trial(tmp_path, 'held = make_trial("test_it.py::test_it")\nassert [held.run(), held.run()] == [2, 3]')
    assert {path.name for path in folder.iterdir()} <= {"pytest.ini", "test_it.py", "__pycache__", ".benchmarks"}


# ---------------------------------------------------------------------------------------------------------------------
# Our own


def test_the_micro_benchmarks_hold_and_are_no_tests(tmp_path):
    chosen = ("tests/micro", "-q", "-p", "no:cacheprovider")
    assert python(ROOT, "-m", "pytest", *chosen, "--co").returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    done = python(ROOT, "-m", "pytest", *chosen, "-o", "python_files=bench_*.py", "--benchmark-disable")
    assert done.returncode == 0, done.stdout
