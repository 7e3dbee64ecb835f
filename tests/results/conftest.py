import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.results.database import DATABASE, connect_parts, open_database
from moebench.results.schema import TABLES
from moebench.results.views import VIEWS, base_table

SITTING = Path(__file__).with_name("sitting.py")


@pytest.fixture(scope="session")
def sitting():
    """The functions of sitting.py, and ``start(store, run_id)``, which runs it as a process of its own."""

    def start(store, run_id, fault=None, parts="g1,g2,g3"):
        env = {**os.environ, "MOEBENCH_FAULT": fault or ""}
        return subprocess.Popen(
            [sys.executable, str(SITTING), str(store), run_id, parts],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return SimpleNamespace(**runpy.run_path(str(SITTING)), start=start)


def content(connection):
    """Everything in a connection: each table and view as a sorted list of rows."""
    names = [*map(base_table, TABLES), *VIEWS, "parts"]
    return {name: sorted(map(repr, connection.execute(f'FROM "{name}"').fetchall())) for name in names}


@pytest.fixture(scope="session")
def dump():
    """Return the content of a store through its database file."""

    def dump_store(store):
        connection = open_database(Path(store) / DATABASE, read_only=True)
        try:
            return content(connection)
        finally:
            connection.close()

    return dump_store


@pytest.fixture(scope="session")
def dump_parts():
    """Return the content of a store through its Parquet files."""

    def dump_store(store):
        connection = connect_parts(Path(store))
        try:
            return content(connection)
        finally:
            connection.close()

    return dump_store
