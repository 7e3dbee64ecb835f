"""A run's folder: found again when it was cut off, locked while somebody works in it."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..contracts import MoebenchError
from ..results.durable import remove_leftovers
from ..results.parts import inspect_part, write_json_atomic


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
        with _writable(store):
            (store / "runs").mkdir(parents=True, exist_ok=True)
            for path in sorted((store / "runs").glob("*/run.json"), reverse=True):
                lock = _try_lock(path.parent) if _is_unfinished(path, plan_hash) else None
                if lock is None:
                    continue
                if _is_unfinished(path, plan_hash):  # nobody finished it before the lock was ours
                    remove_leftovers(path.parent)
                    return cls(store, path.parent.name, lock)
                os.close(lock)
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

    def finished_cases(self, name: str) -> list[dict[str, Any]] | None:
        """Return status and flags of each case of a finished group; None where its part is absent or damaged."""
        part = self.path / name
        if not part.is_dir() or inspect_part(part) is not None:
            return None
        rows: list[dict[str, Any]] = pq.read_table(part / "cases.parquet", columns=["status", "flags"]).to_pylist()
        return rows

    def finish(self, **fields: Any) -> None:
        """Mark the run as finished: the same command will now measure anew."""
        record = {**self.record, **fields, "finished_at": now().isoformat(), "status": "finished"}
        write_json_atomic(self.path / "run.json", record)

    def discard(self) -> None:
        """Remove the run where it has no part yet: nobody will go on with it."""
        if not any(path.is_dir() for path in self.path.iterdir()):
            shutil.rmtree(self.path)

    def close(self) -> None:
        """Let others work in the folder."""
        os.close(self._lock)


@contextmanager
def _writable(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MoebenchError(
            f"the store {store} cannot be written ({error.strerror}); make room there or choose another with store=."
        ) from error


def _is_unfinished(path: Path, plan_hash: str) -> bool:
    record = read_record(path)
    return record.get("plan_hash") == plan_hash and record.get("status") == "running"


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
