"""Traces in files, with what lies beside them. Imports no torch.

The hints of ``NAME.parquet`` lie in ``NAME.hints.parquet``, and its metadata says how it was made.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...backends.offload.access import Access, Layout
from ..trace import SUFFIXES, Trace, TraceError, facts_of, load_trace, save_trace, sha256_of_file
from .accesses import accesses_of, layout_of


@dataclass(frozen=True)
class TraceFile:
    """A trace with what lies beside it. ``facts`` are what whoever made the file said of it; see ``facts_of``."""

    trace: Trace
    hints: Trace | None
    layout: Layout
    facts: dict[str, Any]

    def accesses(self, layers: Collection[int] | None = None) -> list[Access]:
        """Return what the trace asks a cache for, hints included."""
        return accesses_of(self.trace, layers, self.hints)


def hints_file(path: str | Path) -> Path:
    """Return where the hints of the trace in ``path`` lie: ``a/b.hints.parquet`` for ``a/b.parquet``."""
    file = Path(path)
    return file.with_name(f"{file.stem}.hints{file.suffix}")


def read_trace(path: str, sha256: str | None = None) -> TraceFile:
    """Return the trace in ``path`` with its hints, where there are some; TraceError says what is wrong.

    ``sha256`` is what the file's content must have; None takes the file as it is. Hints that the trace's own facts pin
    are held to that; a trace that says how it was made and pins none has none, whatever lies beside it.
    """
    trace, facts = load_trace(path, sha256 or sha256_of_file(path)), facts_of(path)
    file, pinned = hints_file(path), facts.get("hints_sha256")
    there = pinned is not None or (not facts and file.exists())
    hints = load_trace(str(file), pinned or sha256_of_file(str(file))) if there else None
    return TraceFile(trace, hints, layout_of(trace, facts.get("experts")), facts)


def check_target(path: str, force: bool) -> None:
    """Raise MoebenchError where a trace cannot be written to ``path``, or ``force`` is missing to replace one."""
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise TraceError(f"'{path}' is no name of a trace; end it in .parquet.")
    if not file.parent.is_dir():
        raise TraceError(f"{file.parent} is no folder; make it, or write the trace elsewhere.")
    for existing in (file, hints_file(file)):
        if existing.exists() and not force:
            raise TraceError(f"{existing} is there already; name another file, or replace it with --force.")
    if not os.access(file.parent, os.W_OK):
        raise TraceError(f"{file.parent} cannot be written; write the trace elsewhere.")


def write_trace(
    path: str, columns: Mapping[str, Any], facts: Mapping[str, Any], hints: Mapping[str, Any] | None = None
) -> str:
    """Write a trace and its hints, and return the trace's sha256; each file appears whole or not at all.

    The hints come first and the trace names their sha256, so a trace never stands beside hints of another.
    """
    beside = hints_file(path)
    try:
        if hints is None:
            beside.unlink(missing_ok=True)
            return _write(Path(path), columns, facts)
        return _write(Path(path), columns, {**facts, "hints_sha256": _write(beside, hints, {})})
    except OSError as error:
        raise TraceError(f"{path} cannot be written ({error.strerror or error}); write it elsewhere.") from error


def _write(file: Path, columns: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    aside = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        sha256 = save_trace(str(aside), dict(columns), facts)
        aside.rename(file)
    finally:
        aside.unlink(missing_ok=True)
    return sha256
