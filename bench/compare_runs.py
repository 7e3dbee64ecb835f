"""``moebench compare``: two stored runs side by side. Their times were taken apart, so they get no verdict; what has no
chance in it, and accuracy on the same items, does."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import duckdb

from ..contracts import MoebenchError, Status
from ..dashboards.compare_text import compare_table
from ..dashboards.data import Case, Run, load_cases, load_runs
from ..results.accuracy_gate import ItemKey, judge_items
from ..results.deterministic import judge_metrics
from ..results.gate import Exit, Judged
from ..results.query import plain, reading
from ..results.verdict import Verdict
from .run_ids import find_run
from .store import existing_store

ITEMS = "SELECT case_key, task, item, metric, value FROM items WHERE run_id = ?"
INPUTS = "SELECT case_key, input_sha256 FROM cases WHERE run_id = ?"


@dataclass(frozen=True)
class RunContent:
    """A run with what can be compared of it: cases, and by case key the values of items and the hash of inputs."""

    run: Run
    cases: Mapping[str, Case]
    items: Mapping[str, Mapping[ItemKey, float | None]]
    inputs: Mapping[str, str | None]
