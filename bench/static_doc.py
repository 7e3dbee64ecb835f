"""The page ``docs/gpu-static.md`` and the figures behind it, ``docs/gpu-static.json``: what compilers make of kernels.

The figures are those of a run of suite ``static``; the page is made from them, so that nothing is compiled for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..contracts import Evidence, MoebenchError, Status
from ..dashboards.data import Case, Run, load_cases, load_runs
from ..kernels.targets import DEVICES, SOURCE, TARGETS
from ..results.query import reading
from ..suites.static_kernels import KERNELS, kernel_named, shipped

COMMAND = "moebench run suite=static"

PACKAGES = ("triton", "nvidia-cuda-nvrtc")
"""The compilers, by their distributions."""

INTRO = f"""\
What compilers make of our GPU kernels, read off their code: no GPU was used, and nothing here is a speed. A kernel is
compiled as its backend would launch it for the layer, with the same tiles, constants and alignment.

```sh
{COMMAND}
python docs/generate.py --static STORE
```

Triton's kernels are compiled by Triton and the assemblers in its wheel, CUDA C++ by NVRTC; registers, stack, spills and
instructions come from cuobjdump, or from the text that AMD's compiler leaves. A case is `wrong` where its code spills
or has a stack, where no block fits a multiprocessor, or where a product of bfloat16 or float16 has no tensor-core
instruction or (on CUDA) no asynchronous copy. These bars are looked at before registers: code that spills may show few
of them. Occupancy is what a multiprocessor can hold of a kernel at once, by the rules of NVIDIA's `cuda_occupancy.h`,
with which the tests compare; limits of gfx942 are from memory. On sm_100 the CUDA C++ kernels use the older `mma.sync`
(HMMA), not tcgen05.

`moebench gate` judges registers, stack, spills, shared memory and occupancy exactly. No kernels of others stand beside
ours: the only grouped product in the packages that are installed is a template of torch's inductor, which that renders
for a device that is there. Quantized weights and the backward are compiled by no case yet.

Cells: registers a thread / KiB of shared memory a block / blocks a multiprocessor (share of its warps) / tensor-core
instructions / asynchronous copies. A dash: no backend launches it there, because its pipeline does not fit the shared
memory, or because its code spills (`BARRED` in `kernels/triton/tiles.py`: `suite.tile` compiles such a one all the
same).
"""

BOUNDS = f"""\
A model, not a measurement (evidence `model`, never beside the rows above): the least time that each device's dense peak
rate and bandwidth leave for the routed experts of the layer, whichever takes longer, with tokens spread evenly. Figures
of devices: {SOURCE}. Times in microseconds.
"""


def static_results(store: Path) -> dict[str, Any]:
    """Return the latest row of each case of suite ``static`` in ``store``, as ``docs/gpu-static.json`` holds them.

    Rows of tiles that were named by hand, and that no backend chooses from, are not among them.
    """
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, dict[str, Any]] = {}
    with reading(store) as connection:
        for run in load_runs(connection):
            for case in load_cases(connection, run.run_id)[0]:
                row = _row(case) if case.row["suite"] == "static" and case.key not in rows else {}
                if row and ("kernel" not in row or shipped(kernel_named(row["kernel"]), row["tile"])):
                    rows[case.key] = {**row, "run": run.run_id}
                    runs[run.run_id] = _about(run)
    if {row["evidence"] for row in rows.values()} != {Evidence.STATIC_COMPILE, Evidence.MODEL}:
        raise MoebenchError(f"the store has no run of suite static with both of its kinds; run `{COMMAND}` first.")
    return {"runs": runs, "rows": sorted(rows.values(), key=_order)}


def _about(run: Run) -> dict[str, Any]:
    return {
        "commit": run.row["git_sha"],
        "uncommitted": run.row["git_dirty"],
        "packages": {name: run.packages[name] for name in PACKAGES if name in run.packages},
    }


def _row(case: Case) -> dict[str, Any]:
    params = json.loads(case.row["params"])
    return {
        "evidence": case.row["evidence"],
        "backend": case.row["backend"],
        **params["backend"],
        **params["workload"],
        "model": case.row["model"],
        "tokens": case.row["tokens"],
        "dtype": case.row["dtype"],
        "status": case.status,
        "reason": case.row["reason"],
        "metrics": {one["name"]: one["value"] for one in case.metrics if not str(one["name"]).startswith("worker_")},
    }


def _order(row: Mapping[str, Any]) -> str:
    names = ("evidence", "dtype", "tokens", "kernel", "tile", "target", "device")
    return json.dumps([row.get(name, "") for name in names])


def static_page(results: Mapping[str, Any]) -> str:
    """Return the page."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    compiled = [row for row in rows if row["evidence"] == Evidence.STATIC_COMPILE]
    lines = ["# GPU kernels as compiled", "", INTRO]
    lines += [f"The layer is that of {', '.join(sorted({row['model'] for row in rows}))}. {_count(compiled)}", ""]
    lines += [*map(_source, results["runs"].items()), ""]
    for dtype in sorted({row["dtype"] for row in compiled}):
        lines += [f"## {dtype}", "", *_tables([row for row in compiled if row["dtype"] == dtype])]
    lines += ["## Roofline bounds", "", BOUNDS]
    lines += [*_bounds([row for row in rows if row["evidence"] == Evidence.MODEL])]
    return "\n".join(lines) + "\n"


def _source(run: tuple[str, Mapping[str, Any]]) -> str:
    name, about = run
    compilers = ", ".join(f"{package} {version}" for package, version in about["packages"].items())
    changed = " with uncommitted changes" if about["uncommitted"] else ""
    return f"- Run {name}: {compilers}; commit {str(about['commit'])[:12]}{changed}."


def _count(rows: Sequence[Mapping[str, Any]]) -> str:
    ended = {status: sum(row["status"] == status for row in rows) for status in Status}
    said = ", ".join(f"{number} {status}" for status, number in ended.items() if number)
    return f"{len(rows)} configurations: {said}."


def _tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| kernel | tile | " + " | ".join(TARGETS) + " |"
    yield "|---|---|" + "---|" * len(TARGETS)
    for kernel in KERNELS:
        own = [row for row in rows if row["kernel"] == kernel.name]
        for tile in dict.fromkeys(row["tile"] for row in own):
            cells = {row["target"]: _cell(row) for row in own if row["tile"] == tile}
            yield f"| {kernel.name} | {tile} | " + " | ".join(cells.get(target, "") for target in TARGETS) + " |"
    yield ""


def _cell(row: Mapping[str, Any]) -> str:
    if row["status"] == Status.SKIPPED:
        return "-"
    if row["status"] != Status.OK:
        return f"**{row['status']}**: {row['reason']}"
    of = row["metrics"]
    held = f"{of['blocks_per_processor']:.0f} ({of['occupancy']:.0%})"
    mix = f"{of['tensor_instructions']:.0f} / {of['async_copy_instructions']:.0f}"
    return f"{of['registers']:.0f} / {of['shared_memory'] / 1024:.1f} / {held} / {mix}"


def _bounds(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| dtype | tokens | flop/byte | " + " | ".join(DEVICES) + " |"
    yield "|---|---|---|" + "---|" * len(DEVICES)
    for dtype, tokens in sorted({(row["dtype"], row["tokens"]) for row in rows}):
        own = {row["device"]: row["metrics"] for row in rows if (row["dtype"], row["tokens"]) == (dtype, tokens)}
        intensity = next(iter(own.values()))["intensity"]
        times = " | ".join(f"{own[device]['time_bound']:.1f}" if device in own else "-" for device in DEVICES)
        yield f"| {dtype} | {tokens} | {intensity:.1f} | {times} |"
