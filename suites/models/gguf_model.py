"""A GGUF file as a source of layers: matrices mapped from the file, decoded, and beside that as they lie there.

Shape letters: E experts, F expert width, S width of the shared expert, H hidden.
"""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contracts import MoebenchError, make_key
from ...moe.blocks.gguf import GgufTensor, read_dense, read_matrices, stacked
from ...moe.blocks.gguf_types import open_file
from ...moe.experts import Stored
from ...moe.layer import LayerWeights, SharedExpert
from ...moe.shapes import ModelShape
from ..gguf_plugins import GgufModel
from .fetch import Progress
from .gguf_config import ffn_names
from .gguf_llama import CONVERTER
from .recorded import Recorded, to_stderr


class GgufSource(Recorded):
    """A ModelSource of one file; the whole model is decoded to float32 in the cache when text is given to it."""

    def __init__(self, params: GgufModel, progress: Progress = to_stderr) -> None:
        self.params = params
        super().__init__("gguf", progress)

    @cached_property
    def shape(self) -> ModelShape:  # type: ignore[override]  # read when it is first asked for, and kept
        """Sizes, from metadata and tensors."""
        return self.params.shape()

    def identity(self) -> str:
        """Return the hash of the file and of what decodes it."""
        return make_key([self.params.weights_sha256(), *converted_by()])

    def home(self) -> Path:
        """Return where the cache keeps what is made of the model."""
        return self.params.home()

    def convert(self) -> Path:
        """Return the transformers folder of the whole model, made of the file where it is not there."""
        if not self.params.recorded:
            raise MoebenchError(f"{self.params.path} has no tokenizer to give text to; use axes.traffic=gaussian.")
        folder = self.home() / f"language_model-{make_key(converted_by())[:8]}"
        if not folder.is_dir():
            self.run_job("convert", self.params.file(), folder)
        return folder

    def layer(self, index: int) -> LayerWeights:
        """Return experts [E, 2F, H] and [E, H, F], router and shared expert, or a dense FFN, decoded to float32.

        ``stored`` has the file's own blocks of the same matrices: those of down mapped, those of gate and up copied
        above each other; None where gate and up are of two types.
        """
        self.check_index(index)
        path, names = self.params.file(), ffn_names(open_file(self.params.file()), index)
        read = read_matrices(path, names)
        gates, ups, downs = (read[name] for name in names)
        gate_up = torch.stack([torch.cat(_decoded(pair)) for pair in zip(gates, ups, strict=True)])
        down = torch.stack(_decoded(downs))
        stored = _stored(gates, ups, downs)
        if not self.shape.experts:
            return LayerWeights(gate_up[0], down[0], activation=self.shape.activation, stored=stored)
        router_EH = read_dense(path, f"blk.{index}.ffn_gate_inp.weight")
        return LayerWeights(gate_up, down, router_EH, shared=self._shared(index), stored=stored)

    def _shared(self, index: int) -> SharedExpert | None:
        if not self.shape.shared_width:
            return None
        path, block = self.params.file(), f"blk.{index}."
        gate_SH, up_SH, down_HS = (read_dense(path, f"{block}ffn_{part}_shexp.weight") for part in PARTS)
        gate_H = read_dense(path, f"{block}ffn_gate_inp_shexp.weight").flatten()
        return SharedExpert(torch.cat([gate_SH, up_SH]), down_HS, gate_H, self.shape.activation)


PARTS = ("gate", "up", "down")


def _decoded(matrices: tuple[GgufTensor, ...]) -> list[Tensor]:
    return [matrix.dequantize() for matrix in matrices]


def _stored(gates: tuple[GgufTensor, ...], ups: tuple[GgufTensor, ...], downs: tuple[GgufTensor, ...]) -> Stored | None:
    joined = [stacked(pair) for pair in zip(gates, ups, strict=True)]
    whole = tuple(matrix for matrix in joined if matrix is not None)
    return Stored(whole, downs) if len(whole) == len(joined) else None


def converted_by() -> list[Any]:
    """Return what a whole model owes its float32 weights to, beside its file."""
    return [CONVERTER, version("gguf")]


def build(params: GgufModel) -> GgufSource:
    """Return the model; nothing is read before a layer is asked for."""
    return GgufSource(params)
