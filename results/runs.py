"""``run.json``: what the engine knows of a run and its host, as rows of tables ``runs`` and ``hosts``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ResultsError
from .parts import RUN_FILE
from .rows import arrow_table
from .schema import TABLES


def read_run(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of tables runs and hosts that ``run.json`` of a run holds; its other fields are the engine's."""
    try:
        values = json.loads((folder / RUN_FILE).read_bytes())
        host = values.get("host") or {}
        shared = {"run_id": folder.name, "host_key": values.get("host_key") or host.get("host_key")}
        rows = {
            "runs": [_row("runs", {**values, **shared})],
            "hosts": [_row("hosts", {**host, **shared})] if host else [],
        }
        for table in rows:
            arrow_table(table, rows[table])
    except FileNotFoundError:
        return {"runs": [], "hosts": []}
    except (OSError, ValueError, AttributeError, TypeError, ResultsError) as error:
        reason = str(error).rstrip(".")
        sentence = f"{folder.name}/{RUN_FILE} is damaged ({reason}); restore it: its parts are read without it."
        raise ResultsError(sentence) from None
    return rows


def _row(table: str, values: dict[str, Any]) -> dict[str, Any]:
    return {column: values.get(column) for column in TABLES[table]}
