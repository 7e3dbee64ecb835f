"""``moebench pareto``: the table that a terminal shows, files, and mistakes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.bench.cli import PARETO_HELP, main
from moebench.results.pareto_axes import X_AXES, Y_AXES
from moebench.results.statistics import summary

stored = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("stored.py"))))
GOLDEN = Path(__file__).parent / "golden" / "pareto.txt"


def method(name, us, ppl, half=0.1, flags=(), metrics=None):
    """Return the tables of a timed case and of its evaluation; ``us`` is exact to a hundredth."""
    speed = stored.case("eager", us, metrics, case_key=stored.key(name), method_key=name, routing=name, flags=[*flags])
    for timing in speed["timings"]:
        ns = [round(us * 1000 * (1 + step / 1000)) for step in range(-10, 11)]
        timing.update(ns=ns, turn=list(range(21)), **summary(ns))
    for row in (*speed["timings"], *speed["metrics"]):
        row["case_key"] = stored.key(name)
    once = {"suite": "accuracy", "protocol": "once", "group_key": "q", "method_key": name, "routing": name}
    quality = stored.case("eager", **once, case_key=stored.key(f"{name} judged"))
    bounds = {"name": "perplexity", "value": ppl, "unit": "1", "lo": ppl - half, "hi": ppl + half}
    quality["metrics"] = [{"case_key": stored.key(f"{name} judged"), **bounds}]
    return [speed, quality]


def probe(name, value):
    """Return the tables of a probe of the roofline."""
    return stored.case(name, metrics={name: value}, suite="roofline", case_key=stored.key(name), group_key="probe")


@pytest.fixture
def store(tmp_path):
    """A front of two, a tie, a dominated method and a contended one, beside a run that is older."""
    work = {"flops": 1e6, "bytes": 4e5}
    methods = [
        *method("topk", 80, 17.4, metrics=work),
        *method("moepp", 40, 18.2, metrics=work),
        *method("reroute", 40.2, 18.25, metrics=work),
        *method("expert_choice", 90, 19.0, metrics=work),
        *method("hash", 10, 16.0, flags=["contended"], metrics=work),
    ]
    probes = [probe("peak_flops", 1e11), probe("bandwidth_DRAM", 2e10)]
    store = tmp_path / "store"
    stored.write_run(store, 1, *methods, *probes)
    stored.write_run(store, 0, *method("topk", 8, 17.4), *method("moepp", 9, 18.2))
    stored.write_run(store, 2, stored.case("unjudged", 7, method_key="unjudged", group_key="other"))
    return store


def pareto(capsys, store, *arguments):
    status = main(["pareto", "--store", str(store), *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_table_is_the_golden_one(capsys, store):
    status, out, err = pareto(capsys, store, "--price-per-hour", "0.36")
    assert (status, err) == (0, "")
    assert out == GOLDEN.read_text()


def test_json_is_the_same_with_its_query(capsys, store):
    status, out, _ = pareto(capsys, store, "--format", "json", "--x", "latency")
    told = json.loads(out)
    assert status == 0
    assert {case["case"]: case["place"] for case in told["fronts"][0]["cases"]} == {
        "topk": "front",
        "moepp": "front",
        "reroute": "tie",
        "expert_choice": "dominated",
        "hash": "unjudged",
    }
    assert told["fronts"][0]["cases"][1]["s_mbu"] == pytest.approx(4e5 / 40e-6 / 2e10)
    assert told["sql"].startswith("WITH ")


def test_csv_has_a_line_for_each_case(capsys, store):
    _, out, _ = pareto(capsys, store, "--format", "csv", "--where", "started_at < '2026-03-15'")
    assert [line.split(",")[0].split(" ")[0] for line in out.splitlines()] == ["front", '"throughput', '"throughput']


def test_cases_that_did_not_end_ok_are_counted_unless_a_condition_narrows_the_rows(capsys, store):
    broken = stored.case("eager", None, status="crashed", method_key="broken", group_key="g")
    good = [*method("topk", 8, 17.4), *method("moepp", 9, 18.2)]
    stored.write_run(store, 5, *good, broken)
    _, out, _ = pareto(capsys, store)
    assert "left out, 1 row: they ended crashed; `moebench report` says why" in " ".join(out.split())
    _, out, _ = pareto(capsys, store, "--where", "routing <> 'x'")
    assert "crashed" not in out


def test_an_evaluation_counts_only_while_no_later_one_went_wrong(capsys, tmp_path):
    stored.write_run(tmp_path, 0, *method("topk", 8, 17.4), *method("moepp", 9, 18.2), *method("hash", 10, 19.0))
    wrong = method("moepp", 9, 18.2)[1]
    wrong["cases"][0]["status"], wrong["metrics"] = "wrong", []
    stored.write_run(tmp_path, 1, wrong)
    _, out, _ = pareto(capsys, tmp_path)
    assert "moepp" not in out
    assert "or something later went wrong" in out


def test_without_a_probe_there_is_no_utilisation_but_advice(capsys, tmp_path):
    stored.write_run(tmp_path, 0, *method("topk", 8, 17.4), *method("moepp", 9, 18.2))
    _, out, _ = pareto(capsys, tmp_path)
    assert "no roofline probe of this host is in the store" in out
    assert "S-MBU  " not in out


def quantized(name, bits, kl, half=0.001):
    """Return the tables of a case of suite quantization, which has bytes and quality of its own."""
    own = {"suite": "quantization", "protocol": "once", "group_key": "z", "method_key": name, "quantization": name}
    tables = stored.case("eager", **own, case_key=stored.key(name))
    key = {"case_key": stored.key(name)}
    tables["metrics"] = [
        {**key, "name": "kl_to_dense", "value": kl, "unit": "nat/token", "lo": kl - half, "hi": kl + half},
        {**key, "name": "bits_per_weight", "value": bits, "unit": "bit"},
        {**key, "name": "file_bytes", "value": None if name == "own" else 1000 * bits, "unit": "byte"},
    ]
    return tables


def test_stored_bits_stand_against_the_quality_of_the_same_cases(capsys, tmp_path):
    cases = [("int8", 8.1, 0.001), ("int4", 4.5, 0.02), ("poor", 9.0, 0.5), ("own", 5.0, 0.3)]
    stored.write_run(tmp_path, 0, *(quantized(*told) for told in cases))
    for x, places in (
        ("bits", {"int8": "front", "int4": "front", "poor": "dominated", "own": "dominated"}),
        ("disk", {"int8": "front", "int4": "front", "poor": "dominated"}),
    ):
        _, out, _ = pareto(capsys, tmp_path, "--format", "json", "--x", x, "--y", "kl")
        (front,) = json.loads(out)["fronts"]
        assert {case["case"]: case["place"] for case in front["cases"]} == places
        assert front["cases"][0]["x"] == (4.5 if x == "bits" else 4500)


def test_without_bits_the_suite_that_has_them_is_named(capsys, store):
    _, out, err = pareto(capsys, store, "--x", "bits")
    assert "moebench run suite=quantization" in out + err


def test_the_page_is_written_whole(capsys, store, tmp_path):
    target = tmp_path / "new" / "pareto.html"
    status, out, err = pareto(capsys, store, "--page", str(target))
    assert (status, out, err) == (0, f"{target}\n", "")
    assert target.read_text().count("5 methods in 5 cases") >= 3
    assert [path.name for path in target.parent.iterdir()] == ["pareto.html"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--x", "speed"), "unknown axis x 'speed'"),
        (("--y", "pll"), "unknown axis y 'pll': did you mean 'ppl'?"),
        (("--y", "accuracy:nothing"), "unknown axis y 'accuracy:nothing'"),
        (("--x", "energy"), "no counter of energy was read"),
        (("--y", "kl"), "no KL to dense of their method is in the store"),
        (("--where", "colour = 'red'"), "colour"),
        (("--where", "1); DELETE FROM cases; SELECT (1"), "one SELECT at a time"),
        (("--where", "tokens < 0"), "widen the condition"),
        (("--price-per-hour", "0"), "a number above 0"),
        (("--price-per-hour", "nan"), "a number above 0"),
        (("--page", "/proc/no/page.html"), "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(arguments, words, capsys, store):
    status, out, err = pareto(capsys, store, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_the_help_names_every_axis():
    told = PARETO_HELP.partition("condition")[0].replace(".", " ").split()
    assert {*X_AXES, *Y_AXES} <= set(told)
