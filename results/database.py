"""``<store>/moebench.duckdb``: what people query. The parts are the truth; this file can be rebuilt from them.

DuckDB lets nobody in beside a writer, so a writer opens, writes and closes, and waits with growing pauses for its
turn. Base tables are those of ``schema.TABLES``, with ``timings`` and ``metrics`` stored as ``timings_raw`` and
``metrics_raw``; see ``views.VIEWS`` for the views. ``parts`` and ``run_files`` remember what is in.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from .durable import make_folder, told_plainly
from .errors import DatabaseBusyError, ResultsError
from .faults import fault
from .migrations import migrate
from .parts import MANIFEST, RUN_FILE, inspect_part, list_parts, list_runs, read_manifest, set_aside, sha256_of
from .reading import connect_parts
from .rows import arrow_table
from .runs import read_run
from .schema import TABLES
from .views import base_table

__all__ = ["DATABASE", "IngestReport", "connect_parts", "ingest", "open_database", "rebuild"]

DATABASE = "moebench.duckdb"
LOCK_TIMEOUT_S = 60.0

BAD_DATA = (duckdb.ConversionException, duckdb.InvalidInputException, duckdb.BinderException)
"""What DuckDB raises for a file that is whole and still does not fit the tables."""

_one_writer = threading.Lock()


@dataclass
class IngestReport:
    """What an ingest did. ``set_aside`` and ``left_out`` hold one sentence for each part (or run file).

    Damaged parts are set aside; what is left out stays where it is: a newer schema, a part in a wrong place, a part
    that is not the one that was ingested under its name.
    """

    parts_added: int = 0
    rows: int = 0
    set_aside: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_database(path: Path, read_only: bool = False, timeout_s: float = LOCK_TIMEOUT_S) -> duckdb.DuckDBPyConnection:
    """Open the database file, waiting up to ``timeout_s`` seconds while another process holds it."""
    deadline, pause = time.monotonic() + timeout_s, 0.005
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only)
        except duckdb.Error as error:
            if not _is_locked(error):
                raise ResultsError(
                    f"{path} cannot be opened ({_first_line(error)}); it can be rebuilt from the parts: delete it and "
                    "ingest again."
                ) from error
            if time.monotonic() >= deadline:
                raise DatabaseBusyError(
                    f"{path} is held by another process{_holder(error)}; end it or try again later."
                ) from error
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, 0.25)


def _is_locked(error: duckdb.Error) -> bool:
    return "lock on file" in str(error) or "different configuration" in str(error)


def _holder(error: duckdb.Error) -> str:
    found = re.search(r"\(PID (\d+)\)", str(error))
    return f" ({found[1]})" if found else ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


@contextmanager
def _writing(store: Path, timeout_s: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """Give a migrated database to write to; closed at the end, with errors of DuckDB as one sentence."""
    with told_plainly(store / DATABASE):
        make_folder(store)
    with _one_writer:
        connection = open_database(store / DATABASE, timeout_s=timeout_s)
        try:
            migrate(connection)
            yield connection
        except duckdb.Error as error:
            raise ResultsError(
                f"{store / DATABASE} could not be written ({_first_line(error)}); the parts are kept: ingest again "
                "once there is room."
            ) from error
        finally:
            connection.close()


# ---------------------------------------------------------------------------------------------------------------------
# Ingesting


def ingest(store: Path, timeout_s: float = LOCK_TIMEOUT_S) -> IngestReport:
    """Bring all parts and run files of the store that are not yet in the database into it.

    Each part goes in wholly, in one transaction, and once. A damaged part is named and moved to ``<store>/corrupt``.
    """
    store = Path(store)
    if not store.is_dir():
        raise ResultsError(f"there is no store at {store}; run `moebench run` first or name another with store=.")
    with _writing(store, timeout_s) as connection:
        return _ingest_all(connection, store)


def rebuild(store: Path, timeout_s: float = LOCK_TIMEOUT_S) -> IngestReport:
    """Empty the database and ingest every part again; a file that DuckDB cannot open is deleted first."""
    store = Path(store)
    try:
        with _writing(store, timeout_s) as connection:
            connection.begin()
            for table in [*map(base_table, TABLES), "parts", "run_files"]:
                connection.execute(f'DELETE FROM "{table}"')
            connection.commit()
            return _ingest_all(connection, store)
    except ResultsError as error:
        if not isinstance(error.__cause__, duckdb.Error) or isinstance(error, DatabaseBusyError):
            raise
    with told_plainly(store / DATABASE):
        (store / f"{DATABASE}.wal").unlink(missing_ok=True)
        (store / DATABASE).unlink(missing_ok=True)
    return ingest(store, timeout_s)


def _ingest_all(connection: duckdb.DuckDBPyConnection, store: Path) -> IngestReport:
    report = IngestReport()
    known = {(run, part): sha for run, part, sha in connection.execute("FROM parts").fetchall()}
    for path in list_parts(store):
        key = (path.parent.name, path.name)
        if key not in known:
            _ingest_part(connection, path, report)
        elif sha256_of(path / MANIFEST) not in (known[key], None):
            report.left_out.append(
                f"part {'/'.join(key)} is not the one ingested under its name; rebuild the database to take it."
            )
    _refresh_runs(connection, store, report)
    return report


def _ingest_part(connection: duckdb.DuckDBPyConnection, path: Path, report: IngestReport) -> None:
    problem = inspect_part(path)
    if problem is not None:
        if not path.exists():
            return
        if problem.corrupt:
            report.set_aside.append(f"{problem.sentence} {_capital(set_aside(path))}")
        else:
            report.left_out.append(problem.sentence)
        return
    connection.begin()
    try:
        rows = _insert_part(connection, path)
    except BAD_DATA as error:
        connection.rollback()
        sentence = f"part {path.parent.name}/{path.name} does not fit the tables ({_first_line(error)})."
        report.set_aside.append(f"{sentence} {_capital(set_aside(path))}")
        return
    fault("ingest")
    connection.commit()
    fault("ingest")
    report.parts_added += 1
    report.rows += rows


def _insert_part(connection: duckdb.DuckDBPyConnection, path: Path) -> int:
    counts: dict[str, int] = read_manifest(path)["tables"]
    for table in counts:
        file = str(path / f"{table}.parquet")
        connection.execute(f'INSERT INTO "{base_table(table)}" BY NAME SELECT * FROM read_parquet(?)', [[file]])
    connection.execute("INSERT INTO parts VALUES (?, ?, ?)", [path.parent.name, path.name, sha256_of(path / MANIFEST)])
    return sum(counts.values())


def _refresh_runs(connection: duckdb.DuckDBPyConnection, store: Path, report: IngestReport) -> None:
    known = dict(connection.execute("FROM run_files").fetchall())
    for folder in list_runs(store):
        sha256 = sha256_of(folder / RUN_FILE)
        if sha256 is None or known.get(folder.name) == sha256:
            continue
        try:
            tables = read_run(folder)
        except ResultsError as error:
            report.left_out.append(str(error))
            continue
        connection.begin()
        for table, rows in tables.items():
            connection.execute(f"DELETE FROM {table} WHERE run_id = ?", [folder.name])
            connection.register("new_rows", arrow_table(table, rows))
            connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM new_rows")
            connection.unregister("new_rows")
        connection.execute("INSERT OR REPLACE INTO run_files VALUES (?, ?)", [folder.name, sha256])
        connection.commit()


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
