"""What this machine is and what runs on it: facts for every run, NULL where a fact cannot be had."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from ..contracts import KINDS, make_key
from ..suites.offload.energy import microjoules
from .gpu.nvml import all_gpus

PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "lm-eval",
    "triton",
    "nvidia-cuda-nvrtc",
    "duckdb",
    "pyarrow",
    "plotly",
    "hydra-core",
    "safetensors",
)
"""The packages whose versions every run stores by name; the plan hash covers all that are installed."""

SOURCE_SUFFIXES = (".py", ".yaml", ".c", ".cpp", ".cu", ".cuh", ".h", ".sql")

ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def host_facts() -> dict[str, Any]:
    """Return the facts of this host; the part under ``stable`` identifies it, the rest is a snapshot."""
    import psutil

    flags, model = _cpu()
    stable = {
        "cpu": model,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": caches(),
        "memory_bytes": psutil.virtual_memory().total,
        "machine": platform.machine(),
        "system": platform.system(),
        "gpus": _try(all_gpus),
    }
    snapshot = {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": list(os.getloadavg()),
        "memory_available_bytes": psutil.virtual_memory().available,
        "frequency_governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "aslr": _read("/proc/sys/kernel/randomize_va_space"),
        "rapl_uj": microjoules(),
    }
    return {"host_key": make_key(stable), "stable": stable, "snapshot": snapshot}


def _cpu() -> tuple[set[str], str]:
    text = _read("/proc/cpuinfo") or ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return set(fields.get("flags", "").split()), fields.get("model name", platform.processor() or "unknown")


def caches() -> dict[str, int]:
    """Return the sizes in bytes of the data caches of core 0, such as ``{"L1": 49152, "L2": 2097152}``."""
    sizes: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (_read(str(folder / name)) for name in ("type", "level", "size"))
        if kind in ("Data", "Unified") and level and size:
            unit = {"K": 1024, "M": 1024**2, "G": 1024**3}.get(size[-1])
            sizes[f"L{level}"] = int(size[:-1]) * unit if unit else int(size)
    return sizes


def last_level_cache() -> int | None:
    """Return the bytes of the last cache level, or None where the system does not tell."""
    sizes = caches()
    return sizes[max(sizes)] if sizes else None


def _try(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    except Exception:  # a fact that cannot be had is NULL, whatever the driver raises
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def packages() -> dict[str, str]:
    """Return the installed distributions with their versions."""
    about = [dist.metadata for dist in metadata.distributions()]  # a distribution reads its file for each question
    return {one["Name"].lower(): one["Version"] for one in about if one["Name"]}


def git_facts(folder: Path) -> tuple[str | None, bool | None]:
    """Return (commit, uncommitted changes) of the checkout at ``folder``, or (None, None) outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def source_hash(plugins: list[str]) -> str:
    """Return the hash of every source file, as it is now: ours, those of installed plug-ins, and the given files."""
    root = Path(__file__).resolve().parent.parent
    folders = [path for path in root.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    found = [*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*"))]
    ours = [path for path in found if path.suffix in SOURCE_SUFFIXES and "runs" not in path.relative_to(root).parts]
    files = {str(path.relative_to(root)): path for path in ours}
    files |= {f"plugin:{Path(path).resolve()}": Path(path) for path in plugins}
    files |= {f"installed:{path}": path for path in _installed_plugin_files()}
    return make_key({name: make_key(path.read_text(errors="replace")) for name, path in files.items()})


def _installed_plugin_files() -> set[Path]:
    """Return the Python files of the packages behind entry points; an editable one changes without a new version."""
    found = metadata.entry_points()
    modules = {point.module.split(".")[0] for kind in KINDS for point in found.select(group=f"moebench.{kind}")}
    files: set[Path] = set()
    for module in modules:
        spec = _try(functools.partial(importlib.util.find_spec, module))
        if spec is None:
            continue
        for folder in spec.submodule_search_locations or ():
            files |= set(Path(folder).rglob("*.py"))
        if spec.origin and Path(spec.origin).is_file():
            files.add(Path(spec.origin))
    return files
