"""What a check says, how all of them are run, and what is written of them. Knows no GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

BUDGET_S = 15 * 60.0
"""A check that would begin later is told as not run, which is a failure; one that has begun may end later."""


@dataclass(frozen=True)
class Result:
    """One outcome: ``reason`` says why it is not passed, ``data`` holds its figures."""

    name: str
    status: str
    reason: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


Check = Callable[[], Iterable[Result]]


def run_all(
    checks: Mapping[str, Check], tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> list[Result]:
    """Run every check in turn, whatever the others say; one that raises has failed, and so has one without a result."""
    began = clock()
    results: list[Result] = []
    for name, check in checks.items():
        for result in _guarded(name, check, clock() - began):
            results.append(result)
            tell(line(result))
    return results


def _guarded(name: str, check: Check, spent: float) -> Iterator[Result]:
    if spent > BUDGET_S:
        yield Result(name, FAILED, f"not run: {BUDGET_S / 60:.0f} minutes were spent before it")
        return
    found = 0
    try:
        for result in check():
            found += 1
            yield result
    except Exception as error:
        yield Result(name, FAILED, f"{type(error).__name__}: {error}")
        return
    if not found:
        yield Result(name, FAILED, "it looked at nothing")


def line(result: Result) -> str:
    """Return a result in one line."""
    return f"{result.status:8s} {result.name}" + (f": {result.reason}" if result.reason else "")


def exit_code(results: Sequence[Result]) -> int:
    """Return 0 where something passed and nothing failed; what is skipped is neither."""
    statuses = [result.status for result in results]
    return int(FAILED in statuses or PASSED not in statuses)


def document(machine: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Return what is written: the machine, how many results of each status, and all of them."""
    counts = {status: sum(one.status == status for one in results) for status in (PASSED, FAILED, SKIPPED)}
    return {"machine": dict(machine), "counts": counts, "results": [asdict(result) for result in results]}
