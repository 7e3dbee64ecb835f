"""Files that are whole or not there: written aside, synced, renamed once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ResultsError
from .faults import fault

STALE_S = 24 * 3600.0
"""What nobody finished for this long is left over, whoever began it."""


@contextmanager
def told_plainly(path: Path) -> Iterator[None]:
    """Turn an error of the file system (full disk, no permission, a file in the way) into one sentence."""
    try:
        yield
    except OSError as error:
        raise ResultsError(
            f"cannot write {path} ({error.strerror or error}): make room there or choose another folder; "
            "what was written before is kept."
        ) from error


def write_file(path: Path, data: bytes) -> None:
    """Write and sync one new file; the caller makes it visible by a rename."""
    with path.open("wb") as file:
        half = len(data) // 2
        file.write(data[:half])
        file.flush()
        fault("write")
        file.write(data[half:])
        file.flush()
        os.fsync(file.fileno())
    fault("fsync")


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder with its parents, durably."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename once and make the new name durable; raises OSError where ``target`` is a folder with content."""
    fault("rename")
    os.rename(source, target)
    fault("rename")
    sync_folder(target.parent)


def write_file_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by a file with this content, or leave it as it was."""
    aside = path.with_name(aside_name(path.name))
    with told_plainly(path):
        make_folder(path.parent)
        try:
            write_file(aside, data)
            rename(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON (UTF-8, indented, no NaN), or leave it as it was."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultsError(
            f"{path.name} cannot be written as JSON ({error}); store plain values and None for NaN."
        ) from error
    write_file_atomic(path, text.encode() + b"\n")


def aside_name(name: str) -> str:
    """Return the name under which this process writes what will be called ``name``; readers ignore such names."""
    return f".tmp-{name}-{socket.gethostname()}-{os.getpid()}"


def remove_leftovers(folder: Path) -> None:
    """Remove what writers of this host that are dead by now left half-written in ``folder``."""
    for path in folder.glob(".tmp-*"):
        if not _is_leftover(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_leftover(path: Path) -> bool:
    start, _, pid = path.name.rpartition("-")
    try:
        if start.endswith(f"-{socket.gethostname()}") and pid.isdigit():
            return int(pid) == os.getpid() or not _is_alive(int(pid))
        return time.time() - path.stat().st_mtime > STALE_S
    except FileNotFoundError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
