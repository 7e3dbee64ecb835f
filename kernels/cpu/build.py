"""Our C and C++ sources, built on first use by the system's compiler and kept by the hash of what they are made from.

Nothing is built when this module is imported. Two processes may build at once: each writes a file of its own aside and
renames it. The code is for this machine's instructions, which are part of the hash: a cache may be shared.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...contracts import MoebenchError

ARITHMETIC = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd")
"""What compilers may do to numbers: fuse a product with a sum, and reorder the sums that the source names."""

FLAGS = ("-std=c11", "-O3", *ARITHMETIC, "-fPIC", "-shared")

NATIVE = (("-march=native",), ("-mcpu=native",), ())
"""How compilers are told to use all instructions of this machine; the first that is understood is taken."""

SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"

BUILD_SECONDS = 120
"""A compiler that takes longer hangs."""


@dataclass(frozen=True)
class Library:
    """A loaded library and how it was compiled, as an executed path tells it."""

    handle: ctypes.CDLL
    told: str


def cache_root() -> Path:
    """Return ``$MOEBENCH_CACHE``, or ``~/.cache/moebench``."""
    return Path(os.environ.get("MOEBENCH_CACHE") or Path.home() / ".cache" / "moebench").expanduser()


COMPILERS = {"CC": ("C", ("cc", "gcc", "clang")), "CXX": ("C++", ("c++", "g++", "clang++"))}
"""The language and the usual names of the compiler that each variable names."""


def compiler(variable: str = "CC") -> str | None:
    """Return the compiler in ``variable`` (CC or CXX), or the first of the usual ones; None where there is none."""
    named = os.environ.get(variable)
    return next(filter(None, map(shutil.which, [named] if named else COMPILERS[variable][1])), None)


def missing(who: str, variable: str = "CC") -> str:
    """Return why ``who`` cannot be built here, or an empty string; nothing is built to find out."""
    language, (_, *usual) = COMPILERS[variable]
    remedy = f"install {' or '.join(usual)}, or name one in {variable}"
    return "" if compiler(variable) else f"{who} needs a {language} compiler; {remedy}"


@cache
def library(name: str) -> Library:
    """Return ``kernels/cpu/<name>.c`` as a loaded library, built where the cache does not have it."""
    source, program = Path(__file__).with_name(f"{name}.c"), compiler()
    headers = sorted(source.parent.glob("*.h"))
    if program is None:
        raise MoebenchError(f"{missing(f'kernel {name}')}.")
    native, macros = _instructions(program)
    flags = (*FLAGS, *native)
    target = cached(name + SUFFIX, [program, *flags, str(source), "-lm"], (source, *headers), macros)
    return Library(load(target), f"{Path(program).name} {shlex.join(flags)}")


def cached(name: str, command: Sequence[str], made_from: Iterable[Path], version: bytes) -> Path:
    """Return what ``command`` (without -o) makes, from the cache where the same was made of the same before.

    ``made_from`` are all files that it reads; ``version`` tells this compiler from any other.
    """
    told = shlex.join(Path(word).name if Path(word).is_absolute() else word for word in command)
    parts = [*(path.read_bytes() for path in made_from), told.encode(), version]
    key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    target = cache_root() / "kernels" / f"{Path(name).stem}-{key[:16]}{Path(name).suffix}"
    if not target.is_file():
        _build(command, target)
    refuse_foreign(target)
    return target


def load(target: Path) -> ctypes.CDLL:
    """Return a library as it lies in the cache."""
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise MoebenchError(f"{target} cannot be loaded ({error}); delete it to have it built anew.") from error


def refuse_foreign(target: Path) -> None:
    """Raise MoebenchError where somebody else may have written the library: loading it runs whatever is in it."""
    found = target.stat()
    if hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0):
        why = f"belongs to user {found.st_uid}"
    elif found.st_mode & stat.S_IWOTH:
        why = "can be written by everybody"
    else:
        return
    raise MoebenchError(f"{target} {why} and is not loaded; delete it, or set MOEBENCH_CACHE to a folder of your own.")


def version(program: str) -> bytes:
    """Return what tells a compiler from any other."""
    return _run([program, "--version"]).stdout


def _instructions(program: str) -> tuple[Sequence[str], bytes]:
    """Return the flags for this machine's instructions, and what the compiler defines with them (its version too)."""
    for native in NATIVE:
        found = _run([program, *native, "-dM", "-E", "-x", "c", os.devnull])
        if found.returncode == 0:
            return native, found.stdout
    raise MoebenchError(f"{program} does not compile C ({_first_line(found.stderr)}); name another compiler in CC.")


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Give a file to write beside ``target``, which takes its place at the end: two processes may make it at once."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise MoebenchError(
            f"{target.parent} cannot be written ({error.strerror}); set MOEBENCH_CACHE elsewhere."
        ) from error
    os.close(descriptor)
    try:
        yield Path(name)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _build(command: Sequence[str], target: Path) -> None:
    with aside(target) as file:
        made = _run([*command, "-o", str(file)])
        if made.returncode:
            raise MoebenchError(
                f"{shlex.join(command)} failed ({_first_line(made.stderr)}); name another compiler in CC."
            )


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MoebenchError(f"{command[0]} does not run ({error}); name another compiler in CC.") from error


def _first_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")
