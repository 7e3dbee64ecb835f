"""How the command ends where something ends it: a reader that is gone, an interruption, a mistake of ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from moebench.bench import cli
from moebench.bench.gate import command
from moebench.results.gate import GateResult, Skipped

def result(*arguments):
    {body}

command.sides_of = lambda options: {{}}
command.cases_of = lambda *arguments: None
command.run_gate = result
sys.exit(cli.main(["gate", "--base", "x", "--junit", sys.argv[1], "--github"]))
"""

BROKEN = """broken = tuple(Skipped("case", "key", "broken", "it crashed") for _ in range(1000))
    return GateResult("run", "a", "b", (), broken, None, 1.0, 1000)"""


def end(body, tmp_path, **streams):
    command = [sys.executable, "-c", CODE.format(body=body), str(tmp_path / "gate.xml")]
    environment = {**os.environ, "MOEBENCH_CACHE": str(tmp_path / "cache"), "MOEBENCH_STORE": str(tmp_path / "store")}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, env=environment, **streams)


def test_a_reader_that_is_gone_changes_no_verdict(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = end(BROKEN, tmp_path, stdout=write)
    os.close(write)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "gate.xml").read_text().count("<failure") == 1000


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("raise KeyboardInterrupt", 130, "nothing is kept"),
        ("raise ZeroDivisionError", 2, "a mistake of ours"),
    ],
)
def test_what_is_no_verdict_has_no_status_of_one(tmp_path, body, status, words):
    done = end(body, tmp_path, stdout=subprocess.DEVNULL)
    assert done.returncode == status
    assert words in done.stderr.splitlines()[-1]
