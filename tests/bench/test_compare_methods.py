"""``moebench compare RUN``: methods of one run on the same items, against the one that changes least."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.bench.accuracy_doc import accuracy_page, results_in, results_of
from moebench.bench.cli import main
from moebench.contracts import MoebenchError
from moebench.results.statistics import mcnemar_p

stored = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("stored.py"))))
case, write_run = stored.case, stored.write_run

ABOUT = {"suite": "lm_eval", "protocol": "once", "model": "toy", "elapsed_s": 90.0}
RIGHT = [1.0] * 270 + [0.0] * 30
WORSE = [1.0] * 200 + [0.0] * 70 + [1.0] * 10 + [0.0] * 20  # 70 lost, 10 won


def answered(name, items, **columns):
    metrics = {"arc.acc": sum(items) / len(items), "arc.chance": 0.5, "tokens_read": 5000}
    return case(name, None, metrics, items, **{**ABOUT, **columns})


def one_run(store, *more):
    return write_run(
        store,
        0,
        answered("int2", WORSE, quantization="int2"),
        answered("int8", RIGHT, quantization="int8"),
        answered("model", RIGHT, layers=""),
        *more,
    )


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def table(capsys, *arguments):
    status = main(["compare", *arguments])
    return status, capsys.readouterr().out


def test_each_method_stands_against_the_model_as_it_is(capsys, store):
    one_run(store)
    status, out = table(capsys, "latest")
    assert status == 0
    assert "against toy as it is, item by item (lm_eval)" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("int")}
    assert set(rows) == {"int2", "int8"}
    assert "arc" in rows["int2"]
    assert "0.900" in rows["int2"]
    assert "0.700  -0.200 [" in rows["int2"]
    assert rows["int2"].split()[-1] == f"{mcnemar_p(RIGHT, WORSE):.2g}"
    assert "+0.000 [" in rows["int8"]


def test_json_names_both_cases(capsys, store):
    one_run(store)
    _, out = table(capsys, "latest", "--json")
    (found,) = json.loads(out)
    assert found["base"] == stored.key("model")
    verdicts = {one["case_key"]: one["verdict"] for one in found["judged"]}
    assert verdicts == {stored.key("int2"): "regressed", stored.key("int8"): "equivalent"}


def test_only_those_that_were_asked_the_same_are_compared(capsys, store):
    other = answered("other", WORSE, quantization="int4", input_sha256="other items")
    failed = answered("failed", WORSE, quantization="int4", status="wrong")
    one_run(store, other, failed)
    _, out = table(capsys, "latest")
    assert "int4" not in out


def test_among_equals_the_nearest_to_the_dense_model_is_the_base_and_the_tie_is_told(capsys, store):
    methods = [
        case(name, None, {"arc.acc": 0.9, "kl_to_dense": kl}, RIGHT, **{**ABOUT, "quantization": name})
        for name, kl in (("int2", 0.9), ("int8", 0.01), ("int4", 0.1))
    ]
    write_run(store, 0, *methods)
    _, out = table(capsys, "latest")
    head = out.splitlines()[0]
    assert "int8" in head
    assert "2 others change as little" in head


def test_names_are_printed_without_what_a_terminal_obeys(capsys, store):
    one_run(store, answered("evil", WORSE, quantization="int4\x1b[2J"))
    _, out = table(capsys, "latest")
    assert "\x1b" not in out
    assert "int4" in out


def test_more_than_a_thousand_differing_items_have_a_p():
    assert mcnemar_p([1.0] * 3000, [0.0] * 1400 + [1.0] * 1600) == pytest.approx(0.0, abs=1e-100)
    base, candidate = [1.0, 0.0] * 1500, [0.0, 1.0] * 1500
    assert mcnemar_p(base, candidate) == 1.0


def test_a_run_with_nothing_to_compare_says_what_to_do(capsys, store):
    write_run(store, 0, answered("model", RIGHT, layers=""))
    assert main(["compare", "latest"]) == 2
    assert "were asked the same items; name two runs to compare." in capsys.readouterr().err


def test_the_page_shows_values_differences_and_where_they_are_from(store):
    run_id = one_run(store)
    results = results_of(store)
    values, differences = (line for line in results.splitlines() if line.startswith("| `arc`, acc"))
    assert values == "| `arc`, acc | None | 0.50 | 0.900 | 0.900 | 0.700 |"
    int8, int2 = differences.split(" | ")[1:]
    assert int8.startswith("+0.000 [")
    assert int2.startswith("-0.200 [")
    assert int2.endswith(f"p = {mcnemar_p(RIGHT, WORSE):.2g} |")
    assert "5000 tokens (as it is 90 s, int8 90 s, int2 90 s), with threads=1 on toy" in results
    assert run_id in results
    assert results_in(accuracy_page(results)) == results


def test_a_store_without_the_experiment_names_it(store):
    write_run(store, 0, case("eager", 100))
    with pytest.raises(MoebenchError, match="run `moebench run experiment=rounding` first"):
        results_of(store)
