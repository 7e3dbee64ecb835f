"""A benchmark of pytest-benchmark as a trial: its callable with its arguments, while its fixtures stay alive.

``make_trial`` runs pytest in this process for one test, which calls its benchmark once and so passes its own
assertions, and then keeps all fixtures as they are. What a ``with`` inside the test's own body sets up has ended by
then: fixtures and the callable itself are the places for that.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..contracts import MoebenchError

OURS = "moebench"
"""The folder in which a side that is moebench itself has its tree."""


@dataclass(frozen=True)
class Use:
    """How a test used its fixture; ``each_round`` names what it has before or after every round, if anything.

    ``result`` is what the callable returned, or the exception that came out of it.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    each_round: str
    result: Any


@contextmanager
def watched(tell: Callable[[str, Use], None]) -> Iterator[None]:
    """Tell (full name, use) of every benchmark that is called inside the context; they run as ever."""
    fixture = importlib.import_module("pytest_benchmark.fixture").BenchmarkFixture
    plain, pedantic = fixture.__call__, fixture.pedantic

    @functools.wraps(plain)
    def call(self: Any, function_to_benchmark: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            return plain(self, function_to_benchmark, *args, **kwargs)

        return _told(run, lambda result: tell(self.fullname, Use(function_to_benchmark, args, kwargs, "", result)))

    @functools.wraps(pedantic)
    def call_pedantic(self: Any, target: Any, args: Any = (), kwargs: Any = None, *rest: Any, **options: Any) -> Any:
        def run() -> Any:
            return pedantic(self, target, args, kwargs, *rest, **options)

        given = dict(zip(("setup", "teardown"), rest, strict=False)) | options
        each_round = next((name for name in ("setup", "teardown") if given.get(name) is not None), "")
        use = functools.partial(Use, target, tuple(args), dict(kwargs or {}), each_round)
        return _told(run, lambda result: tell(self.fullname, use(result)))

    fixture.__call__, fixture.pedantic = call, call_pedantic
    try:
        yield
    finally:
        fixture.__call__, fixture.pedantic = plain, pedantic


def _told(run: Callable[[], Any], tell: Callable[[Any], None]) -> Any:
    try:
        result = run()
    except Exception as error:
        tell(error)
        raise
    tell(result)
    return result


def make_trial(nodeid: str, arguments: Sequence[str] = ()) -> PytestTrial:
    """Return the trial of one benchmark, ``path/from/the/root.py::test_name[parameters]``, of the tree in which we are.

    ``arguments`` are pytest's. The process stays in the root of the tree. A test that is not there is "unknown".
    """
    file = nodeid.partition("::")[0]
    root = next((one for one in (Path.cwd(), Path.cwd() / OURS) if (one / file).is_file()), None)
    if root is None:
        raise MoebenchError(f"unknown benchmark '{nodeid}': there is no {file} in {Path.cwd()}.")
    os.chdir(root)
    return PytestTrial(nodeid, arguments)


class PytestTrial:
    """One benchmark made ready. ``run()`` calls it and returns its result; ``close`` tears its fixtures down."""

    run: Callable[[], Any]

    def __init__(self, nodeid: str, arguments: Sequence[str] = ()) -> None:
        self.nodeid = nodeid
        self._folder = Path(tempfile.mkdtemp(prefix="moebench-trial-"))
        self._held = Held()
        own = [f"--basetemp={self._folder / 'tmp'}", "-o", f"cache_dir={self._folder / 'cache'}", "-q"]
        own += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        uses: list[Use] = []
        try:
            with watched(lambda name, use: uses.append(use)):
                pytest.main([*arguments, *own, nodeid], plugins=[self._held])
            self.run = self._callable(uses)
        except BaseException:
            with suppress(Exception):  # what went wrong first is what is told
                self.close()
            raise

    def _callable(self, uses: Sequence[Use]) -> Callable[[], Any]:
        held = self._held
        if held.failures:
            raise MoebenchError(f"{self.nodeid} does not pass on this side: {held.failures[0]}.")
        if held.count == 0:
            raise MoebenchError(f"unknown benchmark '{self.nodeid}': its file has no such test.")
        if held.count > 1:
            raise MoebenchError(f"{self.nodeid} names {held.count} tests; name one, with its parameters.")
        if not uses:
            raise MoebenchError(
                f"{self.nodeid} did not call its benchmark fixture on this side; it may be skipped here."
            )
        if isinstance(uses[0].result, Exception):
            raise MoebenchError(
                f"{self.nodeid} calls what raises {type(uses[0].result).__name__} here; it has no time."
            )
        if uses[0].each_round:
            raise MoebenchError(f"{self.nodeid} has a {uses[0].each_round} for each round here; it cannot be gated.")
        return functools.partial(uses[0].function, *uses[0].args, **uses[0].kwargs)

    def close(self) -> None:
        """Tear the fixtures down and remove their files."""
        try:
            self._held.tear_down()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


class Held:
    """The plug-in of a trial's session: runs the one test that was collected and tears nothing down."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.count = 0
        self._finish: Callable[[], None] | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Whatever the project's own settings say: nothing is timed, nothing is kept, and no gate begins here."""
        config.option.benchmark_disable, config.option.benchmark_only = True, False
        config.option.benchmark_enable = config.option.benchmark_skip = False
        config.option.moebench_store = config.option.moebench_gate = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the test as if it were to come again, so that its fixtures stay, and take the teardown out of the end."""
        self.count = len(session.items)
        if self.count == 1:
            manager = session.config.pluginmanager
            runner = manager.getplugin("runner")
            item = session.items[0]
            item.ihook.pytest_runtest_protocol(item=item, nextitem=item)
            manager.unregister(runner)
            self._finish = functools.partial(runner.pytest_sessionfinish, session)
        return True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember what could not be collected."""
        if report.failed:
            self.failures.append(_last_line(report.longreprtext))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Remember what failed."""
        report = yield
        if report.failed:
            told = call.excinfo.exconly().partition("\n")[0] if call.excinfo else report.longreprtext
            self.failures.append(_last_line(told))
        return report

    def tear_down(self) -> None:
        """Do what the end of the session left out."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else "no message"
