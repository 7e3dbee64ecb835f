"""Where results go: ``store=`` or ``--store``, then $MOEBENCH_STORE, then ``./results``."""

from __future__ import annotations

import os
from pathlib import Path

from ..contracts import MoebenchError


def store_path(given: str | None) -> Path:
    """Return the folder of the store; it need not exist yet."""
    path = Path(given or os.environ.get("MOEBENCH_STORE") or "results").expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise MoebenchError(f"the store {path} is a file; choose a folder with store=PATH or $MOEBENCH_STORE.")
    return path


def existing_store(given: str | None) -> Path:
    """Return the store, which must hold runs."""
    path = store_path(given)
    if not (path / "runs").is_dir():
        raise MoebenchError(f"the store {path} holds no runs yet; run `moebench run suite=selftest` first.")
    return path
