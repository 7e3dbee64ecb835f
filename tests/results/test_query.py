import csv
import io
import json

import duckdb
import pytest

from moebench.results.database import DATABASE, connect_parts, ingest
from moebench.results.errors import ResultsError
from moebench.results.export import export
from moebench.results.integrity import RULES, problems
from moebench.results.parts import list_parts, write_json_atomic, write_part
from moebench.results.query import run_sql
from moebench.results.rows import arrow_schema
from moebench.results.schema import TABLES


@pytest.fixture(params=["database", "parts"])
def store(request, sitting, tmp_path):
    """The same store, read through the database file and through the Parquet files (with a quote in its path)."""
    path = tmp_path / "it's a store"
    sitting.write_run(path, "r1", ["g1", "g2"])
    if request.param == "database":
        ingest(path)
    return path


TABLE = """\
case_key  status   wall_n  wall_median_ns  wall_lo_ns  flags  params    reason
--------  -------  ------  --------------  ----------  -----  --------  ---------
g1-bad    crashed    NULL            NULL        NULL  []     NULL      signal 11
g1-ok     ok           16          1076.5        1002  []     {"k": 2}  NULL
g2-bad    crashed    NULL            NULL        NULL  []     NULL      signal 11
g2-ok     ok           16          1076.5        1002  []     {"k": 2}  NULL
(4 rows)
"""


def test_table_output(store):
    columns = "case_key, status, wall_n, wall_median_ns, wall_lo_ns, flags, params, reason"
    assert run_sql(store, f"SELECT {columns} FROM summary ORDER BY case_key") == TABLE
    assert run_sql(store, "SELECT 1 AS a WHERE false") == "a\n-\n(0 rows)\n"
    long = run_sql(store, "SELECT repeat('x', 100) AS text, 'a' || chr(10) || 'b' AS lines")
    assert long.splitlines()[2] == "x" * 59 + "…  a\\nb"
    assert long.endswith("(1 row)\n")


def test_csv_output(store):
    text = run_sql(store, "SELECT case_key, ns, p99_ns, backend FROM timings ORDER BY ALL LIMIT 2", format="csv")
    assert text == (
        'case_key,ns,p99_ns,backend\ng1-bad,,,eager\ng1-ok,"[1002, 1009, 1016, 1023, 1030, 1037, 1044, 1051]",,eager\n'
    )


def test_json_output(store):
    columns = "value, lo, hi, flags, finished_at, 0::DOUBLE / 0 AS nan, 1::DECIMAL(4, 2) AS d"
    found = json.loads(run_sql(store, f"SELECT {columns} FROM metrics ORDER BY case_key", format="json"))
    row = {"value": 0.25, "lo": None, "hi": None, "flags": [], "finished_at": "2026-02-03T04:05:06"}
    assert found == [{**row, "nan": None, "d": "1.00"}] * 2


def test_params_are_values_and_never_sql(store):
    for hostile in ("g1-ok' OR 1=1 --", "g1-ok'; DROP TABLE cases; --", "?", "$key"):
        assert run_sql(store, "SELECT count(*) AS n FROM cases WHERE case_key = ?", [hostile], "csv") == "n\n0\n"
        assert (
            run_sql(store, "SELECT $key AS k", {"key": hostile}, "json")
            == json.dumps([{"k": hostile}], indent=1) + "\n"
        )
    assert run_sql(store, "SELECT count(*) AS n FROM cases WHERE case_key = ?", ["g1-ok"], "csv") == "n\n1\n"


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE cases",
        "DELETE FROM cases",
        "SELECT 1; SELECT 2",
        "COPY cases TO '{folder}/x.csv'",
        "EXPLAIN ANALYZE COPY cases TO '{folder}/x.csv'",
        "ATTACH '{folder}/x.duckdb'",
        "EXPORT DATABASE '{folder}/x'",
        "SET threads = 1",
        "INSTALL httpfs",
        "",
        "-- nothing",
    ],
)
def test_only_one_select_may_run(sql, store):
    before = sorted(path for path in store.parent.rglob("*"))
    with pytest.raises(ResultsError, match="the store is read by one SELECT at a time; write one statement that only"):
        run_sql(store, sql.replace("{folder}", str(store.parent).replace("'", "''")))
    assert sorted(path for path in store.parent.rglob("*")) == before


def test_files_outside_the_store_are_out_of_reach(store, tmp_path):
    (tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises(ResultsError, match="Cannot access file"):
        run_sql(store, f"SELECT * FROM read_csv('{tmp_path}/secret.csv')")


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("SELEC 1", 'the SQL cannot be run: Parser Error: syntax error at or near "SELEC"'),
        ("SELECT * FROM timing", 'Table with name timing does not exist: did you mean "timings'),
        ("SELECT statuz FROM cases", 'Referenced column "statuz" not found in FROM clause: candidate bindings'),
        ("SELECT * FROM cases WHERE tokens = ?", "Values were not provided"),
        ("SELECT 'x'::INTEGER", "Could not convert string"),
    ],
)
def test_mistakes_in_sql_are_one_sentence(sql, sentence, store):
    with pytest.raises(ResultsError, match="the SQL cannot be run") as told:
        run_sql(store, sql)
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_an_unknown_format_is_told(store):
    with pytest.raises(ResultsError, match="there is no format 'xml'; take one of table, csv, json"):
        run_sql(store, "SELECT 1", format="xml")


# ---------------------------------------------------------------------------------------------------------------------
# Export


def test_exported_parquet_has_the_rows_and_types_of_the_parts(store, tmp_path):
    files = export(store, tmp_path / "out")
    assert [file.name for file in files] == [f"{table}.parquet" for table in TABLES]
    connection = connect_parts(store)
    import pyarrow.parquet as pq

    for table in TABLES:
        found = pq.read_table(tmp_path / "out" / f"{table}.parquet")
        assert found.schema.equals(arrow_schema(table))
        name = {"timings": "timings_raw", "metrics": "metrics_raw"}.get(table, table)
        expected = connection.sql(f'FROM "{name}" ORDER BY ALL').to_arrow_table().cast(arrow_schema(table))
        assert found.equals(expected)


def test_exports_of_two_stores_read_as_one(sitting, tmp_path):
    for name, run in (("a", "r1"), ("b", "r2")):
        sitting.write_run(tmp_path / name, run, ["g1"])
        export(tmp_path / name, tmp_path / f"out_{name}", tables=["timings", "latest"])
    files = [str(tmp_path / f"out_{name}" / "timings.parquet") for name in "ab"]
    counted = duckdb.connect().execute("SELECT count(*), sum(len(ns)) FROM read_parquet(?)", [files]).fetchone()
    assert counted == (4, 32)
    assert (tmp_path / "out_a" / "latest.parquet").exists()


def test_exported_csv_has_lists_as_json(store, tmp_path):
    (file,) = export(store, tmp_path / "out", "csv", tables=["timings"])
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert len(rows) == 4
    assert json.loads(rows[0]["ns"]) == [1002 + 7 * i for i in range(8)]
    assert rows[0]["p99_ns"] == ""


def test_export_of_a_select(store, tmp_path):
    (file,) = export(
        store, tmp_path / "out", "csv", sql="SELECT status, count(*) AS n FROM cases GROUP BY 1 ORDER BY 1"
    )
    assert file.name == "query.csv"
    assert file.read_text() == "status,n\ncrashed,2\nok,2\n"
    (file,) = export(store, tmp_path / "out", sql="FROM cases SELECT count(*) AS n")
    assert duckdb.connect().execute("FROM read_parquet(?)", [str(file)]).fetchall() == [(4,)]


def test_impossible_exports_are_one_sentence(store, tmp_path):
    (tmp_path / "file").write_text("")
    for kwargs, sentence in (
        ({"tables": ["timing"]}, "there is no table 'timing'; known: runs, hosts"),
        ({"tables": ["cases"], "sql": "SELECT 1"}, "export takes tables or SQL, not both"),
        ({"format": "xlsx"}, "there is no format 'xlsx'; take one of parquet, csv"),
        ({"sql": "DROP TABLE cases"}, "one SELECT at a time"),
        ({"sql": "FROM nope"}, "the SQL cannot be run"),
    ):
        with pytest.raises(ResultsError, match=sentence):
            export(store, tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ResultsError, match="cannot write"):
        export(store, tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------------
# Integrity


def test_a_good_store_has_no_problems(store):
    assert problems(connect_parts(store)) == []
    if (store / DATABASE).exists():
        connection = duckdb.connect(str(store / DATABASE), read_only=True)
        assert problems(connection) == []
        connection.close()


OK = {"status": "ok", "protocol": "timed", "evidence": "measured-cpu"}
TIMING = {"process": 0, "clock": "wall", "ns": [5, 6], "turn": [0, 0], "n": 2, "min_ns": 5, "median_ns": 5.5}
BROKEN = {
    "ok and measured, but without samples": (OK, None),
    "not ok, but with samples": ({**OK, "status": "wrong", "reason": "r"}, TIMING),
    "without a status": ({**OK, "status": None}, None),
    "not ok, but without a reason": ({**OK, "status": "skipped"}, None),
    "run once, but with timings": ({**OK, "protocol": "once"}, TIMING),
    "at odds with their own samples in n, turns, minimum or median": (OK, {**TIMING, "n": 3}),
    "with a sample that is NULL or not positive": (OK, {**TIMING, "ns": [0, 6], "min_ns": 0}),
    "in timings_raw, but of no case": (None, TIMING),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_finds_what_breaks_it_and_only_that(rule, tmp_path):
    assert rule in RULES
    case, timing = BROKEN[rule]
    key = {"run_id": "r", "case_key": "c"}
    tables = {"cases": [{**key, **case}] if case else [], "timings": [{**key, **timing}] if timing else []}
    write_json_atomic(tmp_path / "runs" / "r" / "run.json", {})
    write_part(tmp_path / "runs" / "r", "g", tables, None, {})
    assert problems(connect_parts(tmp_path)) == [f"1 is {rule}: r/c."]


def test_doubled_rows_and_runs_without_run_json_are_found(tmp_path):
    rows = [{"run_id": "r", "case_key": "c", **OK, "evidence": "simulated"}]
    for part in ("g1", "g2"):
        write_part(tmp_path / "runs" / "r", part, {"cases": rows}, None, {})
    assert len(list_parts(tmp_path)) == 2
    assert problems(connect_parts(tmp_path)) == ["1 is of a run that has no run.json: r.", "1 is twice in cases: r/c."]
