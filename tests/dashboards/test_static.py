"""The table of compiled kernels: what it shows, what it escapes, and when the page has it."""

from __future__ import annotations

import json

import pytest

from moebench.dashboards.data import Case
from moebench.dashboards.page import render
from moebench.dashboards.static_table import static_table
from moebench.results.database import connect_parts

NUMBERS = {"registers": 136.0, "shared_memory": 24576.0, "blocks_per_processor": 3.0, "occupancy": 0.1875}


def case(kernel="gate_up", **over):
    params = {"backend": {"kernel": kernel, "tile": "64x64x32-w4-s3"}, "workload": {"target": "sm_80"}}
    row = {"evidence": "static-compile", "status": "ok", "backend": "triton", "dtype": "bfloat16", **over}
    metrics = tuple({"name": name, "value": value} for name, value in NUMBERS.items())
    return Case(kernel, {"params": json.dumps(params), **row}, {}, metrics=metrics)


def cells(table):
    return [cell.partition(">")[2] for cell in table.partition("<tbody>")[2].split("</td>")[:-1]]


def test_a_row_tells_what_the_code_needs_and_no_number_that_is_not_there():
    told = cells(static_table([case()]))
    assert told[-9:-5] == ["136", "24", "3", "18.75"]
    assert "sm_80" in told[0]
    assert told[1:5] == ["triton", "gate_up", "64x64x32-w4-s3", "bfloat16"]
    assert all("not measured" in cell for cell in told[-5:])


def test_names_are_escaped():
    assert "<img" not in static_table([case(kernel="<img src=x>")])


@pytest.mark.parametrize("over", [{"evidence": "model"}, {"evidence": "measured-gpu"}, {"status": "wrong"}])
def test_other_rows_are_not_in_it(over):
    assert static_table([case(**over)]) == ""
    assert static_table([case(**over), case()]).count("<tr>") == 2


def test_a_page_has_the_section_where_kernels_were_compiled(build, store, tmp_path):
    builder = build.Builder(tmp_path, "20260314-092653-static")
    row = builder.case(suite="static", protocol="once", evidence="static-compile", backend="triton", base=None)
    builder.add("metrics", case_key=row["case_key"], name="registers", value=136.0, unit="1")
    builder.write()
    for place, has in ((tmp_path, True), (store, False)):
        connection = connect_parts(place)
        assert ('<section id="static"' in render(connection, None, str(place))) == has
        connection.close()
