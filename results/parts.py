"""Parts: the truth of a store. A part is one finished group, in a folder that appears at once or not at all.

Layout: ``<store>/runs/<run_id>/run.json`` and ``<store>/runs/<run_id>/<part>/`` with one Parquet file per table that
has rows, ``blobs/<sha256>`` and ``manifest.json`` (schema version, row counts, size and sha256 of every file, and a
checksum of the manifest itself). A part is written as ``.tmp-<part>-<host>-<pid>``, synced and renamed once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .durable import (
    aside_name,
    make_folder,
    remove_leftovers,
    rename,
    sync_folder,
    told_plainly,
    write_file,
    write_json_atomic,
)
from .errors import ResultsError
from .rows import arrow_schema, arrow_table
from .schema import SCHEMA_VERSION, TABLES

__all__ = [
    "Problem",
    "blob_row",
    "inspect_part",
    "list_parts",
    "list_runs",
    "read_manifest",
    "set_aside",
    "sha256_of",
    "verify_part",
    "write_json_atomic",
    "write_part",
]

FAKES_ALLOWED = "MOEBENCH_FAKE_GPU"
"""Set in tests alone: rows measured beside a stand-in for a GPU's driver may be written."""

MANIFEST = "manifest.json"
RUN_FILE = "run.json"
RUN_TABLES = ("runs", "hosts")
"""The tables whose rows come from ``run.json``, never from a part."""


@dataclass(frozen=True)
class Problem:
    """Why a part cannot be read; a damaged one is set aside, one of a newer schema is left where it is."""

    sentence: str
    corrupt: bool


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_part(
    folder: Path,
    name: str,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    blobs: Mapping[str, bytes] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Write the part ``<folder>/<name>`` and return its path; ``folder`` is ``<store>/runs/<run_id>``.

    ``blobs`` maps names to contents; table ``blobs`` must have a row for each (see ``blob_row``). ``manifest`` adds
    keys to the manifest. A part of this name that is there already stays, and the new one is discarded, unless the one
    that is there is damaged: then it is set aside first.
    """
    _refuse_fakes(tables)
    if not name or name.startswith(".") or "/" in name:
        raise ResultsError(f"'{name}' cannot name a part; use the key of its group.")
    files = dict(_contents(tables, blobs or {}))
    counts = {table: len(rows) for table, rows in tables.items() if rows}
    target, aside = folder / name, folder / aside_name(name)
    with told_plainly(target):
        make_folder(folder)
        remove_leftovers(folder)
        try:
            _write_folder(aside, files, _manifest(folder.name, name, counts, files, manifest or {}))
            _publish(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def _refuse_fakes(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse rows that were measured beside a stand-in for a GPU's driver, unless a test asks for them."""
    if os.environ.get(FAKES_ALLOWED):
        return
    for row in tables.get("cases", ()):
        executed = row.get("executed") or ""
        if '"fake"' in executed and (json.loads(executed).get("device") or {}).get("source") == "fake":
            raise ResultsError(
                f"case {row['case_key'][:12]} was measured beside a library that stands in for the GPU's driver; take "
                f"it out of LD_LIBRARY_PATH (a test sets {FAKES_ALLOWED})."
            )


def blob_row(run_id: str, case_key: str, name: str, content: bytes) -> dict[str, Any]:
    """Return the row of table ``blobs`` for ``content``."""
    sha256 = hashlib.sha256(content).hexdigest()
    return {"run_id": run_id, "case_key": case_key, "name": name, "sha256": sha256, "bytes": len(content)}


def _contents(
    tables: Mapping[str, Sequence[Mapping[str, Any]]], blobs: Mapping[str, bytes]
) -> Iterator[tuple[str, bytes]]:
    for table, rows in tables.items():
        if table in RUN_TABLES:
            raise ResultsError(f"table '{table}' does not belong in a part; write its fields to {RUN_FILE}.")
        if rows:
            sink = io.BytesIO()
            pq.write_table(arrow_table(table, rows), sink, compression="zstd")
            yield f"{table}.parquet", sink.getvalue()
    by_sha256 = {hashlib.sha256(content).hexdigest(): content for content in blobs.values()}
    if set(by_sha256) != {row["sha256"] for row in tables.get("blobs", ())}:
        raise ResultsError("table 'blobs' and the blobs given do not match; make one row with blob_row for each.")
    for sha256, content in by_sha256.items():
        yield f"blobs/{sha256}", content


def _manifest(
    run_id: str, name: str, counts: Mapping[str, int], files: Mapping[str, bytes], extra: Mapping[str, Any]
) -> bytes:
    own = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "name": name,
        "tables": counts,
        "files": {
            file: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for file, content in files.items()
        },
    }
    clash = {key for key in {*own, "checksum"} & set(extra) if own.get(key) != extra[key]}
    if clash:
        raise ResultsError(f"the manifest's key '{min(clash)}' is set by write_part; use another name.")
    values = json.loads(json.dumps({**extra, **own}))
    return json.dumps({**values, "checksum": _checksum(values)}, indent=1).encode() + b"\n"


def _checksum(manifest: Mapping[str, Any]) -> str:
    values = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write_folder(aside: Path, files: Mapping[str, bytes], manifest: bytes) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    if any(file.startswith("blobs/") for file in files):
        (aside / "blobs").mkdir()
    for file, content in files.items():
        write_file(aside / file, content)
    if (aside / "blobs").is_dir():
        sync_folder(aside / "blobs")
    write_file(aside / MANIFEST, manifest)
    sync_folder(aside)


def _publish(aside: Path, target: Path) -> None:
    """Rename once; where another writer was first, its part stays unless it is damaged."""
    if target.exists() and not _give_way(target):
        return
    try:
        rename(aside, target)
    except OSError:
        if not target.is_dir():
            raise


def _give_way(target: Path) -> bool:
    problem = inspect_part(target)
    if problem is None or not problem.corrupt:
        return False
    set_aside(target)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def list_runs(store: Path) -> list[Path]:
    """Return the folders of all runs in the store, by name."""
    return _folders(Path(store) / "runs")


def list_parts(store: Path) -> list[Path]:
    """Return all finished parts in the store, by run and name; whole or damaged, but never one being written."""
    return [part for run in list_runs(store) for part in _folders(run) if _looks_like_part(part)]


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _looks_like_part(path: Path) -> bool:
    return (path / MANIFEST).exists() or any(path.glob("*.parquet"))


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the part at ``path``, or raise one sentence where it is missing or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ResultsError(f"part {_name(path)} has no {MANIFEST}.") from None
    except (OSError, ValueError) as error:
        raise ResultsError(f"part {_name(path)} has an unreadable {MANIFEST} ({error}).") from None
    if not isinstance(manifest, dict) or manifest.get("checksum") != _checksum(manifest):
        raise ResultsError(f"part {_name(path)} has a {MANIFEST} that does not match its own checksum.")
    return manifest


def verify_part(path: Path) -> str | None:
    """Return why the part at ``path`` cannot be read, in one sentence, or None where it is whole."""
    problem = inspect_part(path)
    return None if problem is None else problem.sentence


def inspect_part(path: Path) -> Problem | None:
    """Return what is wrong with the part at ``path``: checksums, schema version, columns; None where it is whole."""
    try:
        manifest = read_manifest(path)
        version = manifest["schema_version"]
        if version > SCHEMA_VERSION:
            return Problem(_too_new(path, version), corrupt=False)
        if (manifest["run_id"], manifest["name"]) != (path.parent.name, path.name):
            wrong = f"part {_name(path)} says it is {manifest['run_id']}/{manifest['name']}; move it back."
            return Problem(wrong, corrupt=False)
        _check_files(path, manifest["files"])
        _check_tables(path, manifest["tables"])
    except (ResultsError, OSError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        sentence = str(error) if isinstance(error, ResultsError) else f"part {_name(path)} is damaged: {error}."
        return Problem(sentence, corrupt=True)
    return None


def _too_new(path: Path, version: int) -> str:
    return (
        f"part {_name(path)} has schema version {version} and this moebench knows {SCHEMA_VERSION} and older: "
        "install a newer moebench to read it."
    )


def _check_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for file, facts in files.items():
        try:
            content = (path / file).read_bytes()
        except FileNotFoundError:
            raise ResultsError(f"part {_name(path)} is damaged: {file} is missing.") from None
        if len(content) != facts["bytes"]:
            raise ResultsError(f"part {_name(path)} is damaged: {file} has {len(content)} bytes, not {facts['bytes']}.")
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise ResultsError(f"part {_name(path)} is damaged: {file} does not match its sha256.")


def _check_tables(path: Path, counts: Mapping[str, int]) -> None:
    for table, count in counts.items():
        if table not in TABLES or table in RUN_TABLES:
            raise ResultsError(f"part {_name(path)} is damaged: a part has no table '{table}'.")
        with pq.ParquetFile(path / f"{table}.parquet") as file:
            found, rows = file.schema_arrow, file.metadata.num_rows
        wrong = _wrong_columns(found, arrow_schema(table))
        if wrong or rows != count:
            what = f"column '{wrong[0]}' is not of the schema" if wrong else f"it has {rows} rows, not {count}"
            raise ResultsError(f"part {_name(path)} is damaged: in {table}.parquet {what}.")


def _wrong_columns(found: pa.Schema, wanted: pa.Schema) -> list[str]:
    return [f.name for f in found if f.name not in wanted.names or not f.type.equals(wanted.field(f.name).type)]


def set_aside(path: Path) -> str:
    """Move the part ``<store>/runs/<run_id>/<part>`` to ``<store>/corrupt/<run_id>/<part>`` and say so."""
    store, run_id = path.parents[2], path.parent.name
    home = store / "corrupt" / run_id
    with told_plainly(home):
        make_folder(home)
        place = next(place for place in _places(home, path.name) if not place.exists())
        try:
            os.rename(path, place)
        except FileNotFoundError:
            return f"part {_name(path)} was set aside by another process."
        sync_folder(path.parent)
        sync_folder(home)
    return f"part {_name(path)} was set aside as {place.relative_to(store)}."


def sha256_of(path: Path) -> str | None:
    """Return the sha256 of a file, or None where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _places(home: Path, name: str) -> Iterable[Path]:
    yield home / name
    yield from (home / f"{name}.{number}" for number in range(2, 10_000))


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
