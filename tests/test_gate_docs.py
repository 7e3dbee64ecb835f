"""The workflows of docs/gate-ci.md are YAML, ask for no rights, and call the gate as it can be called."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from moebench.bench.cli import make_parser
from moebench.results.gate import Exit

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gate-ci.md"
TEXT = PAGE.read_text()
PARSED = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)]
WORKFLOWS = [block for block in PARSED if isinstance(block, dict)]
END = {"||", "&&", ";", "|", ">", ">>", "2>"}


def steps():
    """Yield every step of all blocks; a block is a workflow or a list of steps."""
    for block in PARSED:
        jobs = block["jobs"].values() if isinstance(block, dict) else [{"steps": block}]
        for job in jobs:
            yield from job["steps"]


def gate_lines(script):
    """Yield the words of every ``moebench gate`` of a shell script, up to what the shell makes of the rest."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["moebench", "gate"]:
            end = next((at for at, word in enumerate(words) if word in END), len(words))
            yield words[1:end]


LINES = [words for step in steps() for words in gate_lines(step.get("run", ""))]


def triggers(workflow):
    """Return the events of a workflow; YAML 1.1 takes the key ``on`` for true."""
    events = workflow[True]
    return {events} if isinstance(events, str) else set(events)


def test_there_are_workflows_and_every_line_of_the_page_is_found():
    assert len(WORKFLOWS) >= 4
    assert len(LINES) == len(re.findall(r"^\s*moebench gate ", TEXT, re.MULTILINE)) >= 8


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_every_gate_line_is_understood(words):
    try:
        options, rest = make_parser().parse_known_args(words)
    except SystemExit as error:
        pytest.fail(f"{' '.join(words)}: exits with {error.code}")
    assert options.command == "gate"
    assert not [word for word in rest if word.startswith("-")], rest


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow["name"])
def test_a_workflow_may_read_and_nothing_else(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in triggers(workflow)
    assert "secrets." not in yaml.safe_dump(workflow)
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert not ("self-hosted" in job["runs-on"] and "pull_request" in triggers(workflow))
        (checkout,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
        assert checkout["with"] == {"fetch-depth": 0, "persist-credentials": False}


def test_actions_have_versions_and_the_page_names_no_host():
    actions = [step["uses"] for step in steps() if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions)
    assert not re.search(r"://|\b[\w-]+\.(com|org|io|net|dev)\b", TEXT)


def test_every_exit_code_is_explained_and_doubt_does_not_pass_unseen():
    codes = {int(code) for code in re.findall(r"^\| (\d) \|", TEXT, re.MULTILINE)}
    assert codes == {*map(int, Exit), 2}
    (lenient,) = [step["run"] for step in steps() if "case " in step.get("run", "")]
    warned = set(map(int, re.findall(r"^\s*(\d)\) echo \"::warning", lenient, re.MULTILINE)))
    assert warned == {Exit.INCONCLUSIVE, Exit.TOO_NOISY}
    assert '*) exit "$code"' in lenient
