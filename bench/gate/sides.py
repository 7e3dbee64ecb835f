"""A side of a gate: an interpreter and a PYTHONPATH that give it its own code. Nothing of a side is imported here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...contracts import MoebenchError, make_key
from ...suites.models.cache import make_once
from .environments import interpreter_for, last_line, pip_install
from .trees import HASH_DIGITS, OURS, SHORT, UNCOMMITTED, cleanup, commit, committed_tree, is_ours, toplevel
from .trees import uncommitted_tree as uncommitted

__all__ = ["Side", "cleanup", "environment_side", "revision_side", "wheel_side"]

FACTS = """
import importlib.metadata as metadata, json, sys
import moebench.bench.host as host
found = sorted([dist.name or "", dist.version] for dist in metadata.distributions())
print(json.dumps([sys.version, found, host.source_hash([])]))
"""
"""Run in an environment: what identifies its code."""


@dataclass(frozen=True)
class Side:
    """One side of a gate.

    ``name`` is for people: ``HEAD~1 (1a2b3c4)``, ``work tree (1a2b3c4 + changes)``, ``wheel foo-1.0``,
    ``environment /x``. ``python`` is its interpreter, ``environment`` what its processes get besides ours, ``cwd``
    where they start (None: here). ``version`` identifies its code: sha, sha and hash of changes, sha256 of a wheel, or
    hash of all that is installed.
    """

    name: str
    python: str
    environment: Mapping[str, str]
    cwd: Path | None
    version: str


def revision_side(repo: Path, rev: str, cache: Path) -> Side:
    """Return the side of a git revision of ``repo``, or of its uncommitted work tree with ``.``.

    Of moebench itself the tree is imported as ``moebench``; of another repository its ``src`` or its root is on the
    path, and moebench comes from here.
    """
    root = toplevel(repo)
    cache = cache.absolute()
    if rev == UNCOMMITTED:
        tree, version = uncommitted(root, cache)
        changes = " + changes" if "-" in version else ""
        name = f"work tree ({version[:SHORT]}{changes})"
    else:
        version = commit(root, rev)
        tree, name = committed_tree(root, version, cache), f"{rev} ({version[:SHORT]})"
    ours = is_ours(root)
    if ours and not (tree / "bench" / "worker.py").is_file():
        raise MoebenchError(f"{name} has no bench/worker.py and cannot be measured; name a later revision.")
    python = interpreter_for(tree, root, cache)
    paths = [tree.parent] if ours else [tree / "src" if (tree / "src").is_dir() else tree]
    if not ours and python != sys.executable:
        paths.append(_ourselves(cache))
    return Side(name, python, _environment(paths, root), tree.parent if ours else tree, version)


def wheel_side(wheel: Path, cache: Path) -> Side:
    """Return the side of a wheel, unpacked without its dependencies, which come from this interpreter."""
    if not (wheel.is_file() and wheel.suffix == ".whl"):
        raise MoebenchError(f"{wheel} is no wheel; build one with `python -m build` and name the .whl file.")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    target = cache.absolute() / "gate" / f"wheel-{sha256}"

    def install(made: Path) -> None:
        pip_install(sys.executable, ["--no-deps", "--target", str(made), str(wheel.absolute())], wheel.name)

    make_once(target, install)
    name = "-".join(wheel.stem.split("-")[:2])
    return Side(f"wheel {name}", sys.executable, _environment([target]), None, sha256)


def environment_side(python: Path) -> Side:
    """Return the side of an environment of the user, given by its interpreter or its folder; it must have moebench."""
    interpreter = python / "bin" / "python" if python.is_dir() else python
    if not os.access(interpreter, os.X_OK):
        raise MoebenchError(
            f"there is no Python at {interpreter}; name an interpreter or the folder of an environment."
        )
    environment = _environment([])
    command = [str(interpreter.absolute()), "-c", FACTS]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, **environment}, timeout=300
        )
        version = make_key(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        raise MoebenchError(
            f"the environment {python} cannot import moebench ({last_line(error)}); pip install moebench in it."
        ) from error
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        raise MoebenchError(f"{interpreter} does not behave like Python ({error}); name an interpreter.") from error
    return Side(f"environment {python}", command[0], environment, None, version[: 2 * HASH_DIGITS])


def _environment(paths: list[Path], root: Path | None = None) -> dict[str, str]:
    """Return the variables of a side; entries of our PYTHONPATH stay behind, except those of the repository itself."""
    entries = [Path(entry).absolute() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kept = [entry for entry in entries if paths and not (root and entry.resolve().is_relative_to(root))]
    return {"PYTHONPATH": os.pathsep.join(map(str, [*paths, *kept])), "PYTHONSAFEPATH": "1"}


def _ourselves(cache: Path) -> Path:
    """Return a folder that makes this moebench importable by name, whatever its own folder is called."""
    package = Path(__file__).resolve().parents[2]
    folder = cache / "gate" / f"ourselves-{make_key(str(package))[:HASH_DIGITS]}"

    def link(made: Path) -> None:
        made.mkdir()
        (made / OURS).symlink_to(package, target_is_directory=True)

    return make_once(folder, link)
