"""pytest plug-in: keeps what pytest-benchmark measures in a store, and gates it against another revision.

PYTEST_DONT_REWRITE: there is nothing to rewrite. Every pytest session of an environment imports this module, so it
imports nothing but pytest, and does nothing unless one of its options is given.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .pytest_trial import Use

NAME = "moebench-session"
STORE, GATE = "--moebench-store", "--moebench-gate"
PYTEST_GATE = "moebench.bench.gate.from_pytest:pytest_gate"
RAISED = ("failed", "the callable raised an exception.")
MISTAKE = 2
"""Exit status of a gate that could not begin, as that of `moebench gate`."""

DROPPED = {
    **{STORE: 1, GATE: 1, "--junitxml": 1, "--junit-xml": 1, "--cov-report": 1, "--cov-fail-under": 1},
    **{"-k": 1, "-m": 1, "--deselect": 1, "--maxfail": 1, "--durations": 1, "--basetemp": 1, "--rootdir": 1},
    **{"--lf": 0, "--last-failed": 0, "--ff": 0, "--failed-first": 0, "--nf": 0, "--new-first": 0, "--sw": 0},
    **{"--stepwise": 0, "--pdb": 0, "--trace": 0, "--cov": 1, "-x": 0, "--exitfirst": 0, "--benchmark-only": 0},
    **{"--benchmark-json": 1, "--benchmark-save": 1, "--benchmark-autosave": 0, "--benchmark-save-data": 0},
    **{"--benchmark-compare": 1, "--benchmark-compare-fail": 1, "--benchmark-storage": 1, "--benchmark-histogram": 1},
    **{"--benchmark-cprofile-dump": 1, "--log-file": 1, "--report-log": 1, "--html": 1},
}
"""Options of this session that its trials do not get, and whether a value may follow: they choose other tests, write
files, or are ours."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    group = parser.getgroup("moebench")
    group.addoption(STORE, metavar="PATH", help="keep every round of every benchmark in this store of moebench")
    group.addoption(GATE, metavar="REV", help="judge every benchmark against this git revision, taken in turns")


def pytest_configure(config: pytest.Config) -> None:
    """Look on, where an option asks for it; a session that cannot be kept or gated is refused before it begins."""
    store, base = config.getoption("moebench_store"), config.getoption("moebench_gate")
    if not store and not base:
        return
    option = STORE if store else GATE
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(f"{option} needs pytest-benchmark; pip install pytest-benchmark.")
    if _is_distributed(config):
        raise pytest.UsageError(
            f"{option} cannot be used with pytest-xdist: times of tests side by side are none; add -n0."
        )
    if store:
        config.option.benchmark_save_data = True
    elif not config.getoption("benchmark_only"):
        config.option.benchmark_disable = True  # one call shows what the gate asks for
    config.pluginmanager.register(_told_plainly(lambda: Watch(config, store, base)), NAME)


def _is_distributed(config: pytest.Config) -> bool:
    busy = config.getoption("numprocesses", None) or config.getoption("tx", None)
    return bool(busy) or config.getoption("dist", "no") != "no" or hasattr(config, "workerinput")


def _told_plainly(make: Callable[[], Watch]) -> Watch:
    from ..contracts import MoebenchError

    try:
        return make()
    except MoebenchError as error:
        raise pytest.UsageError(str(error)) from error


class Watch:
    """What one session saw: how each test used its ``benchmark`` fixture, and what failed."""

    def __init__(self, config: pytest.Config, store: str | None, base: str | None) -> None:
        from .gate.trees import commit, toplevel
        from .pytest_trial import watched
        from .store import store_path

        self.config, self.base = config, base
        self.store = store_path(store) if store else None
        self.root = toplevel(config.rootpath) if base else config.rootpath
        if base:
            commit(self.root, base)
        self.items: dict[str, pytest.Item] = {}
        self.ended: dict[str, tuple[str, str]] = {}
        self.uses: dict[str, Use] = {}
        self.said: list[str] = []
        self._patched = ExitStack()
        self._patched.enter_context(watched(self.uses.__setitem__))

    def pytest_unconfigure(self) -> None:
        """Leave pytest-benchmark as it was."""
        self._patched.close()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Remember how a test that has the fixture ended, if not well; a failure counts more than a skip."""
        report = yield
        if "benchmark" in getattr(item, "fixturenames", ()):
            self.items[item.nodeid] = item
            known = self.ended.get(item.nodeid, ("", ""))[0]
            if report.failed and known != "failed":
                what = call.excinfo.exconly(tryshort=True) if call.excinfo else str(report.longrepr)
                first = next(iter(what.splitlines()), "no message")
                self.ended[item.nodeid] = ("failed", f"the test failed in its {report.when}: {first}")
            elif report.skipped and not known:
                self.ended[item.nodeid] = (
                    "skipped",
                    "the test was skipped, or expected to fail; what it timed is not kept.",
                )
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Keep the times, then gate, unless the session was broken off."""
        broken_off = exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if broken_off or self.config.getoption("collectonly"):
            return
        if not self.items:
            self.said.append("moebench: no test used the `benchmark` fixture; choose tests that do.")
            session.exitstatus = exitstatus or MISTAKE
            return
        status = self._guarded(self._keep) if self.store else 0
        if self.base:
            status = self._guarded(self._gate) or status
        if status and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = status

    def _guarded(self, step: Callable[[], int]) -> int:
        """Return the status of a step; its mistakes are told in one sentence."""
        from ..contracts import MoebenchError
        from ..results.errors import ResultsError

        try:
            return step()
        except (MoebenchError, ResultsError) as error:
            self.said.append(f"moebench: {error}")
            return MISTAKE

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what became of the session's benchmarks."""
        for sentence in self.said:
            terminalreporter.write_line(sentence)

    # -----------------------------------------------------------------------------------------------------------------
    # Keeping

    def _keep(self) -> int:
        from ..results.database import ingest
        from . import pytest_results

        document, ended = self._document()
        if self.store is None or not document["benchmarks"]:
            self.said.append(
                "moebench: no benchmark was timed, so nothing was kept; drop --benchmark-disable and skips."
            )
            return MISTAKE
        command = shlex.join(["pytest", *map(str, self.config.invocation_params.args)])
        run_id = pytest_results.store_results(self.store, document, command, ended, provenance_here())
        ingest(self.store)
        self.said.append(f"moebench: kept as run {run_id} in {self.store}")
        return 0

    def _document(self) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
        """Return what --benchmark-json would write, with all raw data, and the benchmarks that may have no times.

        Facts of the machine are our own. What failed is in the document too, timed or not.
        """
        session, hook = vars(self.config)["_benchmarksession"], self.config.hook
        raised = {name: RAISED for name, use in self.uses.items() if isinstance(use.result, Exception)}
        timed = [one for one in session.benchmarks if one]
        commit = hook.pytest_benchmark_generate_commit_info(config=self.config)
        hook.pytest_benchmark_update_commit_info(config=self.config, commit_info=commit)
        document: dict[str, Any] = hook.pytest_benchmark_generate_json(
            config=self.config, benchmarks=timed, include_data=True, machine_info={}, commit_info=commit
        )
        hook.pytest_benchmark_update_json(config=self.config, benchmarks=timed, output_json=document)
        ended = {**raised, **self.ended}
        there = {one["fullname"] for one in document["benchmarks"]}
        failed = [name for name, (status, _) in ended.items() if status == "failed" and name not in there]
        document["benchmarks"] += [{"fullname": name, "params": _params(self.items[name])} for name in failed]
        return document, ended

    # -----------------------------------------------------------------------------------------------------------------
    # Gating

    def _gate(self) -> int:
        from ..contracts import load_attribute

        refused = {self._name(nodeid): reason for nodeid, reason in self._refusals()}
        nodeids = [name for name in map(self._name, self.items) if name not in refused]
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None:
            reporter.write("\n")  # the line of dots is still open
        arguments = trial_arguments(self.config)
        status: int = load_attribute(PYTEST_GATE)(nodeids, refused, self.root, self.base, arguments)
        return status

    def _refusals(self) -> Iterator[tuple[str, str]]:
        for nodeid, item in self.items.items():
            if not item.path.is_relative_to(self.root):
                yield nodeid, f"cannot gate: its file lies outside of {self.root}; move it into the repository."
            elif nodeid in self.ended:
                yield nodeid, f"cannot gate: {self.ended[nodeid][1]}"
            elif reason := refusal(self.uses.get(nodeid)):
                yield nodeid, f"cannot gate: {reason}"

    def _name(self, nodeid: str) -> str:
        """Return the id with its file named from the root of the repository, where both sides find it."""
        path = self.items[nodeid].path
        file = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        return f"{file.as_posix()}::{nodeid.partition('::')[2]}"


def _params(item: pytest.Item) -> Mapping[str, Any]:
    """Return the parameters of a test, as its benchmark fixture would tell them."""
    found: Mapping[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return found


def refusal(use: Use | None) -> str:
    """Return why what a test did with its fixture cannot be called again and again, or an empty string."""
    if use is None:
        return "the test never calls its benchmark fixture; call it, or take the fixture out."
    if isinstance(use.result, Exception):
        return "the callable raises an exception; gate what returns."
    if use.each_round:
        what = use.each_round
        return f"it has a {what} for each round, which a turn has no place for; let every call start from equal state."
    if inspect.iscoroutine(use.result) or inspect.iscoroutinefunction(use.function):
        return "the callable is a coroutine, which does nothing until it is awaited; call asyncio.run inside of it."
    if inspect.isgenerator(use.result) or inspect.isasyncgen(use.result):
        return "the callable is a generator, which does nothing until it is consumed; return list(...) of it."
    if use.result is None:
        return "the callable returns nothing that both sides could be compared by; return its result."
    return ""


def trial_arguments(config: pytest.Config) -> list[str]:
    """Return the arguments of this session that its trials need too: not its tests, nor what ``DROPPED`` names."""
    tests, kept, value_follows = set(config.getoption("file_or_dir") or ()), [], False
    for word in map(str, config.invocation_params.args):
        name, has_value, _ = word.partition("=")
        is_value = value_follows and not word.startswith("-")
        value_follows = not has_value and bool(DROPPED.get(name))
        if not is_value and name not in DROPPED and word not in tests:
            kept.append(word)
    return kept


def provenance_here() -> dict[str, Any]:
    """Return the fields of ``run.json`` that say what this machine and these sources are."""
    from . import host

    facts, installed = host.host_facts(), host.packages()
    stable, names = facts["stable"], (*host.PACKAGES, "pytest", "pytest-benchmark")
    return {
        "host_key": facts["host_key"],
        "packages": {name: installed[name] for name in names if name in installed},
        "host": {
            **{name: stable[name] for name in ("cpu", "cores", "memory_bytes")},
            "facts": {**stable, **facts["snapshot"]},
        },
    }
