"""Write the report: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import os
from pathlib import Path

from ..results.database import connect_parts
from .page import render


def write_report(store: Path, target: Path, run_id: str | None = None) -> Path:
    """Write the report of one run (the latest by default) of ``store`` to ``target`` and return its path.

    The parts are read through an in-memory database, so a run that is still writing is neither locked nor harmed.
    """
    connection = connect_parts(store)
    try:
        page = render(connection, run_id, str(store))
    finally:
        connection.close()
    return write_page(page, target)


def write_page(page: str, target: Path) -> Path:
    """Write a page to ``target`` and return its path; the file appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8", newline="\n")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target
