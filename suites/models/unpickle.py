"""Weights that a user allows to be read from pickles (``*.bin``), written once as safetensors into the cache.

torch reads them with ``weights_only``, which builds tensors and runs nothing that a file names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save_file

from ...contracts import MoebenchError
from .cache import make_once

TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja")


def as_safetensors(folder: Path, target: Path) -> Path:
    """Return ``target``, a transformers folder with the weights of ``folder``'s ``*.bin`` files as safetensors."""
    return make_once(target, lambda aside: _convert(folder, aside))


def _convert(folder: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted({file for kind in TOKENIZER for file in folder.glob(kind)}):
        if not file.name.endswith(".bin.index.json"):
            shutil.copy(file, target / file.name)
    files = sorted(folder.glob("*.bin"))
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise MoebenchError(f"{file} is no file of plain weights ({type(error).__name__}); get another.") from None
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # tensors that share memory are stored one by one, as safetensors wants it
        save_file({key: value.clone().contiguous() for key, value in tensors.items()}, target / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
    (target / "model.safetensors.index.json").write_text(index, encoding="utf-8")
