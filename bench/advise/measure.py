"""Runs the best placements that this host has the means for, and sets what they took beside what was predicted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...contracts import MoebenchError, Registry
from .advice import Advice
from .hardware import Hardware
from .placements import FROM_DISK, IN_RAM, Placement
from .validate import COMMON, Compared, compare, run_suite

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED = ("int8", "int4")


def measured(
    advice: Advice, most: int, registry: Registry, hardware: Hardware, store: Path, quiet: bool
) -> list[Compared]:
    """Return the first ``most`` placements of the advice that run here, measured beside their predictions.

    Raises MoebenchError where the weights are not here, or no placement of the advice is one of this harness.
    """
    folder = advice.described.folder
    if folder is None:
        raise MoebenchError("--measure needs the weights; name a folder with all its *.safetensors.")
    chosen = [(one, settings) for one in advice.ranked if (settings := settings_of(one, folder, registry))][:most]
    if not chosen:
        raise MoebenchError("--measure runs what lies in RAM or on disk, and nothing of that fits; raise --ram.")
    return list(_compared(chosen, registry, hardware, store, quiet))


def _compared(
    chosen: list[tuple[Placement, list[str]]], registry: Registry, hardware: Hardware, store: Path, quiet: bool
) -> Iterator[Compared]:
    for one, settings in chosen:
        run = run_suite(settings, registry, store, quiet)
        if len(run) != 1:
            raise MoebenchError(f"'{one.form}, {one.name}' cannot be run here; choose others with --form.")
        (found,) = run
        yield compare(f"{one.form}, {one.name}", found, registry, hardware, store)


def settings_of(one: Placement, folder: Path, registry: Registry) -> list[str] | None:
    """Return the settings of a run that does what the placement says; None where this harness does not."""
    form = one.form if one.form in (*DTYPES, *QUANTIZED) else None
    backend = {IN_RAM: "eager", FROM_DISK: "offload"}.get(one.name)
    if form is None or backend is None:
        return None
    if form in QUANTIZED and backend == "eager":
        backend = "packed"
    dtype = form if form in DTYPES else "bfloat16"
    settings = [*COMMON, "model=hf", f"model.path={folder.resolve()}", f"axes.backend={backend}", f"axes.dtype={dtype}"]
    settings += [f"axes.tokens={one.load.batch}", f"axes.quantization={form if form in QUANTIZED else 'none'}"]
    text = registry.get("model", "hf").params_from({"path": str(folder)}).recorded
    settings.append(f"axes.traffic={'recorded' if text else 'gaussian'}")
    return [*settings, f"params.backend.offload.capacity={one.share}"] if backend == "offload" else settings
