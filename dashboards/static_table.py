"""The table of kernels that suite ``static`` compiled: what their code needs and what it is made of."""

from __future__ import annotations

from collections.abc import Sequence

from .data import Case
from .query import parse_json
from .tables import esc, text

COLUMNS = {
    "registers": ("registers a thread", 1),
    "shared_memory": ("shared KiB a block", 1024),
    "blocks_per_processor": ("blocks a multiprocessor", 1),
    "occupancy": ("share of its warps, %", 0.01),
    "tensor_instructions": ("tensor-core instructions", 1),
    "async_copy_instructions": ("asynchronous copies", 1),
    "barrier_instructions": ("barriers", 1),
    "atomic_instructions": ("atomics", 1),
    "instructions": ("instructions", 1),
}
"""Title and unit of each metric that is shown. Stack and spills are none: code that has any is not ok."""


def static_table(cases: Sequence[Case]) -> str:
    """Return the table of the ok cases with evidence ``static-compile`` as HTML; nothing where there are none."""
    compiled = [case for case in cases if case.row["evidence"] == "static-compile" and case.ok and case.metrics]
    if not compiled:
        return ""
    titles = ("target", "backend", "kernel", "tile", "dtype", *(title for title, _ in COLUMNS.values()))
    head = "".join(f'<th scope="col">{esc(title)}</th>' for title in titles)
    body = "".join(sorted(map(_row, compiled)))
    return (
        '<div class="scroll" role="region" aria-label="compiled kernels" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(case: Case) -> str:
    params = parse_json(case.row["params"])
    backend, workload = params.get("backend", {}), params.get("workload", {})
    told = {str(metric["name"]): metric["value"] for metric in case.metrics}
    names = (workload.get("target"), case.row["backend"], backend.get("kernel"), backend.get("tile"), case.row["dtype"])
    numbers = (_number(told.get(name), unit) for name, (_, unit) in COLUMNS.items())
    return f"<tr>{''.join(f'<td>{text(name)}</td>' for name in names)}{''.join(numbers)}</tr>"


def _number(value: float | None, unit: float) -> str:
    return f'<td class="number">{text(None if value is None else f"{value / unit:.4g}")}</td>'
