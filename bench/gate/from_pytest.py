"""Benchmarks of a pytest session as cases of a gate: what ``--moebench-gate REV`` does once the session has ended."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...contracts import MoebenchError
from ...dashboards.gate_text import gate_table
from ...suites.models.cache import cache_dir
from ..store import store_path
from .cases import Cases, target_case
from .command import run_gate, status
from .config import GateConfig, PairedCase
from .sides import revision_side

TRIAL = "moebench.bench.pytest_trial:make_trial"


def pytest_gate(nodeids: Sequence[str], refused: Mapping[str, str], base: str, arguments: Sequence[str]) -> int:
    """Gate the benchmarks ``nodeids`` of the work tree against revision ``base``; print the table, return the status.

    ``refused`` maps benchmarks to why they cannot be gated; ``arguments`` are pytest's, for the trials of both sides.
    """
    if not nodeids:
        raise MoebenchError("none of the session's benchmarks can be gated; see the reasons above.")
    paired = [PairedCase(node, case, case) for node in nodeids for case in [target_case(TRIAL, [node, list(arguments)])]]
    left = [(PairedCase(node, case, case), why) for node, why in refused.items() for case in [target_case(TRIAL, [node])]]
    cache = cache_dir()
    sides = {"base": revision_side(Path.cwd(), base, cache), "candidate": revision_side(Path.cwd(), ".", cache)}
    command = shlex.join(["pytest", *sys.argv[1:]])
    result = run_gate(sides, Cases((tuple(paired),), tuple(left)), GateConfig(), store_path(None), command=command)
    print(gate_table(result))
    return status(result)
