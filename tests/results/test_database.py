import json
import os
import shutil

import duckdb
import pytest

from moebench.results import parts as parts_module
from moebench.results.database import DATABASE, connect_parts, ingest, open_database, rebuild
from moebench.results.errors import ResultsError
from moebench.results.migrations import load_migrations, migrate, version_of
from moebench.results.parts import list_parts, read_manifest, write_json_atomic, write_part
from moebench.results.query import run_sql
from moebench.results.rows import arrow_schema
from moebench.results.schema import SCHEMA_VERSION, TABLES
from moebench.results.views import VIEWS, base_table


def query(store, sql, *params):
    connection = connect_parts(store)
    try:
        return connection.execute(sql, params).fetchall()
    finally:
        connection.close()


def test_ingest_is_incremental_and_idempotent(sitting, dump, dump_parts, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    first = ingest(tmp_path)
    assert (first.parts_added, first.rows, first.set_aside, first.left_out) == (1, 8, [], [])
    sitting.write_run(tmp_path, "r1", ["g1", "g2"])
    assert ingest(tmp_path).parts_added == 1
    assert ingest(tmp_path).rows == 0
    assert dump(tmp_path) == dump_parts(tmp_path)


def test_rebuild_gives_the_same_content(sitting, dump, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1", "g2"])
    sitting.write_run(tmp_path, "r2", ["g1"])
    ingest(tmp_path)
    before = dump(tmp_path)
    assert rebuild(tmp_path).parts_added == 3
    assert dump(tmp_path) == before


def test_parquet_and_duckdb_hold_exactly_the_same_values(sitting, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    ingest(tmp_path)
    part = list_parts(tmp_path)[0]
    connection = open_database(tmp_path / DATABASE, read_only=True)
    for table in read_manifest(part)["tables"]:
        back = connection.sql(f'FROM "{base_table(table)}"').to_arrow_table().cast(arrow_schema(table))
        assert back.equals(parts_module.pq.read_table(part / f"{table}.parquet"))
    connection.close()


def test_run_json_is_refreshed_when_it_changes(sitting, dump, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    ingest(tmp_path)
    path = tmp_path / "runs" / "r1" / "run.json"
    values = json.loads(path.read_text())
    write_json_atomic(path, {**values, "status": "interrupted", "engine's own": 1})
    ingest(tmp_path)
    sql = "SELECT run_id, status, packages->>'torch', host_key, git_dirty FROM runs"
    assert query(tmp_path, sql) == [("r1", "interrupted", "2", "h", True)]
    assert query(tmp_path, "SELECT run_id, host_key, cores FROM hosts") == [("r1", "h", 2)]
    assert len(dump(tmp_path)["runs"]) == len(dump(tmp_path)["hosts"]) == 1
    assert "interrupted" in dump(tmp_path)["runs"][0]


@pytest.mark.parametrize("text", ["{", "[]", '{"started_at": "soon"}', '{"git_dirty": "maybe"}', '{"host": 3}'])
def test_a_damaged_run_json_is_named_and_its_parts_are_read(text, sitting, dump, dump_parts, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    (tmp_path / "runs" / "r1" / "run.json").write_text(text)
    report = ingest(tmp_path)
    assert report.parts_added == 1
    assert len(report.left_out) == 1
    assert report.left_out[0].startswith("r1/run.json is damaged (")
    assert dump(tmp_path) == dump_parts(tmp_path)


@pytest.mark.parametrize(
    "harm",
    [
        lambda part: os.truncate(part / "timings.parquet", 99),
        lambda part: (part / "manifest.json").write_text("{"),
        lambda part: (part / "cases.parquet").unlink(),
    ],
)
def test_a_damaged_part_is_named_and_set_aside_and_the_others_are_ingested(harm, sitting, dump, dump_parts, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1", "g2", "g3"])
    harm(tmp_path / "runs" / "r1" / "g2")
    damaged = {file.name: file.read_bytes() for file in (tmp_path / "runs" / "r1" / "g2").glob("*.*")}
    assert len(query(tmp_path, "FROM parts")) == 2
    assert query(tmp_path, "SELECT path FROM left_out") == [(str(tmp_path / "runs" / "r1" / "g2"),)]
    report = ingest(tmp_path)
    assert report.parts_added == 2
    assert len(report.set_aside) == 1
    assert report.set_aside[0].startswith("part r1/g2 ")
    assert report.set_aside[0].endswith("Part r1/g2 was set aside as corrupt/r1/g2.")
    assert {file.name: file.read_bytes() for file in (tmp_path / "corrupt" / "r1" / "g2").glob("*.*")} == damaged
    assert dump(tmp_path) == dump_parts(tmp_path)
    assert ingest(tmp_path).set_aside == []


def test_a_part_that_fits_the_checks_but_not_the_tables_is_set_aside(sitting, dump, tmp_path, monkeypatch):
    sitting.write_run(tmp_path, "r1", ["g1"])
    monkeypatch.setitem(parts_module.arrow_table.__globals__["_CONVERTERS"], "JSON", str)
    write_part(tmp_path / "runs" / "r1", "bad", {"cases": [{"run_id": "r1", "case_key": "c", "params": "{"}]}, None, {})
    monkeypatch.undo()
    report = ingest(tmp_path)
    assert report.parts_added == 1
    assert "part r1/bad does not fit the tables (Conversion Error" in report.set_aside[0]
    assert len(dump(tmp_path)["cases"]) == 2


def test_parts_of_a_newer_schema_are_refused_and_left(sitting, dump, tmp_path, monkeypatch):
    sitting.write_run(tmp_path, "r1", ["g1"])
    monkeypatch.setattr(parts_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    sitting.write_run(tmp_path, "r1", ["g2"])
    monkeypatch.undo()
    report = ingest(tmp_path)
    told = (
        f"part r1/g2 has schema version {SCHEMA_VERSION + 1} and this moebench knows {SCHEMA_VERSION} and older: "
        "install a newer moebench to read it."
    )
    assert report.left_out == [told]
    assert (report.parts_added, report.set_aside) == (1, [])
    assert (tmp_path / "runs" / "r1" / "g2" / "manifest.json").exists()
    assert query(tmp_path, "SELECT reason FROM left_out") == [(told,)]
    assert len(dump(tmp_path)["parts"]) == 1


def test_a_copied_part_does_not_count_twice(sitting, dump, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    shutil.copytree(tmp_path / "runs" / "r1" / "g1", tmp_path / "runs" / "r1" / "copy")
    report = ingest(tmp_path)
    assert report.left_out == ["part r1/copy says it is r1/g1; move it back."]
    assert len(dump(tmp_path)["cases"]) == 2


def test_a_part_exchanged_after_its_ingest_is_told(sitting, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    ingest(tmp_path)
    shutil.rmtree(tmp_path / "runs" / "r1" / "g1")
    write_part(tmp_path / "runs" / "r1", "g1", {"cases": [{"run_id": "r1", "case_key": "new"}]}, None, {})
    assert ingest(tmp_path).left_out == [
        "part r1/g1 is not the one ingested under its name; rebuild the database to take it."
    ]
    assert rebuild(tmp_path).rows == 1


def test_a_merged_store_is_the_union(sitting, dump, tmp_path):
    sitting.write_run(tmp_path / "a", "r1", ["g1"])
    sitting.write_run(tmp_path / "b", "r2", ["g1"])
    shutil.copytree(tmp_path / "b" / "runs" / "r2", tmp_path / "a" / "runs" / "r2")
    assert ingest(tmp_path / "a").parts_added == 2
    assert len(dump(tmp_path / "a")["timings"]) == 6


def test_an_old_part_without_a_later_column_reads_as_null(sitting, dump, dump_parts, tmp_path, monkeypatch):
    sitting.write_run(tmp_path, "r1", ["g1"])
    older = {column: kind for column, kind in TABLES["cases"].items() if column != "elapsed_s"}
    monkeypatch.setitem(TABLES, "cases", older)
    sitting.write_run(tmp_path, "r1", ["g2"])
    monkeypatch.undo()
    assert ingest(tmp_path).parts_added == 2
    assert dump(tmp_path) == dump_parts(tmp_path)
    assert query(tmp_path, "SELECT count(*), count(elapsed_s) FROM cases") == [(4, 0)]


def test_a_missing_store_is_told_and_not_made(tmp_path):
    for act in (ingest, lambda store: run_sql(store, "SELECT 1")):
        with pytest.raises(ResultsError, match=r"there is no store at .*; run `moebench run` first"):
            act(tmp_path / "typo")
    assert list(tmp_path.iterdir()) == []


def test_no_parts_give_empty_tables_of_the_right_types(tmp_path, sitting):
    sitting.write_run(tmp_path / "full", "r1", ["g1"])
    empty, full = connect_parts(tmp_path / "none"), connect_parts(tmp_path / "full")
    for name in [*map(base_table, TABLES), *VIEWS, "parts", "left_out"]:
        found = empty.execute(f'FROM "{name}"')
        assert found.description == full.execute(f'FROM "{name}"').description
        assert found.fetchall() == []


# ---------------------------------------------------------------------------------------------------------------------
# Migrations


def test_migrations_from_scratch_give_the_schema():
    connection = duckdb.connect()
    assert migrate(connection) == SCHEMA_VERSION == len(load_migrations())
    for table, columns in TABLES.items():
        described = connection.execute(f'DESCRIBE "{base_table(table)}"').fetchall()
        assert {row[0]: row[1] for row in described} == columns
    for view in VIEWS:
        assert connection.execute(f"FROM {view}").fetchall() == []


def test_a_failing_migration_is_undone_wholly():
    connection = duckdb.connect()
    migrate(connection)
    broken = "ALTER TABLE cases ADD COLUMN extra INTEGER; CREATE TABLE more (a INTEGER); INSERT INTO nope VALUES (1);"
    with pytest.raises(ResultsError, match=f"migration {SCHEMA_VERSION + 1} of the database failed and was undone"):
        migrate(connection, [*load_migrations(), broken])
    assert version_of(connection) == SCHEMA_VERSION
    names = [row[0] for row in connection.execute("SELECT table_name FROM information_schema.tables").fetchall()]
    assert "more" not in names
    assert "extra" not in [column[0] for column in connection.execute("FROM cases").description]


def test_a_later_migration_keeps_the_rows_and_views(sitting, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    ingest(tmp_path)
    connection = duckdb.connect(str(tmp_path / DATABASE))
    step = "ALTER TABLE cases ADD COLUMN extra INTEGER DEFAULT 7;"
    assert migrate(connection, [*load_migrations(), step]) == SCHEMA_VERSION + 1
    assert connection.execute("SELECT DISTINCT extra, status FROM timings WHERE status = 'ok'").fetchall() == [
        (7, "ok")
    ]
    connection.close()


def test_a_database_of_a_newer_schema_is_refused(sitting, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    ingest(tmp_path)
    connection = duckdb.connect(str(tmp_path / DATABASE))
    connection.execute("UPDATE meta SET schema_version = 9")
    connection.close()
    for act in (ingest, rebuild, lambda store: run_sql(store, "SELECT 1")):
        known = f"this moebench knows {SCHEMA_VERSION} and older"
        with pytest.raises(ResultsError, match=f"schema version 9 and {known}: install a newer"):
            act(tmp_path)


def test_changed_views_are_made_anew(sitting, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    ingest(tmp_path)
    connection = duckdb.connect(str(tmp_path / DATABASE))
    connection.execute("CREATE OR REPLACE VIEW statuses AS SELECT 1 AS old")
    connection.execute("UPDATE meta SET views = 'old'")
    connection.close()
    assert "old" not in run_sql(tmp_path, "FROM statuses", format="csv")
    ingest(tmp_path)
    connection = duckdb.connect(str(tmp_path / DATABASE), read_only=True)
    assert connection.execute("FROM statuses").description[0][0] == "run_id"
    connection.close()


# ---------------------------------------------------------------------------------------------------------------------
# Views


def test_timings_has_a_row_for_each_process_and_one_without_samples_where_not_ok(sitting, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    found = query(tmp_path, "SELECT case_key, process, clock, status, len(ns), backend FROM timings ORDER BY ALL")
    assert found == [
        ("g1-bad", None, None, "crashed", None, "eager"),
        ("g1-ok", 0, "wall", "ok", 8, "eager"),
        ("g1-ok", 1, "wall", "ok", 8, "eager"),
    ]


def test_cases_run_once_are_not_in_timings(tmp_path):
    rows = [{"run_id": "r1", "case_key": "q", "protocol": "once", "status": "ok", "evidence": "measured-cpu"}]
    write_part(tmp_path / "runs" / "r1", "g", {"cases": rows}, None, {})
    assert query(tmp_path, "SELECT count(*) FROM timings") == [(0,)]
    assert query(tmp_path, "SELECT case_key, wall_n FROM summary") == [("q", None)]


def test_summary_pools_the_processes(sitting, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    sql = "SELECT wall_processes, wall_n, wall_min_ns, wall_median_ns, wall_lo_ns, wall_hi_ns FROM summary"
    pooled = sorted([1002 + 7 * i for i in range(8)] + [1102 + 7 * i for i in range(8)])
    median = (pooled[7] + pooled[8]) / 2
    assert query(tmp_path, f"{sql} WHERE status = 'ok'") == [(2, 16, 1002, median, 1002.0, 1151.0)]
    assert query(tmp_path, f"{sql} WHERE status = 'crashed'") == [(None,) * 6]


def test_a_process_without_an_interval_leaves_the_pooled_one_open(tmp_path):
    key = {"run_id": "r1", "case_key": "c"}
    timings = [
        {**key, "process": 0, "clock": "wall", "ns": [1] * 8, "n": 8, "median_lo_ns": 1, "median_hi_ns": 1},
        {**key, "process": 1, "clock": "wall", "ns": [2], "n": 1},
    ]
    write_part(tmp_path / "runs" / "r1", "g", {"cases": [{**key, "status": "ok"}], "timings": timings}, None, {})
    assert query(tmp_path, "SELECT wall_lo_ns, wall_hi_ns FROM summary") == [(None, None)]


def test_latest_takes_the_run_that_started_last_whatever_its_status(tmp_path):
    for run_id, started, status in (
        ("r2", "2026-01-02", "ok"),
        ("r1", "2026-01-03", "crashed"),
        ("r3", "2026-01-01", "ok"),
    ):
        write_json_atomic(tmp_path / "runs" / run_id / "run.json", {"started_at": f"{started}T00:00:00"})
        rows = [{"run_id": run_id, "case_key": "c", "status": status}]
        write_part(tmp_path / "runs" / run_id, "g", {"cases": rows}, None, {})
    assert query(tmp_path, "SELECT run_id, status FROM latest") == [("r1", "crashed")]


def test_every_view_and_table_is_documented():
    assert all(view.summary.endswith(".") and "\n" not in view.summary for view in VIEWS.values())
