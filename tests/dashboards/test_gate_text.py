import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.dashboards.gate_export import gate_json, github_annotations, junit_xml, markdown
from moebench.dashboards.gate_text import effect_text, gate_table, percent, value_text
from moebench.dashboards.text import clean
from moebench.results.gate import Exit, GateResult, Judged, Noise, Skipped
from moebench.results.verdict import Verdict

GOLDEN = Path(__file__).with_name("golden")

HOSTILE = (
    "a\x1b[31mb | <script>x</script> `c` ~~d~~ 50%\r\n::error::injected ##[error]e @someone www.x.y http://x.y \x9b"
)

NOISE = Noise(0.015, 0.011, 0.031, 0.05, 40)


def timed(label, verdict, ratio, half=0.02, **over):
    base = 51_234.0
    values = {"base_value": base, "candidate_value": base * ratio, "unit": "ns", "clock": "cpu"}
    found = {"lo": ratio - half, "hi": ratio + half, "p": 0.01, "q": 0.02, "pairs": 10, "turns": 400}
    limits = {"margin": 0.01, "asked": 0.05}
    return Judged(label, label, label, "time", "time", verdict, ratio=ratio, **{**values, **found, **limits, **over})


def exact(label, metric, verdict, base, candidate, unit="byte", **over):
    values = {"base_value": base, "candidate_value": candidate, "unit": unit}
    return Judged(label, label, label, "metric", metric, verdict, **values, **over)


def result(*judged, skipped=(), noise=NOISE, fail_on=(), asked_cases=60):
    return GateResult(
        "20260315-101010-9a7e00", "HEAD~1 (1a2b3c4)", "work tree (1a2b3c4 + changes)", judged, tuple(skipped), noise,
        61.2, asked_cases, fail_on,
    )  # fmt: skip


MOVED = ("environment: torch 2.12 -> 2.13", "cost: bytes 1234567 -> 1234568")

REGRESSED = result(
    timed("T=16 on eager", Verdict.REGRESSED, 1.093, moved=MOVED),
    exact("T=16 on eager", "bytes", Verdict.REGRESSED, 1234567.0, 1234568.0, moved=MOVED),
    exact("T=16 on eager", "assignments", Verdict.EQUIVALENT, 11.0, 11.0, "1"),
    timed("T=64 on grouped", Verdict.IMPROVED, 0.8),
    timed("T=256 on eager, a case with a name that is much longer than its column", Verdict.EQUIVALENT, 1.003),
    timed("T=1 on eager", Verdict.INCONCLUSIVE, 1.03, 0.06, reason="neither shown nor excluded: a slow-down of 5%"),
    exact("T=1 on eager", "hits", Verdict.INCONCLUSIVE, 3.0, None, "1", reason="the candidate does not tell it"),
    Judged(
        "smollm2", "q", "q", "accuracy", "lambada", Verdict.IMPROVED, base_value=0.52, candidate_value=0.54, unit="1",
        ratio=0.02, lo=0.01, hi=0.03,
    ),
    timed(HOSTILE, Verdict.REGRESSED, 1.5, reason=HOSTILE, moved=(HOSTILE,)),
    skipped=[
        Skipped("new", "n", "skipped", "not in HEAD~1 (1a2b3c4): there is no backend 'new'."),
        Skipped(HOSTILE, "h", "broken", f"crashed on the candidate's side alone: {HOSTILE}"),
        Skipped("T=4096", "l", "left out", "the budget of 480 s was spent before it had 5 process pairs."),
    ],
)  # fmt: skip

NOISY = result(
    timed("T=16 on eager", Verdict.INCONCLUSIVE, 1.02, 0.2, reason="too noisy: can detect only 9.0%, asked for 5%"),
    noise=Noise(0.04, 0.04, 0.09, 0.05, 10),
    asked_cases=1,
)

PASSED = result(timed("T=16 on eager", Verdict.EQUIVALENT, 1.0), asked_cases=1)

NOTHING = result(noise=None, asked_cases=2)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("gate_regressed.txt", gate_table(REGRESSED)),
        ("gate_colored.txt", gate_table(REGRESSED, color=True)),
        ("gate_noisy.txt", gate_table(NOISY)),
        ("gate_passed.txt", gate_table(PASSED)),
        ("gate_nothing.txt", gate_table(NOTHING)),
        ("gate_regressed.md", markdown(REGRESSED)),
        ("gate_noisy.md", markdown(NOISY)),
        ("gate_regressed.xml", junit_xml(REGRESSED)),
        ("gate_noisy.xml", junit_xml(NOISY)),
        ("gate_regressed.github.txt", github_annotations(REGRESSED)),
    ],
)
def test_what_people_read_is_what_was_agreed(name, made):
    assert made == (GOLDEN / name).read_bytes().decode()


def test_no_line_of_a_table_is_wider_than_a_terminal_or_drives_it():
    for line in gate_table(REGRESSED).split("\n"):
        assert line == clean(line)
        assert len(line) <= 100
    assert "\x1b[31m" not in gate_table(REGRESSED, color=True)


def commands(text):
    """Return the lines that GitHub reads as a command: it trims a line before it looks; ``##[`` counts anywhere."""
    return [line for line in text.splitlines() if line.lstrip().startswith("::") or "##[" in line]


@given(st.text(alphabet="x:# []-\n\r\x1b|e", max_size=300))
def test_no_text_of_the_data_is_a_command_to_github(text):
    found = result(
        timed(text, Verdict.REGRESSED, 1.2, reason=text, moved=(text,)), skipped=[Skipped(text, "s", "broken", text)]
    )
    found = replace(found, base=text)
    assert commands(gate_table(found)) == []
    made = github_annotations(found).splitlines()
    assert [line.split(" ")[0] for line in made] == ["::error", "::error", "::notice"]


@pytest.mark.parametrize("length", range(60, 130))
def test_no_line_begins_within_a_word_and_so_none_with_a_command(length):
    text = "x" * length + "::error::injected"
    found = result(
        timed(text, Verdict.REGRESSED, 1.2, reason=text, moved=(text,)), skipped=[Skipped("a", "s", "skipped", text)]
    )
    assert commands(gate_table(found)) == []


def test_annotations_escape_percent_newlines_and_the_separators_of_properties():
    found = result(timed("a:b,c%d\ne", Verdict.REGRESSED, 1.2, reason="50%", moved=("x",)))
    line = github_annotations(found).splitlines()[0]
    assert line.startswith(
        "::error title=a%3Ab%2Cc%25d e::regressed: time 1.200 [1.180, 1.220], margin 1 %25; 50%25%0A"
    )


def test_failures_come_first_in_the_log():
    levels = [line.split(" ")[0] for line in github_annotations(REGRESSED).splitlines()]
    assert levels == sorted(levels, key=["::error", "::warning", "::notice"].index)


@given(st.text(max_size=60))
def test_junit_is_well_formed_whatever_a_case_is_called(text):
    found = result(timed(text, Verdict.REGRESSED, 1.2, reason=text), skipped=[Skipped(text, "s", text, text)])
    suite = ElementTree.fromstring(junit_xml(found).encode())
    assert suite.get("failures") == ("2" if text == "broken" else "1")
    assert suite.find("testcase").get("name") == f"{clean(text)} time"


def outcomes(found):
    suite = ElementTree.fromstring(junit_xml(found).encode())
    counted = {name: int(suite.get(name)) for name in ("tests", "failures", "skipped", "errors")}
    assert counted["tests"] == len(suite.findall("testcase"))
    assert counted["failures"] == len(suite.findall("testcase/failure"))
    assert counted["skipped"] == len(suite.findall("testcase/skipped"))
    return counted


@pytest.mark.parametrize(
    ("found", "fail_on", "failures", "skipped"),
    [
        (PASSED, (), 0, 0),
        (NOISY, (), 0, 2),
        (NOISY, ("inconclusive",), 0, 2),
        (NOISY, ("noisy",), 2, 0),
        (NOTHING, (), 0, 1),
        (NOTHING, ("inconclusive",), 1, 0),
        (REGRESSED, (), 4, 4),
        (REGRESSED, ("inconclusive",), 6, 2),
    ],
)
def test_a_doubt_fails_in_junit_only_where_it_was_asked_for(found, fail_on, failures, skipped):
    counted = outcomes(replace(found, fail_on=fail_on))
    assert (counted["failures"], counted["skipped"], counted["errors"]) == (failures, skipped, 0)


@pytest.mark.parametrize("found", [PASSED, NOISY, NOTHING, REGRESSED])
@pytest.mark.parametrize("fail_on", [(), ("inconclusive",), ("noisy",), ("inconclusive", "noisy")])
def test_every_output_tells_the_exit_status_of_the_command(found, fail_on):
    found = replace(found, fail_on=fail_on)
    code = found.status
    assert f"): exit {code}" in gate_table(found).splitlines()[-1]
    told = json.loads(gate_json(found))
    assert (told["exit"], told["exit_name"]) == (code, Exit(code).name.lower())
    assert (code == 1) == (outcomes(found)["failures"] > 0)


def test_json_holds_everything_and_no_nan():
    broken = replace(REGRESSED.judged[0], ratio=float("nan"), hi=float("inf"))
    told = json.loads(gate_json(replace(REGRESSED, judged=(broken,))), parse_constant=pytest.fail)
    assert told["judged"][0]["ratio"] is None
    assert told["judged"][0]["verdict"] == "regressed"
    assert told["noise"] == {
        "tau": 0.015, "measured": 0.011, "detectable": 0.031, "asked": 0.05, "pairs": 40, "too_noisy": False
    }  # fmt: skip
    assert told["skipped"][1]["label"] == HOSTILE
    assert json.loads(gate_json(NOTHING))["noise"] is None


@given(st.text(max_size=80))
def test_a_name_makes_no_cell_no_html_and_no_link_in_markdown(text):
    found = result(timed(text, Verdict.REGRESSED, 1.2, reason=text, moved=(text,)))
    made = markdown(found)
    row = next(line for line in made.splitlines() if line.startswith("| ") and "regressed" in line.split("|")[-2])
    assert row.count("|") == 7
    assert set(re.findall(r"<[^>]*>", made)) <= {"<details>", "</details>", "<summary>", "</summary>"}
    assert "://" not in made


def test_a_ratio_is_never_shown_without_its_interval():
    assert effect_text("time", 1.5, None, None) == "~"
    assert effect_text("time", 1.5, 1.4, float("nan")) == "~"
    assert effect_text("time", 1.5, 1.4, 1.6) == "1.500 [1.400, 1.600]"
    assert effect_text("time", 0.0123456, 0.012, 0.0131) == "0.0123 [0.012, 0.0131]"
    assert effect_text("accuracy", -0.012, -0.03, 0.006) == "-0.012 [-0.03, +0.006]"
    bare = timed("a", Verdict.INCONCLUSIVE, 1.5, lo=None, hi=None)
    assert "1.500" not in gate_table(result(bare)) + markdown(result(bare)) + junit_xml(result(bare))


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (11.0, "1", "11"),
        (0.11, "1", "0.11"),
        (1234567.0, "byte", "1234567 byte"),
        (1234568.0, "byte", "1234568 byte"),
        (51_234.0, "ns", "51.23 µs"),
        (2.1e-7, "1", "2.1e-07"),
        (None, "1", "unknown"),
        (float("nan"), "1", "unknown"),
        (float("inf"), "", "inf"),
    ],
)
def test_a_value_keeps_the_digits_that_it_is_compared_by(value, unit, shown):
    assert value_text(value, unit) == shown


def test_percentages_are_short():
    assert [percent(one) for one in (0.05, 0.015, 0.0312, 0.3)] == ["5 %", "1.5 %", "3.1 %", "30 %"]
