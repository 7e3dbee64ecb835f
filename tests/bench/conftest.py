"""Real runs for the tests of the engine.

They run on a copy of the package: an edit of the sources while the tests run would change every plan hash.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import moebench
from moebench.contracts import Case, Choice, Evidence
from moebench.results.database import DATABASE, connect_parts, open_database
from moebench.results.integrity import problems

SMALL = (
    "suite=selftest",
    "axes.routing=topk",
    "axes.backend=[eager,reference]",
    "engine.seconds=0.02",
    "engine.warmup_seconds=0.02",
)
"""The smallest honest run; one group for each value of axes.tokens."""


@dataclass
class Engine:
    """Starts ``moebench`` as real processes of a package copy."""

    package: Path
    cache: Path
    environment: dict[str, str] = field(default_factory=dict)

    def env(self, store: Path, **more: str) -> dict[str, str]:
        own = {"PYTHONPATH": str(self.package), "MOEBENCH_CACHE": str(self.cache), "MOEBENCH_STORE": str(store)}
        return {**os.environ, **own, **self.environment, **more}

    def start(self, store: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "moebench.bench", *arguments],
            env=self.env(store, **env),
            cwd=self.cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, store: Path, *arguments: str, timeout: float = 180, **env: str):
        """Run to the end and return the completed process."""
        with self.start(store, *arguments, **env) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def copy_package(target: Path) -> Path:
    """Copy the package to ``target/moebench`` and return ``target``."""
    source = Path(moebench.__file__).resolve().parent
    ignore = shutil.ignore_patterns("__pycache__", "runs", "*.duckdb*", "*.html")
    for folder in [path.parent for path in source.glob("*/__init__.py")]:
        shutil.copytree(folder, target / "moebench" / folder.name, ignore=ignore)
    for file in source.glob("*.py"):
        shutil.copy(file, target / "moebench" / file.name)
    return target


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """Call it with a store and arguments to run ``moebench`` as a real process."""
    return Engine(copy_package(tmp_path_factory.mktemp("package")), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="session")
def finished(engine, small, tmp_path_factory):
    """Return (store, settings, completed process) of a finished run of one case; copy the store to change it."""
    store, settings = tmp_path_factory.mktemp("finished"), (*small, "axes.backend=eager")
    return store, settings, engine(store, "run", "--quiet", *settings)


@pytest.fixture
def finished_copy(finished, tmp_path):
    """Return (a copy of the store of ``finished``, its settings)."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy")), finished[1]


@pytest.fixture(scope="session")
def query():
    """Return the rows of a query over the parts of a store, or over its database file."""

    def run(store, sql, database=False):
        connection = open_database(store / DATABASE, read_only=True) if database else connect_parts(store)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    return run


@pytest.fixture(scope="session")
def store_problems():
    """Return what ``results.integrity`` finds in a store, through its parts and through its database file."""

    def find(store):
        found = []
        for connection in (connect_parts(store), open_database(store / DATABASE, read_only=True)):
            found += problems(connection)
            connection.close()
        return found

    return find


@pytest.fixture(scope="session")
def case():
    """Return a Case of the smallest model on eager, with some fields replaced."""

    def make(**changes):
        named = {axis: Choice("none") for axis in ("structure", "quantization", "sparsity")}
        values = {
            **{"suite": "selftest", "suite_version": "1", "protocol": "timed", "layers": (2,), "tokens": 32},
            **{"model": Choice("tiny"), "routing": Choice("topk"), "backend": Choice("eager"), **named},
            **{"traffic": Choice("gaussian"), "dtype": "float32", "pass_": "forward", "boundary": "topk"},
            **{"threads": 1, "device": "cpu", "residency": "warm", "evidence": Evidence.MEASURED_CPU},
            **{"seed": 0, "weights_sha256": "0" * 64},
        }
        return Case(**{**values, **changes})

    return make
