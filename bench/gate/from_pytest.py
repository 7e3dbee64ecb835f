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
from .cases import Cases, in_batches, target_case
from .command import run_gate
from .config import GateConfig, PairedCase
from .sides import cleanup, revision_side

TRIAL = "moebench.bench.pytest_trial:make_trial"


def pytest_gate(
    nodeids: Sequence[str], refused: Mapping[str, str], root: Path, base: str, arguments: Sequence[str]
) -> int:
    """Gate the benchmarks ``nodeids`` of repository ``root`` against its revision ``base``; print the table.

    Returns the exit status. ``refused`` maps benchmarks to why they cannot be gated; ``arguments`` are pytest's, for
    the trials of both sides.
    """
    if not nodeids:
        raise MoebenchError("none of the session's benchmarks can be gated; see the reasons above.")
    paired = [_paired(node, arguments) for node in nodeids]
    left = [(_paired(node, arguments), why) for node, why in refused.items()]
    cases = Cases(in_batches(paired), tuple(left))
    cache = cache_dir()
    command = shlex.join(["pytest", *sys.argv[1:]])
    try:
        sides = {"base": revision_side(root, base, cache), "candidate": revision_side(root, ".", cache)}
        result = run_gate(sides, cases, GateConfig(), store_path(None), command=command)
    finally:
        cleanup(cache)
    print(gate_table(result))
    return result.status


def _paired(nodeid: str, arguments: Sequence[str]) -> PairedCase:
    case = target_case(TRIAL, [nodeid, list(arguments)])
    return PairedCase(nodeid, case, case)
