"""Numbered migrations of the database file, each in one transaction with the version that it leads to."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import duckdb

from .errors import ResultsError
from .views import create_views, views_sha256


def load_migrations() -> tuple[str, ...]:
    """Return the SQL of all migrations; number n leads from schema version n - 1 to n."""
    folder = resources.files(__package__)
    names = sorted(
        (item.name for item in folder.iterdir() if item.name.startswith("migration_")),
        key=lambda name: int(name.removeprefix("migration_").removesuffix(".sql")),
    )
    return tuple(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def version_of(connection: duckdb.DuckDBPyConnection) -> int:
    """Return the schema version of a database; 0 for an empty one."""
    return _meta(connection)[0]


def is_current(connection: duckdb.DuckDBPyConnection) -> bool:
    """Tell whether a database has the tables and views of this moebench; a newer schema is refused."""
    version, views = _meta(connection)
    newest = len(load_migrations())
    _refuse_newer(version, newest)
    return (version, views) == (newest, views_sha256())


def migrate(connection: duckdb.DuckDBPyConnection, migrations: Sequence[str] | None = None) -> int:
    """Bring a database to the newest schema and return its version; a step that fails leaves the version before it."""
    steps = load_migrations() if migrations is None else tuple(migrations)
    version, views = _meta(connection)
    _refuse_newer(version, len(steps))
    for number in range(version + 1, len(steps) + 1):
        _in_transaction(connection, [steps[number - 1], *_record(number, None)], f"migration {number}")
    if (version, views) != (len(steps), views_sha256()):
        connection.begin()
        create_views(connection)
        for statement in _record(len(steps), views_sha256()):
            connection.execute(statement)
        connection.commit()
    return len(steps)


def _refuse_newer(version: int, newest: int) -> None:
    if version > newest:
        raise ResultsError(
            f"the database has schema version {version} and this moebench knows {newest} and older: "
            "install a newer moebench to open it."
        )


def _meta(connection: duckdb.DuckDBPyConnection) -> tuple[int, str | None]:
    exists = connection.execute(
        "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'main' AND table_name = 'meta'"
    ).fetchone()
    if not exists or not exists[0]:
        return 0, None
    row = connection.execute("SELECT schema_version, views FROM meta").fetchone()
    return (int(row[0]), row[1]) if row else (0, None)


def _record(version: int, views: str | None) -> list[str]:
    digest = "NULL" if views is None else f"'{views}'"
    return [
        "CREATE TABLE IF NOT EXISTS meta (schema_version INTEGER, views VARCHAR)",
        "DELETE FROM meta",
        f"INSERT INTO meta VALUES ({version:d}, {digest})",
    ]


def _in_transaction(connection: duckdb.DuckDBPyConnection, statements: Sequence[str], what: str) -> None:
    connection.begin()
    try:
        for statement in statements:
            connection.execute(statement)
    except duckdb.Error as error:
        connection.rollback()
        reason = str(error).splitlines()[0]
        raise ResultsError(f"{what} of the database failed and was undone ({reason}); rebuild the database.") from error
    connection.commit()
