"""Fixtures: the builder of made-up results, a store with everything in it, and its page."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from moebench.dashboards.report import write_report
from moebench.results.database import connect_parts


@pytest.fixture(scope="session")
def build():
    """The module build.py, which stands beside this file and in no package."""
    spec = importlib.util.spec_from_file_location("dashboards_build", Path(__file__).with_name("build.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def store(build, tmp_path_factory):
    return build.full_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def connection(store):
    opened = connect_parts(store)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def page(store, tmp_path_factory):
    """The path of the page of the full store."""
    return write_report(store, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(build, tmp_path):
    """Return a function that gives a fresh builder, and one that writes and opens what it built."""
    connections = []

    def open_store(run):
        connections.append(connect_parts(run.write()))
        return connections[-1]

    yield lambda **kwargs: build.Builder(tmp_path / "store", **kwargs), open_store
    for one in connections:
        one.close()
