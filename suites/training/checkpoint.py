"""Checkpoints: folders with safetensors and JSON that appear whole or not at all; the newest is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...contracts import MoebenchError
from ..models.cache import make_once
from ..models.tensors import read_checked, save_checked

TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What training goes on from after ``step`` steps; ``state`` is made of plain values."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint below ``folder`` and remove older ones once it is there."""

    def make(target: Path) -> None:
        target.mkdir()
        save_checked({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, target / TENSORS)
        (target / STATE).write_text(json.dumps(dict(checkpoint.state), allow_nan=True), encoding="utf-8")

    kept = make_once(folder / _name(checkpoint.step), make)
    for path in _all(folder):
        if path.name < kept.name:
            shutil.rmtree(path)


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint below ``folder``, None where there is none."""
    found = _all(folder)
    if not found:
        return None
    try:
        state = json.loads((found[-1] / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoebenchError(f"{found[-1]} cannot be read ({error}); delete it and run again.") from error
    return Checkpoint(int(found[-1].name), read_checked(found[-1] / TENSORS), state)


def _name(step: int) -> str:
    """Return the folder's name: names sort as steps do."""
    return f"{step:09d}"


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())
