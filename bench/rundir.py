"""A run's folder: found again when it was cut off, locked while somebody works in it."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..contracts import MoebenchError
from ..results.parts import write_json_atomic


def now() -> datetime.datetime:
    """Return the time in UTC without a zone, as the database stores it."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


class RunFolder:
    """``<store>/runs/<run_id>/`` with its ``run.json``; holds a file lock until ``close``."""

    def __init__(self, store: Path, run_id: str, lock: int) -> None:
        self.store, self.run_id, self._lock = store, run_id, lock
        self.path = store / "runs" / run_id

    @classmethod
    def open(cls, store: Path, plan_hash: str, facts: Mapping[str, Any]) -> RunFolder:
        """Return the unfinished run of this plan where there is one, or a new run."""
        try:
            (store / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MoebenchError(f"the store {store} cannot be written ({error.strerror}); choose another.") from error
        for path in sorted((store / "runs").glob("*/run.json"), reverse=True):
            record = read_record(path)
            if record.get("plan_hash") != plan_hash or record.get("status") != "running":
                continue
            lock = _try_lock(path.parent)
            if lock is not None:
                return cls(store, path.parent.name, lock)
        return cls._new(store, plan_hash, facts)

    @classmethod
    def _new(cls, store: Path, plan_hash: str, facts: Mapping[str, Any]) -> RunFolder:
        started = now()
        run_id = f"{started:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        folder = store / "runs" / run_id
        folder.mkdir()
        lock = _try_lock(folder)
        if lock is None:
            raise MoebenchError(f"the new run folder {folder} is locked by another process; run the command again.")
        run = cls(store, run_id, lock)
        record = {"run_id": run_id, "plan_hash": plan_hash, "started_at": started.isoformat(), "status": "running"}
        write_json_atomic(folder / "run.json", {**record, **facts})
        return run

    @property
    def record(self) -> dict[str, Any]:
        """The run's record as it stands."""
        return read_record(self.path / "run.json")

    def has_part(self, name: str) -> bool:
        """Whether the group of this name is finished."""
        return (self.path / name / "manifest.json").is_file()

    def finish(self, **fields: Any) -> None:
        """Mark the run as finished: the same command will now measure anew."""
        record = {**self.record, **fields, "finished_at": now().isoformat(), "status": "finished"}
        write_json_atomic(self.path / "run.json", record)

    def close(self) -> None:
        """Let others work in the folder."""
        os.close(self._lock)


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a ``run.json``; an unreadable one counts as empty."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _try_lock(folder: Path) -> int | None:
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
