"""The interpreter for a revision: this one where it declares the same dependencies as we have, else one of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ...contracts import MoebenchError, make_key
from ...suites.models.cache import make_once
from .trees import HASH_DIGITS

DECLARING = ("requirements*.txt", "constraints*.txt", "*.lock", "pylock*.toml")
"""Files at the root of a repository that decide what is installed, besides the tables of pyproject.toml."""

CONSTRAINTS = "constraints.txt"
REQUIREMENTS = "requirements.txt"


def interpreter_for(tree: Path, here: Path, cache: Path) -> str:
    """Return an interpreter with the dependencies that ``tree`` declares; ``here`` is the tree of this interpreter."""
    wanted = declarations(tree)
    if wanted == declarations(here):
        return sys.executable
    requirements = sorted({*_requirements(tree), *_own_requirements()})
    key = make_key([wanted, requirements, sys.version])[: 2 * HASH_DIGITS]
    target = make_once(cache / "environments" / key, lambda made: _make_environment(made, tree, requirements))
    return str(target / "bin" / "python")


def declarations(tree: Path) -> dict[str, Any]:
    """Return everything that a tree declares about its dependencies."""
    project = _project(tree)
    names = ("dependencies", "optional-dependencies", "requires-python")
    found: dict[str, Any] = {name: project[name] for name in names if name in project}
    for pattern in DECLARING:
        found |= {path.name: path.read_text(errors="replace") for path in tree.glob(pattern) if path.is_file()}
    return found


def _project(tree: Path) -> dict[str, Any]:
    file = tree / "pyproject.toml"
    if not file.is_file():
        return {}
    try:
        project: dict[str, Any] = tomllib.loads(file.read_text()).get("project", {})
    except (ValueError, OSError) as error:
        raise MoebenchError(f"pyproject.toml of {tree} cannot be read ({error}); mend it in that revision.") from error
    return project


def _requirements(tree: Path) -> Iterator[str]:
    """Yield the dependencies, and of the optional ones those that this interpreter has too."""
    project = _project(tree)
    yield from project.get("dependencies", ())
    for group in project.get("optional-dependencies", {}).values():
        for requirement in group:
            name = _name(requirement)
            if name != _name(project.get("name", "")) and any(metadata.distributions(name=name)):
                yield requirement


def _own_requirements() -> list[str]:
    """Return what moebench itself needs; pip leaves out what belongs to its extras."""
    try:
        return metadata.requires("moebench") or []
    except metadata.PackageNotFoundError:
        return []


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower()


def _make_environment(folder: Path, tree: Path, requirements: Sequence[str]) -> None:
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise MoebenchError(
            f"no virtual environment can be made ({last_line(error)}); install Python's venv module."
        ) from error
    arguments = list(requirements)
    for flag, file in (("-r", REQUIREMENTS), ("-c", CONSTRAINTS)):
        arguments += [flag, str(tree / file)] if (tree / file).is_file() else []
    if arguments:
        pip_install(str(folder / "bin" / "python"), arguments, "the dependencies of that revision", tree)


def pip_install(python: str, arguments: Sequence[str], what: str, cwd: Path | None = None) -> None:
    """Install with pip, or say in one sentence why it could not."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd)
    except subprocess.CalledProcessError as error:
        raise MoebenchError(
            f"pip cannot install {what} ({last_line(error)}); mend that, or make an environment and name it instead."
        ) from error


def last_line(error: subprocess.CalledProcessError) -> str:
    """Return the last line that a command printed before it failed, without a full stop."""
    lines = [line.strip() for line in f"{error.stdout}\n{error.stderr}".splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else f"exit status {error.returncode}"
