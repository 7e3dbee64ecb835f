"""Source trees of revisions: a worktree for a commit, a copy for what is not committed.

A tree of moebench lies at ``<cache>/gate/<version>/moebench``, so that its parent on PYTHONPATH imports it by name; one
of another repository at ``<cache>/gate/<version>/tree``. The index, branches and hooks of the user are never touched.
Who uses a tree holds a shared lock on it until his process ends, so that nobody removes it meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ...contracts import MoebenchError
from ...suites.models.cache import locked, make_once

UNCOMMITTED = "."
"""The revision that stands for the work tree as it is now."""

OURS = "moebench"
SHORT = 7
HASH_DIGITS = 12
CACHED_BYTECODE = "__pycache__"
NO_STORE = ("--", ".", ":(exclude,glob)results/runs/**", ":(exclude,glob)results/*.duckdb*")
"""Leaves the store at its usual place out of a copy: every run would make another version."""

MISLEADING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX")
"""Variables that a git hook gets, which would send git to another repository or index."""

_held: dict[Path, int] = {}
"""Locks of the trees that this process uses."""


def git(folder: Path, *arguments: str) -> str:
    """Return what git prints; it takes its repository from ``folder`` alone, runs no hooks and refreshes no index."""
    command = ["git", "--no-optional-locks", "-c", "core.hooksPath=/dev/null", "-C", str(folder), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="surrogateescape", check=True, env=environment
        )
    except FileNotFoundError:
        raise MoebenchError("git is not installed; install it, or compare wheels or environments instead.") from None
    return done.stdout


def toplevel(folder: Path) -> Path:
    """Return the root of the repository in which ``folder`` lies."""
    try:
        return Path(git(folder, "rev-parse", "--show-toplevel").removesuffix("\n")).resolve()
    except subprocess.CalledProcessError as error:
        raise MoebenchError(
            f"git finds no repository at {folder} ({_complaint(error)}); run the command inside of one, or compare "
            "wheels or environments."
        ) from None


def _complaint(error: subprocess.CalledProcessError) -> str:
    lines = error.stderr.strip().splitlines() or ["git says nothing"]
    return str(lines[-1]).removeprefix("fatal: ").rstrip(".")


def is_ours(root: Path) -> bool:
    """Whether a tree is moebench itself, whose root is the package."""
    return (root / "contracts.py").is_file() and (root / "bench").is_dir()


def commit(root: Path, revision: str) -> str:
    """Return the sha of a revision."""
    try:
        found = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except subprocess.CalledProcessError:
        shallow = git(root, "rev-parse", "--is-shallow-repository").strip() == "true"
        fetch = "git fetch --unshallow" if shallow else "git fetch"
        raise MoebenchError(
            f"there is no revision '{revision}' in {root}; name another, or get it first with `{fetch}`."
        ) from None
    return found.strip()


def committed_tree(root: Path, sha: str, cache: Path) -> Path:
    """Return the tree of a commit; it is made as a detached worktree, and used again while nothing in it changed."""
    tree = cache / "gate" / sha / _folder(root)
    with locked(cache / "gate"):
        if not _is_clean(tree, sha):
            _add_worktree(root, sha, tree)
        _hold(tree.parent)
    return tree


def uncommitted_tree(root: Path, cache: Path) -> tuple[Path, str]:
    """Return a copy of the work tree (tracked files and others that are not ignored) and its version."""
    try:
        return _copied(root, cache)
    except OSError as error:
        raise MoebenchError(
            f"the work tree {root} cannot be copied ({error}); make every file readable that git does not ignore, and "
            "change none meanwhile."
        ) from error


def _copied(root: Path, cache: Path) -> tuple[Path, str]:
    sha = commit(root, "HEAD")
    if not git(root, "status", "--porcelain", "--untracked-files=all", *NO_STORE).strip():
        return committed_tree(root, sha, cache), sha
    files = list(_files(root))
    version = f"{sha}-{_digest(root, files)}"
    parent = cache / "gate" / version
    tree = parent / _folder(root)
    with locked(cache / "gate"):
        if tree.is_dir() and f"{sha}-{_digest(tree, _walk(tree))}" != version:
            shutil.rmtree(parent)
        _hold(parent)
    make_once(parent, lambda made: _copy(root, files, made / _folder(root)))
    if f"{sha}-{_digest(tree, _walk(tree))}" != version:
        raise MoebenchError(f"files in {root} changed while they were copied; run the command again.")
    return tree, version


def cleanup(cache: Path) -> None:
    """Remove the trees that no process uses, and what git remembers of them."""
    while _held:
        os.close(_held.popitem()[1])
    with locked(cache / "gate"):
        for lock in sorted((cache / "gate").glob("*.lock")):
            with lock.open("a") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                _forget(lock.with_suffix(""))
                lock.unlink()


def _forget(parent: Path) -> None:
    """Remove what a version left; of its worktree git forgets this one alone, since others may only be unmounted."""
    for mark in parent.glob("*/.git"):
        repository = _repository(mark.parent)
        if repository is not None:
            with contextlib.suppress(subprocess.CalledProcessError):
                git(repository, "worktree", "remove", "--force", str(mark.parent))
    shutil.rmtree(parent, ignore_errors=True)


def _repository(tree: Path) -> Path | None:
    try:
        return Path(git(tree, "rev-parse", "--path-format=absolute", "--git-common-dir").removesuffix("\n"))
    except subprocess.CalledProcessError:
        return None


def _folder(root: Path) -> str:
    return OURS if is_ours(root) else "tree"


def _hold(parent: Path) -> None:
    if parent not in _held:
        _held[parent] = os.open(parent.with_name(f"{parent.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(_held[parent], fcntl.LOCK_SH)


def _is_clean(tree: Path, sha: str) -> bool:
    if not (tree / ".git").is_file():
        return False
    bytecode = f":(exclude,glob)**/{CACHED_BYTECODE}/**"
    try:
        changes = git(tree, "status", "--porcelain", "--untracked-files=all", "--", ".", bytecode)
        return not changes.strip() and git(tree, "rev-parse", "HEAD").strip() == sha
    except subprocess.CalledProcessError:
        return False


def _add_worktree(root: Path, sha: str, tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    tree.parent.mkdir(parents=True, exist_ok=True)
    try:
        git(root, "worktree", "add", "--quiet", "--detach", "--force", str(tree), sha)
    except subprocess.CalledProcessError as error:
        last = _complaint(error)
        remedy = "make room there or set MOEBENCH_CACHE elsewhere."
        raise MoebenchError(f"the tree of {sha[:SHORT]} cannot be made at {tree} ({last}); {remedy}") from None


def _files(root: Path) -> Iterator[str]:
    """Yield what the copy holds, in order; submodules and files that were deleted are none."""
    listed = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", *NO_STORE).split("\0")
    for name in sorted(set(listed) - {""}):
        path = root / name
        if path.is_symlink() or path.is_file():
            yield name


def _walk(tree: Path) -> list[str]:
    found = (path for path in tree.rglob("*") if path.is_symlink() or path.is_file())
    names = (path.relative_to(tree) for path in found if CACHED_BYTECODE not in path.parts)
    return sorted(name.as_posix() for name in names)


def _digest(root: Path, files: list[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        path = root / name
        content = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
        digest.update(f"{name}\0{path.is_symlink()}\0{len(content)}\0".encode(errors="surrogateescape"))
        digest.update(content)
    return digest.hexdigest()[:HASH_DIGITS]


def _copy(root: Path, files: list[str], target: Path) -> None:
    target.mkdir(parents=True)
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name, follow_symlinks=False)
