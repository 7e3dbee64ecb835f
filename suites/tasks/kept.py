"""Answers of a case that is under way, kept so that an evaluation which was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...contracts import NAMED_AXES, Case, Registry, make_key
from ...moe.artefacts import sources_sha256
from ..models import cache_dir
from ..models.cache import make_once

ROOT = Path(__file__).resolve().parents[2]
DECISIVE = ("moe", "backends", "kernels", "suites")
PACKAGES = ("torch", "transformers", "lm_eval")


class Kept:
    """One file for each shard that is done; gone once all is.

    Its folder is decided by the case, the requests (``input_sha256``), our sources, those of the plug-ins of the case,
    and packages.
    """

    def __init__(self, case: Case, registry: Registry, input_sha256: str) -> None:
        packages = [version(package) for package in PACKAGES]
        plugins = [sources_sha256(registry.get(kind, getattr(case, kind).name).factory) for kind in NAMED_AXES]
        key = make_key([case.case_key, input_sha256, _sources(), plugins, packages])
        self.folder = cache_dir() / "lm_eval" / key[:32]

    def read(self, shard: str) -> tuple[list[Any], int] | None:
        """Return the answers of a shard and the tokens that were read for them; None where it is not done."""
        file = self._file(shard)
        if not file.is_file():
            return None
        kept = json.loads(file.read_text(encoding="utf-8"))
        return [tuple(one) if isinstance(one, list) else one for one in kept["answers"]], kept["tokens"]

    def write(self, shard: str, answers: list[Any], tokens: int) -> None:
        """Keep a shard: whole or not at all."""
        text = json.dumps({"answers": answers, "tokens": tokens})
        make_once(self._file(shard), lambda aside: _written(aside, text))

    def remove(self) -> None:
        """Forget all shards: their case is done, and the next run asks anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, shard: str) -> Path:
        return self.folder / f"{shard}.json"


def _written(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


@cache
def _sources() -> str:
    """Return one sha256 over all sources that decide an answer."""
    digest = hashlib.sha256()
    for folder in DECISIVE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
